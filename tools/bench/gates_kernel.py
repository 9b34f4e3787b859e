"""Gates capture in one kernel against its torch form and stock's write: microseconds per step.

    python -m tools.bench.gates_kernel [--layers 48] [--json FILE]
    python -m tools.bench.gates_kernel --device cpu       # correctness only, in the interpreter

One step is one CUDA graph of all layers, as in an engine's decode. GB/s counts the logits and ids
that are read and the slots that are written; a decode step's few tokens cannot fill a GPU, so its
figure is the time that a step takes longer than with stock's write.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from routing_replay.sglang.gates import gate_probs, pack, unpack
from tools import gpu_timing

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
        logits_LTE = torch.randn(shape, device=arguments.device)
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


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One row of figures for each batch size, score function and way."""
    bandwidth = gpu_timing.copy_bandwidth(torch.device(arguments.device))
    print(f"{torch.cuda.get_device_name()}: a copy moves {bandwidth / 1e9:.0f} GB/s")
    print("| tokens | function | way | us per step | GB/s |\n| --- | --- | --- | --- | --- |")
    rows = []
    for num_tokens in BATCH_SIZES:
        step = Step.random(arguments, num_tokens)
        calls: dict[tuple[str, str], Callable[[], None]] = {("", "stock ids"): step.stock}
        for function in FUNCTIONS:
            calls[function, "torch"] = lambda f=function, s=step: s.torch(f)  # type: ignore[misc]
            calls[function, "kernel"] = lambda f=function, s=step: s.kernel(f)  # type: ignore[misc]
        for (function, way), call in calls.items():
            seconds = gpu_timing.seconds_per_call([call], rounds=10)
            row = {"tokens": num_tokens, "function": function, "way": way, "us": seconds * 1e6}
            rows.append(row | {"gb_per_s": step.bytes / seconds / 1e9})
            text = f"{row['us']:.1f} | {rows[-1]['gb_per_s']:.0f} |"
            print(f"| {num_tokens} | {function} | {way} | {text}", flush=True)
    return rows


def check(arguments: argparse.Namespace) -> None:
    """Compare the kernel with the torch form; ends the process if ids or gates differ.

    Raises:
        SystemExit: Ids differ, or gates by more than a unit of float16.
    """
    step = Step.random(arguments, num_tokens=19)
    for function in FUNCTIONS:
        step.kernel(function)
        ids, gates = (part.clone() for part in unpack(step.buffer_TLK))
        step.torch(function)
        expected_ids, expected_gates = unpack(step.buffer_TLK)
        apart = ((gates - expected_gates).float() / expected_gates.float()).abs().max().item()
        print(f"{function}: gates differ by {apart:.1e} of themselves")
        if not torch.equal(ids, expected_ids) or not apart <= 2**-10:
            sys.exit(f"{function}: kernel and torch form differ")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, choices=("cuda", "cpu"))
    parser.add_argument("--layers", type=int, help="default: 48, or 2 on a CPU")
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--json", help="file for the figures")
    arguments = parser.parse_args()
    if arguments.layers is None:
        arguments.layers = 48 if arguments.device == "cuda" else 2
    return arguments


def main() -> None:
    arguments = parse_arguments()
    if arguments.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
        check(arguments)
        print("The interpreter ran on a CPU: correctness only, no time is meant.")
        return
    rows = measure(arguments)
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump({"device": torch.cuda.get_device_name(), "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
