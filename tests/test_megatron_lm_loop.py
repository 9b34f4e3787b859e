"""Replay in Megatron-LM's own loop, by `--spec` and by the launcher, with a stock training script.

`megatron_lm_script.py` saves what every router dispatched: the independent witness of replay.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from routing_replay.routes.routes import Routes
from routing_replay.routes.table import RouteTable

TESTS = Path(__file__).parent
LAYERS, EXPERTS, TOP_K, LENGTH, MICRO, STEPS = 4, 8, 2, 32, 2, 2
FLAGS = f"""
    --num-layers {LAYERS} --hidden-size 64 --ffn-hidden-size 128 --num-attention-heads 4
    --seq-length {LENGTH} --max-position-embeddings {LENGTH} --position-embedding-type rope
    --micro-batch-size {MICRO} --global-batch-size 4 --train-iters {STEPS}
    --eval-iters 1 --eval-interval 1 --lr 1e-3 --min-lr 1e-4 --lr-decay-style constant
    --num-experts {EXPERTS} --moe-router-topk {TOP_K} --moe-ffn-hidden-size 64
    --moe-token-dispatcher-type alltoall --moe-router-load-balancing-type none
    --transformer-impl local --normalization RMSNorm --swiglu --disable-bias-linear
    --untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0
    --no-gradient-accumulation-fusion --no-masked-softmax-fusion --no-bias-swiglu-fusion
    --no-bias-dropout-fusion --no-persist-layer-norm --no-rope-fusion
    --distributed-backend gloo --tokenizer-type NullTokenizer --vocab-size 255
    --log-interval 1 --seed 7
""".split()
SPEC = ["--spec", "routing_replay.adapters.megatron_lm", "layer_spec"]


class Run:
    """What a finished job left: its output and the witness of each rank."""

    def __init__(self, folder: Path, nproc: int, flags=(), routes: str = "", launcher=False):
        folder.mkdir()
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(nproc)]
        if launcher:
            command += ["-m", "routing_replay.adapters.run"]
        command += [str(TESTS / "megatron_lm_script.py"), "--witness", str(folder)]
        command += [*FLAGS, *flags]
        if launcher:
            command += ["--routing-replay-routes", routes]
        environment = os.environ | {
            "CUDA_DEVICE_MAX_CONNECTIONS": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(TESTS.parent), os.environ.get("PYTHONPATH", "")]),
            "ROUTING_REPLAY_ROUTES": "" if launcher else routes,
        }
        self.folder = folder
        done = subprocess.run(
            command, env=environment, text=True, capture_output=True, timeout=300, cwd=folder
        )
        self.status, self.output = done.returncode, done.stdout + done.stderr

    def witnesses(self) -> list[dict]:
        assert self.status == 0, self.output[-6000:]
        paths = sorted(self.folder.glob("rank*.pt"))
        return [torch.load(path) for path in paths]

    def error(self) -> str:
        assert self.status != 0
        return self.output


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    return Run(tmp_path_factory.mktemp("loop") / "stock", 1).witnesses()[0]


def samples_of(witness) -> list[np.ndarray]:
    return [tokens.numpy() for batch in witness["tokens"] for tokens in batch]


def dispatched(witness, layer: int, microbatch: int) -> np.ndarray:
    """bool [b, s, E] of one router call; Megatron's order is sequence-major."""
    map_TE = witness["maps"][layer][microbatch]
    return map_TE.reshape(LENGTH, MICRO, EXPERTS).transpose(0, 1).numpy()


def own_routes(witness) -> list[Routes]:
    routes = []
    for microbatch, batch in enumerate(witness["tokens"]):
        for row in range(len(batch)):
            maps = [dispatched(witness, layer, microbatch)[row] for layer in range(LAYERS)]
            ids_TLK = np.stack([np.nonzero(m)[1].reshape(LENGTH, TOP_K) for m in maps], 1)
            routes.append(ids_TLK)
    return [routes_of(ids_TLK) for ids_TLK in routes]


def routes_of(ids_TLK) -> Routes:
    ids_TLK = np.ascontiguousarray(ids_TLK.astype(np.uint8))
    return Routes(expert_ids_TLK=ids_TLK, layers=tuple(range(LAYERS)), num_experts=EXPERTS)


