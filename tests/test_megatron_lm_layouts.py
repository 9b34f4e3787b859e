"""Megatron-LM's own loop under every layout, packed and resumed: exactly the routes."""

from __future__ import annotations

from importlib.metadata import version

import numpy as np
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
from megatron_lm_job import OWN_SPEC, STEPS
from megatron_worlds import RankError, run_world

CORE = tuple(int(part) for part in version("megatron-core").split(".")[:2])
pytestmark = pytest.mark.skipif(CORE < (0, 19), reason="--spec: called by the loop from 0.19 on")
slow = pytest.mark.slow  # all but a layout and an error
CP2 = "--context-parallel-size 2"
LAYOUTS = {
    "cp2": (2, CP2),
    "tp2-sp": (2, "--tensor-model-parallel-size 2 --sequence-parallel"),
    "ep2": (2, "--expert-model-parallel-size 2"),
    "dp2-recompute": (
        2,
        "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
    ),
    "vpp2": (2, "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1"),
    "pp4": (4, "--pipeline-model-parallel-size 4"),
    "tp2-sp-vpp2": (
        4,
        "--tensor-model-parallel-size 2 --sequence-parallel --pipeline-model-parallel-size 2 "
        "--num-layers-per-virtual-pipeline-stage 1",
    ),
    "dp2-distributed-optimizer": (
        2,
        "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather",
    ),
}
# Ranks, flags, and the layers whose routers replay.
MODELS = {
    "cp2": (2, CP2, range(LAYERS)),
    "a dense layer": (1, "--moe-layer-freq [0]+[1]*3", range(1, LAYERS)),
    "multi-token prediction": (1, "--mtp-num-layers 1", range(LAYERS)),
}


def job(folder, nproc=1, flags=(), routes="") -> list[dict]:
    folder.mkdir()
    flags = [*OWN_SPEC, *flags]
    run_world("megatron_lm_job:run", nproc, nproc, str(folder), flags, routes, timeout_s=600)
    return [torch.load(path) for path in sorted(folder.glob("rank*.pt"))]


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    """The samples of the job's steps, as a stock job reads them."""
    (stock,) = job(tmp_path_factory.mktemp("layouts") / "stock")
    return samples_of(stock)


@pytest.fixture(scope="module")
def table(samples, tmp_path_factory):
    """All samples have random routes: the file, and the routes."""
    routes = random_routes(len(samples))
    return save(tmp_path_factory.mktemp("routes") / "all.safetensors", routes, samples), routes


@pytest.fixture(scope="module")
def own_loop(table, tmp_path_factory):
    """The witness of the same job without an adapter."""
    folder = tmp_path_factory.mktemp("own") / "run"
    return job(folder, flags=["--own-loop", table[0]])[0]


@slow
def test_losses_and_trained_weights_are_those_of_a_loop_of_our_own(
    samples, table, own_loop, tmp_path
):
    path, routes = table
    (witness,) = job(tmp_path / "run", routes=path)
    assert check_dispatch(witness, samples, routes) == len(samples) * LENGTH * LAYERS
    assert witness["losses"] == own_loop["losses"]
    assert all(map(torch.equal, witness["weights"], own_loop["weights"]))


