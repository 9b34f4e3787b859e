"""Host memory and processor time of the process that makes a step's files, per token.

    python -m tools.bench.step_memory [--tokens 200_000] [--layers 48] [--top-k 8]

Synthetic samples with the routes of a real size become the files of a step in three ways. "table":
all samples are there, then one table is made of them and saved, and each node verifies it whole.
"parts", what the recipe does: a group of samples is written when it ends, and its routes leave the
memory; a node verifies the parts that it trains, here those of a data rank of 64 and a pipeline
stage of 4. "samplers", as on Ray: parts are written elsewhere, and this process gets each group
without them, as bytes. Every way and capture level runs in a process of its own; the peak is of
memory that the process owns (mapped file pages are the kernel's and do not count). What the client
holds while answers arrive is not in it. Beside it, the processor time of each leg; "after the last
answer" sums those that begin when all responses are there.
"""

from __future__ import annotations

import json
import pickle
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar

import numpy as np

from recipes.minirl.rollout.answers import line_of
from recipes.minirl.rollout.batch import BATCH_FILE, Batch, Sample
from recipes.minirl.rollout.groups import INDEX_FILE, Group, GroupWriter, rows_with_gates
from routing_replay.config import ReplayConfig
from routing_replay.rollout import Completion
from routing_replay.routes.parts import PartedTable
from routing_replay.routes.routes import Routes
from routing_replay.routes.shape import MoEShape
from routing_replay.routes.table import RouteTable

from .paired import finish, parse, parser, run_apart
from .tables import owned_bytes

SEQUENCE_TOKENS = 4096
PROMPT_TOKENS = 256
NUM_EXPERTS, GROUP_SIZE = 128, 8
DATA_RANKS, STAGES = 64, 4
WAYS = ("table", "parts", "samplers")
SENT = ".sent"
T = TypeVar("T")


