"""Megatron-Bridge's own pretrain with the callback, and the interface on which it relies."""

import inspect
import json
import os
import subprocess
import sys
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
    printed = (tmp_path / "run" / "output0").read_text()
    assert f"mode R3, routes of {path}, {LAYERS} routed layers" in printed
    assert f"the first pass replayed {4 * LENGTH * LAYERS} rows" in printed


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


@pytest.mark.parametrize(
    ("sizes", "layers"),
    [({"moe_layer_freq": [0, 1, 1, 1]}, range(1, LAYERS)), ({"mtp_num_layers": 1}, range(LAYERS))],
    ids=["a dense layer", "multi-token prediction"],
)
def test_a_model_with_other_layers_dispatches_exactly_the_routes(samples, sizes, layers, tmp_path):
    routes = random_routes(len(samples), layers)
    path = save(tmp_path / "routes.safetensors", routes, samples)
    (witness,) = job(tmp_path / "run", sizes=sizes, routes=path)
    assert check_dispatch(witness, samples, routes) == len(samples) * LENGTH * len(layers)
    assert set(witness["maps"]) == {*layers, *(["mtp"] if "mtp_num_layers" in sizes else [])}


def test_adapters_of_lora_train_under_exactly_the_routes(samples, table, tmp_path):
    path, routes = table
    lora = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2", "router")
    (witness,) = job(tmp_path / "run", routes=path, own_loop="", lora=lora)
    assert check_dispatch(witness, samples, routes) == len(samples) * LENGTH * LAYERS


NEVER_CALLED = """
import bridge_on_cpu
bridge_on_cpu.prepare()
from routing_replay.adapters.megatron_bridge import RoutingReplay
from routing_replay.adapters.settings import AdapterSettings
RoutingReplay(AdapterSettings(routes="routes.safetensors"))
"""


def test_a_process_whose_callback_never_ran_fails():
    command = [sys.executable, "-W", "ignore", "-c", NEVER_CALLED]
    done = subprocess.run(command, text=True, capture_output=True, env=os.environ)
    assert done.returncode == 1
    assert "error: the job ended without a single replayed row" in done.stderr
    assert "no update that routing replay saw" in done.stderr


@pytest.mark.slow
def test_the_example_replays_the_samples_that_it_trains_on(tmp_path):
    example = Path(__file__).parents[2] / "examples" / "megatron_bridge.py"
    command = [sys.executable, "-W", "ignore", str(example)]
    done = subprocess.run(command, text=True, capture_output=True, cwd=tmp_path, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "routing_replay: the first pass replayed" in done.stdout


def test_the_callback_has_the_events_that_bridge_calls_around_its_step():
    import bridge_on_cpu

    bridge_on_cpu.prepare()
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
