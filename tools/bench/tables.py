"""Time and peak memory of inspecting and comparing large routes files.

    python -m tools.bench.tables --tokens 10_000_000 --layers 48 --top-k 8

writes two files of that size (3.8 GB each at the default model), inspects the first, compares both,
and prints for each the bytes per second, the same for merely reading the file, and the peak of
the memory that the process owned (mapped file pages are the kernel's and do not count).
"""

from __future__ import annotations

import argparse
import json
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from routing_replay.analysis.comparison import compare_tables
from routing_replay.analysis.inspection import inspect_table
from routing_replay.routes.shape import MoEShape
from routing_replay.routes.table import RouteTable

from .paired import finish, parse, parser, run_apart

BLOCK_ROWS = 1 << 18
SEQUENCE_ROWS = 4096


def write_table(path: Path, model: MoEShape, num_rows: int, flip_share: float) -> None:
    """Write random distinct experts; `flip_share` of the rows differ from the seed's routes."""
    generator = np.random.default_rng(0)
    lengths = [SEQUENCE_ROWS] * (num_rows // SEQUENCE_ROWS)
    lengths += [num_rows % SEQUENCE_ROWS] * (num_rows % SEQUENCE_ROWS > 0)
    shape = (len(model.layers), num_rows, model.top_k)
    spool = path.with_suffix(".ids")
    ids_LTK = np.memmap(spool, np.uint8, "w+", shape=shape)
    stride = model.num_experts // model.top_k
    for ids_TK in ids_LTK:
        for start in range(0, num_rows, BLOCK_ROWS):
            count = min(BLOCK_ROWS, num_rows - start)
            # Each slot draws from its own range of experts, so the slots are distinct.
            block = generator.integers(0, stride, (count, model.top_k), np.uint8)
            flips = generator.random(count) < flip_share
            block[flips, 0] = (block[flips, 0] + 1) % stride
            ids_TK[start : start + count] = block + np.arange(model.top_k, dtype=np.uint8) * stride
    tensors = {
        "expert_ids_LTK": ids_LTK,
        "covered_T": np.ones(num_rows, np.bool_),
        "origin_T": np.ones(num_rows, np.uint8),
        "weight_version_T": np.zeros(num_rows, np.int64),
        "offsets_S1": np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
    }
    RouteTable(model, tensors).save(path)
    spool.unlink()


def owned_bytes() -> int:
    """Return the memory of this process that is not a mapped file."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) * 1024


def read_all(path: Path) -> float:
    """Return the seconds of reading the file once, in blocks: no tool can be faster."""
    started = time.perf_counter()
    with open(path, "rb", buffering=0) as file:
        buffer = bytearray(1 << 24)
        while file.readinto(buffer):
            pass
    return time.perf_counter() - started


def measure(name: str, paths: list[Path]) -> dict[str, float]:
    """Return time and peak memory of one operation."""
    before = peak = owned_bytes()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.02):
            peak = max(peak, owned_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.perf_counter()
    tables = [RouteTable.open(path, verify=name == "verify") for path in paths]
    if name == "inspect":
        inspect_table(tables[0])
    elif name == "diff":
        compare_tables(*tables)
    seconds = time.perf_counter() - started
    done.set()
    watcher.join()
    size = sum(path.stat().st_size for path in paths)
    return {"seconds": seconds, "gb_per_s": size / seconds / 1e9, "peak_mb": (peak - before) / 1e6}


def make_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    made = parser(__doc__)
    made.add_argument("--tokens", type=int, default=1_000_000)
    made.add_argument("--layers", type=int, default=48)
    made.add_argument("--top-k", type=int, default=8)
    made.add_argument("--experts", type=int, default=128)
    made.add_argument("--folder", help="where the files go; a temporary folder by default")
    made.add_argument("--measure", nargs="+", help=argparse.SUPPRESS)
    return made


def main(argv: Sequence[str] | None = None) -> None:
    """Write two files and measure each operation in a process of its own."""
    parsed = parse(make_parser(), argv, {"tokens": 100, "layers": 2})
    if parsed.measure:
        name, *paths = parsed.measure
        print(json.dumps(measure(name, [Path(path) for path in paths])))
        return
    model = MoEShape(
        layers=tuple(range(parsed.layers)), num_experts=parsed.experts, top_k=parsed.top_k
    )
    with tempfile.TemporaryDirectory(dir=parsed.folder) as folder:
        files = [Path(folder) / name for name in ("a.safetensors", "b.safetensors")]
        for path, share in zip(files, (0.0, 0.02), strict=True):
            write_table(path, model, parsed.tokens, share)
        size = files[0].stat().st_size
        print(f"{parsed.tokens} tokens x {parsed.layers} layers x top-{parsed.top_k}: {size} bytes")
        seconds = read_all(files[0])
        figures = {"read": {"seconds": seconds, "gb_per_s": size / seconds / 1e9, "peak_mb": 0.0}}
        for name, count in (("verify", 1), ("inspect", 1), ("diff", 2)):
            operands = [str(path) for path in files[:count]]
            figures[name] = run_apart(__spec__.name, "--measure", name, *operands)
    for name, result in figures.items():
        print(
            f"{name:8s} {result['seconds']:8.2f} s {result['gb_per_s']:7.2f} GB/s, "
            f"peak {result['peak_mb']:.0f} MB"
        )
    finish("tables", parsed, figures)


if __name__ == "__main__":
    main()
