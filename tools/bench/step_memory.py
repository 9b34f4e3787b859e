"""Host memory and processor time of the process that makes a step's files, per token.

    python -m tools.bench.step_memory [--tokens 200_000] [--layers 48] [--top-k 8]

Synthetic samples with the routes of a real size go through what rank 0 of the recipe does with a
step: `Batch.from_samples` and `RouteTable.from_routes`, each saved to a file. Every capture level
runs in a process of its own; the peak is of memory that the process owns (mapped file pages are the
kernel's and do not count). What the client holds while answers arrive is not in it. Beside it, the
processor time of each part: storing the responses, the batch, the table, saving and verifying it.
"""

from __future__ import annotations

import json
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from recipes.minirl.rollout.answers import line_of
from recipes.minirl.rollout.batch import Batch, Sample, rows_with_gates
from routing_replay.config import ReplayConfig
from routing_replay.rollout import Completion
from routing_replay.routes.routes import Routes
from routing_replay.routes.table import RouteTable

from .paired import finish, parse, parser, run_apart
from .tables import owned_bytes

SEQUENCE_TOKENS = 4096
PROMPT_TOKENS = 256
# Calls of a layer's routers in a pass: of sequences that are packed four by four.
SEQUENCES_PER_CALL = 4
T = TypeVar("T")


def samples(num_tokens: int, num_layers: int, top_k: int, has_gates: bool) -> list[Sample]:
    """Return so many tokens as sequences of one length, with distinct random experts."""
    generator = np.random.default_rng(0)
    response = SEQUENCE_TOKENS - PROMPT_TOKENS
    shape_TLK = (SEQUENCE_TOKENS - 1, num_layers, top_k)
    made = []
    for _ in range(max(1, num_tokens // SEQUENCE_TOKENS)):
        first_TL1 = generator.integers(0, 128 // top_k, (*shape_TLK[:2], 1), np.uint8)
        ids_TLK = first_TL1 + np.arange(top_k, dtype=np.uint8) * (128 // top_k)
        gates_TLK = np.full(shape_TLK, 1 / (2 * top_k), np.float16) if has_gates else None
        routes = Routes(
            expert_ids_TLK=np.ascontiguousarray(ids_TLK),
            layers=tuple(range(num_layers)),
            num_experts=128,
            gate_probs_TLK=gates_TLK,
        )
        sample = Sample(
            prompt_ids=tuple(range(PROMPT_TOKENS)),
            response_ids=tuple(range(response)),
            logp_mu=(-1.0,) * response,
            routes=routes,
        )
        made.append(sample)
    return made


def write_step(made: list[Sample], folder: Path) -> dict[str, float]:
    """Make the files of a step; return the processor seconds of each part."""
    seconds: dict[str, float] = {}

    def clocked(name: str, work: Callable[[], T]) -> T:
        started = time.thread_time()
        result = work()
        seconds[name] = time.thread_time() - started
        return result

    line_of("", _completion(made[0]), 0)  # a step stores thousands: memory is there
    clocked("one response stored", lambda: line_of("", _completion(made[0]), 0).encode())
    batch = clocked("batch", lambda: Batch.from_samples(made, 1, 1))
    clocked("batch saved", lambda: batch.save(folder / "batch.safetensors"))
    routes = [sample.routes for sample in made if sample.routes is not None]
    num_calls = -(-len(made) // SEQUENCES_PER_CALL)
    keeps_gates_T = rows_with_gates(batch, routes, num_calls, ReplayConfig())
    RouteTable.from_routes(routes[:1])  # numba compiles at the first
    table = clocked("table", lambda: RouteTable.from_routes(routes, keeps_gates_T=keeps_gates_T))
    path = folder / "routes.safetensors"
    clocked("table saved", lambda: table.save(path))
    clocked("table verified", lambda: RouteTable.open(path, verify=True))
    return seconds


def _completion(sample: Sample) -> Completion:
    return Completion(
        output_ids=list(sample.response_ids),
        mu_logprobs=np.array(sample.logp_mu, np.float32),
        routes=sample.routes,
        finish_reason="length",
        weight_version="0",
        cached_tokens=0,
        num_retractions=0,
    )


def measure(num_tokens: int, num_layers: int, top_k: int, level: str) -> dict[str, float]:
    """Return bytes per token of the samples, and of the peak while the files are made."""
    before = owned_bytes()
    made = samples(num_tokens, num_layers, top_k, level == "gates")
    held = peak = owned_bytes()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.01):
            peak = max(peak, owned_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    with tempfile.TemporaryDirectory() as folder:
        seconds = write_step(made, Path(folder))
    done.set()
    watcher.join()
    tokens = len(made) * SEQUENCE_TOKENS
    seconds["one response stored"] *= len(made)
    bytes_per_token = {"samples": (held - before) / tokens, "peak": (peak - before) / tokens}
    return bytes_per_token | {f"{name}, us": s / tokens * 1e6 for name, s in seconds.items()}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure each capture level in a process of its own."""
    made = parser(__doc__)
    for name, default in {"tokens": 200_000, "layers": 48, "top-k": 8}.items():
        made.add_argument(f"--{name}", type=int, default=default)
    made.add_argument("--level", help="measure one level here, and print JSON")
    arguments = parse(made, argv, {"tokens": 8192, "layers": 2})
    sizes = arguments.tokens, arguments.layers, arguments.top_k
    if arguments.level:
        print(json.dumps(measure(*sizes, arguments.level)))
        return
    flags = [f"--tokens={sizes[0]}", f"--layers={sizes[1]}", f"--top-k={sizes[2]}"]
    figures = {
        level: run_apart(__spec__.name, *flags, "--level", level) for level in ("ids", "gates")
    }
    ids = sizes[1] * sizes[2]
    print(f"Bytes per token; the ids alone are {ids}, ids and gates {3 * ids}.")
    print("| capture | samples | peak | peak of 33 million tokens, GB |\n| --- | --- | --- | --- |")
    for level, bytes_per_token in figures.items():
        held, peak = bytes_per_token["samples"], bytes_per_token["peak"]
        print(f"| {level} | {held:.0f} | {peak:.0f} | {33e6 * peak / 1e9:.0f} |")
    print("Microseconds of processor time per token:")
    for level, values in figures.items():
        parts = [f"{name[:-4]} {value:.3f}" for name, value in values.items() if name[-2:] == "us"]
        print(f"{level}: {', '.join(parts)}")
    finish("step_memory", arguments, figures)


if __name__ == "__main__":
    main()
