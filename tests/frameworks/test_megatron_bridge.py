"""Megatron-Bridge's own pretrain with the callback, and the interface on which it relies."""

import inspect
import json
from pathlib import Path

import pytest
import torch
from loop_routes import (
    LAYERS,
    LENGTH,
    check_dispatch,
    own_routes,
    random_routes,
    samples_of,
    save,
)
from megatron_worlds import run_world


def job(folder: Path, nproc: int = 1, sizes=None, **named) -> list[dict]:
    folder.mkdir()
    run_world("bridge_job:run", nproc, str(folder), sizes or {}, *named.values(), timeout_s=600)
    return [torch.load(path) for path in sorted(folder.glob("rank*.pt"))]


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    return job(tmp_path_factory.mktemp("bridge") / "stock")[0]


@pytest.fixture(scope="module")
def samples(stock):
    return samples_of(stock)


@pytest.fixture(scope="module")
def table(tmp_path_factory, samples):
    """Random routes of all samples, in a file."""
    routes = random_routes(len(samples))
    path = save(tmp_path_factory.mktemp("routes") / "random.safetensors", routes, samples)
    return path, routes


def test_a_job_that_replays_its_own_routes_has_the_stock_losses(stock, samples, tmp_path):
    path = save(tmp_path / "own.safetensors", own_routes(stock), samples)
    (witness,) = job(tmp_path / "run", routes=path)
    assert witness["losses"] == stock["losses"]
    assert all(map(torch.equal, witness["weights"], stock["weights"]))


def test_losses_and_trained_weights_are_those_of_a_loop_of_our_own(stock, samples, table, tmp_path):
    path, routes = table
    (own,) = job(tmp_path / "own", routes="", own_loop=path)
    (witness,) = job(tmp_path / "run", routes=path)
    assert check_dispatch(witness, samples, routes) == len(samples) * LENGTH * LAYERS
    assert witness["losses"] == own["losses"] != stock["losses"]
    assert all(map(torch.equal, witness["weights"], own["weights"]))


@pytest.mark.parametrize("axis", ["expert", "pipeline"])
def test_two_ranks_dispatch_exactly_the_routes_and_log_them(samples, table, tmp_path, axis):
    path, routes = table
    ranks = job(tmp_path / "run", 2, {f"{axis}_model_parallel_size": 2}, routes=path)
    batches = ranks[0]["tokens"] if axis == "pipeline" else None
    rows = sum(check_dispatch(rank, samples, routes, batches) for rank in ranks)
    assert rows == len(samples) * LENGTH * LAYERS
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1]
    assert json.loads(lines[0])["routing_replay/replayed_rows"] == 4 * LENGTH * LAYERS
    assert logged(tmp_path / "run" / "tensorboard") >= {
        "routing_replay/coverage",
        "routing_replay/overlap_layer_3",
    }


def logged(folder: Path) -> set[str]:
    """Names of the scalars in TensorBoard's files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return set(events.Tags()["scalars"])


def test_the_callback_has_the_events_that_bridge_calls_around_its_step():
    import bridge_job

    bridge_job.prepare()
    from megatron.bridge.training import callbacks, train

    from routing_replay.adapters.megatron_bridge import RoutingReplay

    events = {name for name in vars(RoutingReplay) if name.startswith("on_")}
    assert events <= callbacks.VALID_EVENTS
    assert {"state", "model"} <= set(inspect.signature(callbacks.CallbackContext).parameters)
    source = inspect.getsource(train.train)
    start, call, end = (
        source.index(text)
        for text in ('"on_train_step_start"', "wrapped_train_step(", '_step_end"')
    )
    assert start < call < end