def random_routes(number: int) -> list[Routes]:
    scores = np.random.default_rng(3).random((number, LENGTH, LAYERS, EXPERTS))
    return [routes_of(np.argsort(s, -1)[..., :TOP_K]) for s in scores]


def save(path: Path, routes, samples) -> str:
    # A fed token is one that has a successor: the tokens of a sequence are one more.
    tokens = [np.append(sample, 0) for sample in samples]
    RouteTable.from_routes(routes).with_tokens(tokens).save(path)
    return str(path)


def check_dispatch(witness, samples, routes) -> int:
    """Compare every router call with the routes of its tokens; return the rows compared."""
    by_tokens = {s.tobytes(): r for s, r in zip(samples, routes, strict=True)}
    rows = 0
    for layer, calls in witness["maps"].items():
        assert len(calls) == len(witness["tokens"])
        for microbatch, batch in enumerate(witness["tokens"]):
            maps_BSE = dispatched(witness, layer, microbatch)
            for map_SE, tokens in zip(maps_BSE, batch, strict=True):
                own = by_tokens.get(tokens.numpy().tobytes())
                if own is None:
                    continue
                expected_SE = np.zeros_like(map_SE)
                np.put_along_axis(expected_SE, own.expert_ids_TLK[:, layer].astype(int), True, 1)
                assert (map_SE == expected_SE).all()
                rows += LENGTH
    return rows


def test_a_job_that_replays_its_own_routes_has_the_stock_losses(stock, tmp_path):
    samples = samples_of(stock)
    assert len({s.tobytes() for s in samples}) == len(samples) == 4 * STEPS
    path = save(tmp_path / "own.safetensors", own_routes(stock), samples)
    run = Run(tmp_path / "run", 1, SPEC, path)
    witness = run.witnesses()[0]
    assert witness["losses"] == stock["losses"]
    rows = 4 * LENGTH * LAYERS
    assert f"the first pass replayed {rows} rows" in run.output


def test_the_launcher_replays_random_routes_on_two_pipeline_stages(stock, tmp_path):
    samples = samples_of(stock)
    routes = random_routes(len(samples))
    path = save(tmp_path / "random.safetensors", routes, samples)
    flags = ["--pipeline-model-parallel-size", "2"]
    first, last = Run(tmp_path / "run", 2, flags, path, launcher=True).witnesses()
    assert sorted(first["maps"]) == [0, 1] and sorted(last["maps"]) == [2, 3]
    assert check_dispatch(first, samples, routes) == 4 * STEPS * LENGTH * 2
    assert check_dispatch(last, samples, routes) == 4 * STEPS * LENGTH * 2
    assert last["losses"] != stock["losses"]


def test_samples_without_routes_route_live_under_expert_parallelism(stock, tmp_path):
    samples = samples_of(stock)
    routes = random_routes(len(samples))
    path = save(tmp_path / "some.safetensors", routes[1:], samples[1:])
    flags = [*SPEC, "--expert-model-parallel-size", "2"]
    run = Run(tmp_path / "run", 2, flags, path)
    rows = sum(check_dispatch(w, samples[1:], routes[1:]) for w in run.witnesses())
    assert rows == (4 * STEPS - 1) * LENGTH * LAYERS
    assert f"the first pass replayed {3 * LENGTH * LAYERS} rows" in run.output


def test_a_routes_file_of_other_samples_ends_the_first_step(tmp_path):
    path = save(tmp_path / "other.safetensors", random_routes(1), [np.arange(LENGTH)])
    error = Run(tmp_path / "run", 1, SPEC, path).error()
    assert "no token of the first pass has routes" in error


def test_the_launcher_names_what_is_missing(tmp_path):
    run = [sys.executable, "-m", "routing_replay.adapters.run", "nothing.py"]
    done = subprocess.run(
        [*run, "--routing-replay-routes", "x"], text=True, capture_output=True, cwd=TESTS.parent
    )
    assert done.returncode != 0
    assert "no training script is named" in done.stderr
    done = subprocess.run(run, text=True, capture_output=True, cwd=TESTS.parent)
    assert "no routes are named" in done.stderr
