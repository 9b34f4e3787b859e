"""Inspect and diff of large routes files: time against the machine's own speed, and peak memory.

    python tools/bench/tables.py --tokens 10_000_000 --layers 48 --top-k 8

writes two files of that size (3.8 GB each at the default model), inspects the first, compares both,
and prints for each the bytes per second, the same for merely reading the file, and the peak of
the memory that the process owned (mapped file pages are the kernel's and do not count).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from routing_replay.analysis.comparison import compare_tables
from routing_replay.analysis.inspection import inspect_table
from routing_replay.routes.shape import MoEShape
from routing_replay.routes.table import RouteTable

BLOCK_ROWS = 1 << 18
SEQUENCE_ROWS = 4096


def write_table(path: Path, model: MoEShape, num_rows: int, flip_share: float) -> None:
    """Random distinct experts; the share `flip_share` of rows differs from the seed's routes."""
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
    """Memory of this process that is not a mapped file."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) * 1024


def read_all(path: Path) -> float:
    """Seconds to read the file once, in blocks: what no tool can beat."""
    started = time.perf_counter()
    with open(path, "rb", buffering=0) as file:
        buffer = bytearray(1 << 24)
        while file.readinto(buffer):
            pass
    return time.perf_counter() - started


def measure(name: str, paths: list[Path]) -> dict:
    """Runs in a process of its own, so that the peak is this operation's."""
    import threading

    before = peak = owned_bytes()
    done = threading.Event()

    def watch():
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--folder", help="where the files go; a temporary folder by default")
    parser.add_argument("--measure", nargs="+", help=argparse.SUPPRESS)
    parsed = parser.parse_args()
    if parsed.measure:
        name, *paths = parsed.measure
        print(json.dumps(measure(name, [Path(path) for path in paths])))
        return
    model = MoEShape(
        layers=tuple(range(parsed.layers)), num_experts=parsed.experts, top_k=parsed.top_k
    )
    with tempfile.TemporaryDirectory(dir=parsed.folder) as folder:
        paths = [Path(folder) / name for name in ("a.safetensors", "b.safetensors")]
        for path, share in zip(paths, (0.0, 0.02), strict=True):
            write_table(path, model, parsed.tokens, share)
        size = os.path.getsize(paths[0])
        print(f"{parsed.tokens} tokens x {parsed.layers} layers x top-{parsed.top_k}: {size} bytes")
        seconds = read_all(paths[0])
        print(f"{'read':8s} {seconds:8.2f} s {size / seconds / 1e9:7.2f} GB/s")
        for name, count in (("verify", 1), ("inspect", 1), ("diff", 2)):
            command = [sys.executable, __file__, "--measure", name, *map(str, paths[:count])]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found = json.loads(done.stdout)
            print(
                f"{name:8s} {found['seconds']:8.2f} s {found['gb_per_s']:7.2f} GB/s, "
                f"peak {found['peak_mb']:.0f} MB"
            )


if __name__ == "__main__":
    main()
