"""Bytes of a step's batch and seconds to make, save and open it, by the law of its lengths.

    python -m tools.bench.batch [--sequences 512] [--mean 2048] [--longest 32768]

"equal": all sequences have the mean length. "long tail": log-normal lengths of that mean, cut at
the longest. "a rectangle" is what columns that are padded to the longest would hold. Opening
includes reading every column once.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch

from recipes.minirl.rollout.batch import BATCH_FILE, Batch, Sample

from .paired import Times, finish, parse, parser, spread, take_turns, timed

SIGMA = 1.2  # of the logarithm: 512 lengths of mean 2,048 reach 32,768
PROMPT_TOKENS, GROUP_SIZE = 16, 8
ROUNDS = 5


def lengths_of(law: str, arguments: argparse.Namespace) -> np.ndarray:
    """Return the tokens of each sequence."""
    if law == "equal":
        return np.full(arguments.sequences, arguments.mean)
    generator = np.random.default_rng(0)
    drawn_S = generator.lognormal(-(SIGMA**2) / 2, SIGMA, arguments.sequences) * arguments.mean
    lengths_S: np.ndarray = drawn_S.clip(PROMPT_TOKENS + 1, arguments.longest).astype(np.int64)
    return lengths_S


def samples_of(lengths_S: np.ndarray) -> list[Sample]:
    """Return sequences of so many random tokens, all sampled but the prompt."""
    generator = np.random.default_rng(1)
    samples = []
    for length in lengths_S.tolist():
        tokens = generator.integers(1 << 17, size=length, dtype=np.int32)
        logp_mu = -generator.random(length - PROMPT_TOKENS, np.float32)
        samples.append(
            Sample(
                prompt_ids=tokens[:PROMPT_TOKENS],
                response_ids=tokens[PROMPT_TOKENS:],
                logp_mu=logp_mu,
            )
        )
    return samples


def measure(samples: Sequence[Sample], path: Path) -> Times:
    """Return processor seconds of each part, round by round."""
    batch = Batch.from_samples(samples, GROUP_SIZE)
    batch.save(path)
    work: dict[str, Callable[[], object]] = {
        "made": lambda: Batch.from_samples(samples, GROUP_SIZE),
        "saved": lambda: batch.save(path),
        "opened": lambda: read(path),
    }
    return take_turns({name: timed(part) for name, part in work.items()}, ROUNDS)


def read(path: Path) -> None:
    """Open a batch and touch every value."""
    batch = Batch.open(path)
    for column in fields(batch):
        values = getattr(batch, column.name)
        if isinstance(values, torch.Tensor):
            values.sum()


def main(argv: Sequence[str] | None = None) -> None:
    """Measure both laws."""
    made = parser(__doc__)
    for name, default in {"sequences": 512, "mean": 2048, "longest": 32_768}.items():
        made.add_argument(f"--{name}", type=int, default=default)
    arguments = parse(made, argv, {"sequences": 16, "mean": 64, "longest": 1024})
    figures = {}
    print("| lengths | tokens | file | a rectangle | made | saved | opened and read |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for law in ("equal", "long tail"):
        lengths_S = lengths_of(law, arguments)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / BATCH_FILE
            times = measure(samples_of(lengths_S), path)
            size = path.stat().st_size
        num_positions = int((lengths_S - 1).sum())
        rectangle = size / num_positions * len(lengths_S) * int(lengths_S.max() - 1)
        seconds = {name: spread(values) for name, values in times.items()}
        figures[law] = {"bytes": size, "rectangle_bytes": rectangle, **seconds}
        parts = " | ".join(f"{value} s" for value in seconds.values())
        sizes = f"{size / 1e6:.1f} MB | {rectangle / 1e6:.1f} MB"
        print(f"| {law} | {int(lengths_S.sum()):,} | {sizes} | {parts} |")
    finish("batch", arguments, figures)


if __name__ == "__main__":
    main()