@slow
def test_packed_segments_have_routes_of_their_own(samples, tmp_path):
    halves = [half for sample in samples for half in np.split(sample, 2)]
    routes = [one[: LENGTH // 2] for one in random_routes(len(halves))]
    path = save(tmp_path / "halves.safetensors", routes, halves)
    flags = ["--packed", "--micro-batch-size", "1"]
    (witness,) = job(tmp_path / "run", flags=flags, routes=path)
    by_tokens = {h.tobytes(): r for h, r in zip(halves, routes, strict=True)}
    for layer, calls in witness["maps"].items():
        assert len(calls) == len(samples)
        for map_SE, (line,) in zip(calls, witness["tokens"], strict=True):
            both = [by_tokens[half.tobytes()] for half in np.split(line.numpy(), 2)]
            ids_SK = np.concatenate([r.expert_ids_TLK[:, layer] for r in both]).astype(np.int64)
            expected_SE = torch.zeros_like(map_SE).scatter(1, torch.from_numpy(ids_SK), True)
            assert torch.equal(map_SE, expected_SE)


@slow
def test_a_resumed_job_goes_on_with_the_routes_of_its_step(samples, table, tmp_path):
    routes = table[1]
    for step in range(STEPS):
        part = slice(4 * step, 4 * (step + 1))
        save(tmp_path / f"step{step}.safetensors", routes[part], samples[part])
    path, saved = str(tmp_path / "step{step}.safetensors"), tmp_path / "saved"
    plain = ["--ckpt-format", "torch", "--no-save-rng", "--no-load-rng"]
    kept = ["--save", str(saved), "--save-interval", "1", *plain]
    (whole,) = job(tmp_path / "whole", flags=kept, routes=path)
    (saved / "latest_checkpointed_iteration.txt").write_text("1")
    load = ["--load", str(saved), *plain]
    (resumed,) = job(tmp_path / "resumed", flags=load, routes=path)
    assert resumed["losses"] == whole["losses"][2:]
    assert check_dispatch(resumed, samples, routes) == 4 * LENGTH * LAYERS


def test_a_routes_file_of_other_samples_ends_the_first_step(tmp_path):
    path = save(tmp_path / "other.safetensors", random_routes(1), [np.arange(LENGTH)])
    with pytest.raises(RankError, match="no token of the first pass has routes"):
        job(tmp_path / "run", routes=path)


@pytest.mark.parametrize(
    "layout", [name if name == "cp2" else pytest.param(name, marks=slow) for name in LAYOUTS]
)
def test_a_layout_dispatches_exactly_the_routes(samples, table, own_loop, layout, tmp_path):
    path, routes = table
    nproc, flags = LAYOUTS[layout]
    ranks = job(tmp_path / "run", nproc, flags.split(), path)
    batches = ranks[0]["tokens"] if "pipeline" in flags else None
    rows = sum(check_dispatch(rank, samples, routes, batches) for rank in ranks)
    assert rows == len(samples) * LENGTH * LAYERS
    # Megatron draws other first weights where it shards them, and sums other microbatches where it
    # shards samples: the losses of one rank come back where every rank has all weights.
    losses = [rank["losses"] for rank in ranks]
    if layout.startswith("dp2"):  # a step's microbatches lie on two ranks
        assert np.stack(losses, 1).ravel() == pytest.approx(own_loop["losses"], rel=1e-6)
    if layout == "cp2":  # a sample's tokens lie on two ranks
        assert np.sum(losses, 0) == pytest.approx(own_loop["losses"], rel=1e-6)


@slow
@pytest.mark.parametrize("model", MODELS)
def test_a_job_that_replays_its_own_routes_is_the_stock_job(samples, model, tmp_path):
    nproc, flags, layers = MODELS[model]
    stock = job(tmp_path / "stock", nproc, flags.split())
    path = save(tmp_path / "own.safetensors", own_routes(*stock), samples)
    ranks = job(tmp_path / "run", nproc, flags.split(), path)
    for rank, expected in zip(ranks, stock, strict=True):
        assert set(rank["maps"]) - {"mtp"} == set(layers)
        assert rank["losses"] == expected["losses"]
        assert all(map(torch.equal, rank["weights"], expected["weights"]))


@slow
@pytest.mark.parametrize("model", ["a dense layer", "multi-token prediction"])
def test_a_model_with_other_layers_dispatches_exactly_the_routes(samples, model, tmp_path):
    _, flags, layers = MODELS[model]
    routes = random_routes(len(samples), layers)
    path = save(tmp_path / "routes.safetensors", routes, samples)
    (rank,) = job(tmp_path / "run", flags=flags.split(), routes=path)
    assert check_dispatch(rank, samples, routes) == len(samples) * LENGTH * len(layers)
    assert ("mtp" in rank["maps"]) == (model == "multi-token prediction")
