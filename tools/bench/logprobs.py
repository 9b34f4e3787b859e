"""Peak memory and time of token log-probs, chunked against the plain softmax, as ratios.

    python -m tools.bench.logprobs                              V = 151,936, float32, CPU or GPU
    python -m tools.bench.logprobs --tokens 4096 --dtype bfloat16

Every measurement runs in a process of its own, so that one's memory is not another's. Memory is
what forward and backward allocate beyond the logits; on a CPU, the growth of the resident set.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import torch

from routing_replay.objectives import logprobs

from .paired import finish, parse, parser, run_apart, timed

# Qwen3's vocabulary.
VOCABULARY = 151_936
WAYS = ("plain", "chunked", "chunked in place")


Scored = tuple[torch.Tensor, torch.Tensor | None]


def plain(logits_TV: torch.Tensor, targets_T: torch.Tensor, with_entropy: bool) -> Scored:
    """Score without a fused kernel: a float32 log-softmax of the logits' size."""
    logs_TV = logits_TV.float().log_softmax(dim=1)
    logp_T = logs_TV.gather(1, targets_T[:, None]).squeeze(1)
    return logp_T, -(logs_TV.exp() * logs_TV).sum(dim=1) if with_entropy else None


def score(way: str, logits_TV: torch.Tensor, targets_T: torch.Tensor, with_entropy: bool) -> Scored:
    """Return log-probs, and the entropy if asked for."""
    if way == "plain":
        return plain(logits_TV, targets_T, with_entropy)
    in_place = way == "chunked in place"
    scores = logprobs.token_logprobs(logits_TV, targets_T, reuse_logits=in_place)
    return scores.logp_T, scores.entropy_T if with_entropy else None


class PeakMemory:
    """Bytes above the start: the allocator's on a GPU, the resident set's on a CPU."""

    def __init__(self, device: str):
        self.device = device
        self.size_bytes = 0

    def __enter__(self) -> Self:
        if self.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.start = torch.cuda.memory_allocated()
            return self
        self.start = self.peak = _resident_bytes()
        self.stop = threading.Event()
        self.watch = threading.Thread(target=self._sample, daemon=True)
        self.watch.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()
            self.size_bytes = torch.cuda.max_memory_allocated() - self.start
            return
        self.stop.set()
        self.watch.join()
        self.size_bytes = self.peak - self.start

    def _sample(self) -> None:
        while not self.stop.wait(0.001):
            self.peak = max(self.peak, _resident_bytes())


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def measure(options: argparse.Namespace) -> dict[str, float]:
    """Return the best time of the repetitions, and the largest memory of any of them."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(options.threads)
    targets_T = torch.randint(0, options.vocabulary, (options.tokens,), device=device)
    dtype = getattr(torch, options.dtype)
    times, sizes = [], []
    for _ in range(options.repeat):
        leaf_TV = torch.randn(options.tokens, options.vocabulary, device=device).to(dtype)
        leaf_TV.requires_grad_()
        # A view, as the logits are in a model: the output of an operation that needs no copy.
        logits_TV = leaf_TV.view_as(leaf_TV)

        def step(logits_TV: torch.Tensor = logits_TV) -> None:
            logp_T, entropy_T = score(options.way, logits_TV, targets_T, options.entropy)
            loss = logp_T.sum() if entropy_T is None else logp_T.sum() + 0.01 * entropy_T.sum()
            torch.autograd.grad(loss, logits_TV)

        with PeakMemory(device) as memory:
            times.append(timed(step)())
        sizes.append(memory.size_bytes)
    return {"time_s": min(times), "size_bytes": max(sizes)}


def make_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    made = parser(__doc__)
    made.add_argument("--tokens", type=int, default=1024)
    made.add_argument("--vocabulary", type=int, default=VOCABULARY)
    made.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    made.add_argument("--repeat", type=int, default=3)
    made.add_argument("--threads", type=int, default=1)
    made.add_argument("--entropy", action="store_true", help="with the entropy's gradient")
    made.add_argument("--chunk-mib", type=int, help="size of a chunk, to see what it changes")
    made.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    return made


def main(argv: Sequence[str] | None = None) -> None:
    """Measure every way in a process of its own and print a table."""
    argv = sys.argv[1:] if argv is None else list(argv)
    options = parse(make_parser(), argv, {"tokens": 8, "vocabulary": 64, "repeat": 1})
    if options.chunk_mib:
        logprobs.CHUNK_BYTES.update(cpu=options.chunk_mib * 2**20, cuda=options.chunk_mib * 2**20)
    if options.way:
        print(json.dumps(measure(options)))
        return
    results = {way: run_apart(__spec__.name, *argv, "--way", way) for way in WAYS}
    logits_bytes = options.tokens * options.vocabulary * getattr(torch, options.dtype).itemsize
    print(f"{options.tokens} tokens, V = {options.vocabulary}, {options.dtype}, ", end="")
    print(f"entropy gradient {options.entropy}; logits {logits_bytes / 2**20:.0f} MiB")
    print(f"{'':18}{'time s':>8}{'ratio':>8}{'peak MiB':>10}{'ratio':>8}{'/ logits':>10}")
    base = results["plain"]
    for way, result in results.items():
        time_s, size_bytes = result["time_s"], result["size_bytes"]
        print(
            f"{way:18}{time_s:8.3f}{time_s / base['time_s']:8.2f}{size_bytes / 2**20:10.0f}"
            f"{size_bytes / max(1, base['size_bytes']):8.2f}{size_bytes / logits_bytes:10.2f}"
        )
    finish("logprobs", options, results)


if __name__ == "__main__":
    main()
