"""Gates capture in one kernel against its torch form and stock's write: microseconds per step.

    python -m tools.bench.gates_kernel [--layers 48] [--json FILE]

Without a GPU it checks the results in Triton's interpreter, and times nothing.

One step is one CUDA graph of all layers, as in an engine's decode. The limit is what memory allows:
the bytes of the logits and ids that are read and of the slots that are written, at the rate of a
plain copy. A decode step's few tokens cannot fill a GPU, so its figure is the time that a step
takes longer than with stock's write.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from routing_replay.sglang.gates import gate_probs, pack, unpack
from tools import gpu_timing

from .paired import device, machine, parse, parser, run_kernel, spread

FUNCTIONS = ("softmax", "sigmoid", "sqrtsoftplus")
BATCH_SIZES = (1, 16, 64, 256, 8192)


@dataclass(frozen=True, kw_only=True)
class Step:
    """All layers' logits and ids of one step, and the capture buffer."""

    logits_LTE: torch.Tensor
    ids_LTK: torch.Tensor
    buffer_TLK: torch.Tensor

    @classmethod
    def random(cls, arguments: argparse.Namespace, num_tokens: int) -> Step:
        shape = (arguments.layers, num_tokens, arguments.experts)
        logits_LTE = torch.randn(shape, device=device())
        ids_LTK = logits_LTE.topk(arguments.top_k, dim=-1).indices.int()
        buffer_TLK = ids_LTK.new_zeros((num_tokens, arguments.layers, arguments.top_k))
        dtype = getattr(torch, arguments.dtype)
        return cls(logits_LTE=logits_LTE.to(dtype), ids_LTK=ids_LTK, buffer_TLK=buffer_TLK)

    @property
    def bytes(self) -> int:
        return self.logits_LTE.nbytes + self.ids_LTK.nbytes + self.buffer_TLK.nbytes

    def stock(self) -> None:
        """SGLang's own write, of ids alone."""
        for layer, ids_TK in enumerate(self.ids_LTK):
            self.buffer_TLK[:, layer] = ids_TK

    def torch(self, function: str) -> None:
        """Seven kernels for each layer."""
        for layer, (logits_TE, ids_TK) in enumerate(
            zip(self.logits_LTE, self.ids_LTK, strict=True)
        ):
            self.buffer_TLK[:, layer] = pack(ids_TK, gate_probs(logits_TE, ids_TK, function))

    def kernel(self, function: str) -> None:
        """One kernel for each layer."""
        from routing_replay.kernels.gates import capture_gates

        for layer, (logits_TE, ids_TK) in enumerate(
            zip(self.logits_LTE, self.ids_LTK, strict=True)
        ):
            capture_gates(logits_TE, ids_TK, function, self.buffer_TLK[:, layer])


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Time stock's write and both forms of every score function, for each batch size."""
    bandwidth = gpu_timing.copy_bandwidth(device())
    print(f"{machine()['device']}: a copy moves {bandwidth / 1e9:.0f} GB/s")
    print("| tokens | way | us per step | GB/s | limit, us |\n| --- | --- | --- | --- | --- |")
    rows = []
    for num_tokens in BATCH_SIZES:
        step = Step.random(arguments, num_tokens)
        ways: dict[str, gpu_timing.Calls] = {"stock ids": [step.stock]}
        for function in FUNCTIONS:
            ways[f"{function}, torch"] = [functools.partial(step.torch, function)]
            ways[f"{function}, kernel"] = [functools.partial(step.kernel, function)]
        for way, seconds in gpu_timing.seconds_per_call(ways).items():
            us = spread([1e6 * value for value in seconds])
            rate, limit_us = step.bytes / us.median / 1e3, 1e6 * step.bytes / bandwidth
            rows.append({"tokens": num_tokens, "way": way, "us": us, "limit_us": limit_us})
            print(f"| {num_tokens} | {way} | {us} | {rate:.0f} | {limit_us:.2f} |", flush=True)
    return {"copy_gb_per_s": bandwidth / 1e9, "rows": rows}


def check(arguments: argparse.Namespace) -> dict[str, float]:
    """Compare the kernel with the torch form; ends the process if ids or gates differ.

    Raises:
        SystemExit: Ids differ, or gates by more than a unit of float16.
    """
    step, distances = Step.random(arguments, num_tokens=19), {}
    for function in FUNCTIONS:
        step.kernel(function)
        ids, gates = (part.clone() for part in unpack(step.buffer_TLK))
        step.torch(function)
        expected_ids, expected_gates = unpack(step.buffer_TLK)
        apart = ((gates - expected_gates).float() / expected_gates.float()).abs().max().item()
        print(f"{function}: gates differ by {apart:.1e} of themselves")
        if not torch.equal(ids, expected_ids) or not apart <= 2**-10:
            sys.exit(f"{function}: kernel and torch form differ")
        distances[function] = apart
    return distances


def main(argv: Sequence[str] | None = None) -> None:
    """Time the kernel, or check it where there is no GPU."""
    made = parser(__doc__)
    made.add_argument("--layers", type=int, default=48)
    made.add_argument("--experts", type=int, default=128)
    made.add_argument("--top-k", type=int, default=8)
    made.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    run_kernel("gates_kernel", parse(made, argv, {"layers": 2}), measure, check)


if __name__ == "__main__":
    main()