def groups(num_tokens: int, num_layers: int, top_k: int, has_gates: bool) -> Iterator[list[Sample]]:
    """Yield so many tokens as groups of sequences of one length, with distinct random experts."""
    generator = np.random.default_rng(0)
    response = SEQUENCE_TOKENS - PROMPT_TOKENS
    shape_TLK = (SEQUENCE_TOKENS - 1, num_layers, top_k)

    def sample() -> Sample:
        first_TL1 = generator.integers(0, NUM_EXPERTS // top_k, (*shape_TLK[:2], 1), np.uint8)
        ids_TLK = first_TL1 + np.arange(top_k, dtype=np.uint8) * (NUM_EXPERTS // top_k)
        gates_TLK = np.full(shape_TLK, 1 / (2 * top_k), np.float16) if has_gates else None
        routes = Routes(
            expert_ids_TLK=np.ascontiguousarray(ids_TLK),
            layers=tuple(range(num_layers)),
            num_experts=NUM_EXPERTS,
            gate_probs_TLK=gates_TLK,
        )
        return Sample(
            prompt_ids=np.arange(PROMPT_TOKENS, dtype=np.int32),
            response_ids=np.arange(response, dtype=np.int32),
            logp_mu=np.full(response, -1.0, np.float32),
            routes=routes,
        )

    for _ in range(max(1, num_tokens // SEQUENCE_TOKENS // GROUP_SIZE)):
        yield [sample() for _ in range(GROUP_SIZE)]


class Clock:
    """Adds up processor seconds of this thread."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def __call__(self, name: str, work: Callable[[], T]) -> T:
        started = time.thread_time()
        result = work()
        self.seconds[name] = self.seconds.get(name, 0) + time.thread_time() - started
        return result


def write_table(of_groups: Iterator[list[Sample]], folder: Path, clock: Clock) -> None:
    """Make the files of a step with one table."""
    made = [sample for group in of_groups for sample in group]
    write_batch(made, folder, clock)
    keeps_gates_T = np.concatenate(rows_with_gates(made, len(made), ReplayConfig()))
    routes = [sample.routes for sample in made if sample.routes is not None]
    table = clock("table", lambda: RouteTable.from_routes(routes, keeps_gates_T=keeps_gates_T))
    path = folder / INDEX_FILE
    clock("table saved", lambda: table.save(path))
    clock("verified", lambda: RouteTable.open(path, verify=True))


def writer_to(folder: Path, num_layers: int, top_k: int) -> GroupWriter:
    """Return the writer of a step's parts."""
    layers = tuple(range(num_layers))
    stages = tuple(tuple(map(int, stage)) for stage in np.array_split(layers, STAGES))
    return GroupWriter(
        folder=folder,
        shape=MoEShape(layers=layers, num_experts=NUM_EXPERTS, top_k=top_k),
        stages=tuple(stage for stage in stages if stage),
        oldest_version=None,
        num_calls=GROUP_SIZE,
        replay=ReplayConfig(),
        is_planned=False,
    )


def write_parts(of_groups: Iterator[list[Sample]], writer: GroupWriter, clock: Clock) -> None:
    """Make the files of a step with a part for each group and pipeline stage."""
    kept = [
        clock("parts written", lambda numbered=numbered: writer.write(*numbered))  # type: ignore[misc]
        for numbered in enumerate(of_groups)
    ]
    write_index(kept, writer, clock)


def write_elsewhere(sizes: tuple[int, int, int], has_gates: bool, folder: Path) -> None:
    """Make the parts of a step, and what is sent of each group."""
    writer = writer_to(folder, *sizes[1:])
    for number, samples in enumerate(groups(*sizes, has_gates)):
        group = writer.write(number, samples)
        (folder / f"{number:06d}{SENT}").write_bytes(pickle.dumps(group, protocol=5))


def receive(sizes: tuple[int, int, int], has_gates: bool, folder: Path, clock: Clock) -> None:
    """Make batch and index of groups that another process has sampled."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        pool.submit(write_elsewhere, sizes, has_gates, folder).result()
    sent = [path.read_bytes() for path in sorted(folder.glob(f"*{SENT}"))]
    kept = [clock("groups received", lambda data=data: pickle.loads(data)) for data in sent]  # type: ignore[misc]
    write_index(kept, writer_to(folder, *sizes[1:]), clock)


def write_index(kept: list[Group], writer: GroupWriter, clock: Clock) -> None:
    """Make batch and index, and open the parts of a rank."""
    folder = writer.folder
    write_batch([sample for group in kept for sample in group.samples], folder, clock)
    clock("index", lambda: writer.save_index(folder, kept, 1.0))
    num_sequences = len(kept) * GROUP_SIZE
    mine = range(-(-num_sequences // DATA_RANKS))
    clock("verified", lambda: PartedTable.open(folder / INDEX_FILE, mine, writer.stages[0]))


def write_batch(made: list[Sample], folder: Path, clock: Clock) -> None:
    """Write what both ways have."""
    batch = clock("batch", lambda: Batch.from_samples(made, GROUP_SIZE))
    clock("batch saved", lambda: batch.save(folder / BATCH_FILE))


def write_step(
    sizes: tuple[int, int, int], has_gates: bool, way: str, folder: Path
) -> dict[str, float]:
    """Make the files of a step; return the processor seconds of each leg."""
    num_tokens, num_layers, top_k = sizes
    clock = Clock()
    (small,) = groups(1, num_layers, top_k, has_gates)
    assert small[0].routes is not None
    RouteTable.from_routes([small[0].routes])  # numba compiles at the first
    line_of("", _completion(small[0]), 0)  # a step stores thousands: memory is there
    clock("responses stored", lambda: line_of("", _completion(small[0]), 0).encode())
    clock.seconds["responses stored"] *= num_tokens / SEQUENCE_TOKENS
    match way:
        case "samplers":
            receive(sizes, has_gates, folder, clock)
        case "parts":
            write_parts(groups(*sizes, has_gates), writer_to(folder, num_layers, top_k), clock)
        case _:
            write_table(groups(*sizes, has_gates), folder, clock)
    early = ("responses stored", "parts written", "groups received")
    after = sum(value for name, value in clock.seconds.items() if name not in early)
    return clock.seconds | {"after the last answer": after}


def _completion(sample: Sample) -> Completion:
    return Completion(
        output_ids=sample.response_ids.tolist(),
        mu_logprobs=sample.logp_mu,
        routes=sample.routes,
        finish_reason="length",
        weight_version="0",
        cached_tokens=0,
        num_retractions=0,
    )


def measure(sizes: tuple[int, int, int], level: str, way: str) -> dict[str, float]:
    """Return bytes per token at the peak while the files are made, and microseconds per token."""
    before = peak = owned_bytes()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.01):
            peak = max(peak, owned_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    with tempfile.TemporaryDirectory() as folder:
        seconds = write_step(sizes, level == "gates", way, Path(folder))
    done.set()
    watcher.join()
    microseconds = {f"{name}, us": s / sizes[0] * 1e6 for name, s in seconds.items()}
    return {"peak": (peak - before) / sizes[0]} | microseconds


def main(argv: Sequence[str] | None = None) -> None:
    """Measure each way and capture level in a process of its own."""
    made = parser(__doc__)
    for name, default in {"tokens": 262_144, "layers": 48, "top-k": 8}.items():
        made.add_argument(f"--{name}", type=int, default=default)
    made.add_argument("--level", help="measure one level here, and print JSON")
    made.add_argument("--way", default="parts", choices=WAYS)
    arguments = parse(made, argv, {"tokens": 32_768, "layers": 4})
    sizes = arguments.tokens, arguments.layers, arguments.top_k
    if arguments.level:
        print(json.dumps(measure(sizes, arguments.level, arguments.way)))
        return
    flags = [f"--tokens={sizes[0]}", f"--layers={sizes[1]}", f"--top-k={sizes[2]}"]
    figures = {
        f"{level}, {way}": run_apart(__spec__.name, *flags, "--level", level, "--way", way)
        for level in ("ids", "gates")
        for way in WAYS
    }
    ids = sizes[1] * sizes[2]
    print(f"Bytes per token; the ids alone are {ids}, ids and gates {3 * ids}.")
    print("| capture, way | peak of this step | per token |\n| --- | --- | --- |")
    for name, values in figures.items():
        print(f"| {name} | {values['peak'] * sizes[0] / 1e6:.0f} MB | {values['peak']:.0f} |")
    print("Microseconds of processor time per token:")
    for name, values in figures.items():
        parts = [f"{leg[:-4]} {value:.3f}" for leg, value in values.items() if leg[-2:] == "us"]
        print(f"{name}: {', '.join(parts)}")
    finish("step_memory", arguments, figures)


if __name__ == "__main__":
    main()
