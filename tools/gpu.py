"""Prove on one GPU what one GPU can prove: `make gpu`. THIS HAS NOT BEEN RUN ON A GPU YET.

Needs this repository, torch and the wheel of megatron-core (2.3 MB); neither a network, nor SGLang,
nor Transformer Engine. Each part fits ten minutes, and each is useful alone:

    python -m tools.gpu --part 1 --json gpu1.json

    1  Exactness. The replay matrix of one rank on CUDA, bitwise in deterministic mode: own routes,
       random routes row by row, recomputation in the autograd engine's device thread, packing,
       multi-token prediction, hybrids. Replay, recording and agreement under
       set_sync_debug_mode("error"). Resume in bfloat16 with the distributed optimizer.
    2  Time. Replay against live routing and Megatron's own replay; log-probs by chunk size; the
       metrics' share of a step.
    3  Kernels. The replay router and the gates of the capture in GB/s, in CUDA graphs, against
       torch's forms; on a CPU their results, in the interpreter.

What one GPU cannot prove: TP, EP, PP and DP above 1 on NCCL, DeepEP, Transformer Engine, FP8
grouped GEMMs, and a whole SGLang server. With `--device cpu` everything runs on the CPU with the
smallest sizes: a dry run of the scripts.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
TAIL_LINES = 30


@dataclass(frozen=True, kw_only=True)
class Command:
    """One command of a part.

    Args:
        name: In the results.
        arguments: Of this Python.
        quick: Arguments added with --device cpu.
        has_json: Whether it takes `--json FILE`.
        timeout_s: After this long it counts as failed, and the next one runs.
    """

    name: str
    arguments: tuple[str, ...]
    quick: tuple[str, ...] = ()
    has_json: bool = False
    timeout_s: int = 300


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a command ended."""

    name: str
    part: int
    command: str
    returncode: int | None
    seconds: float
    output: str
    figures: Any = None


def _tests(name: str, *arguments: str, timeout_s: int = 300) -> Command:
    command = ("-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments)
    return Command(name=name, arguments=command, timeout_s=timeout_s)


def _benchmark(name: str, module: str, *arguments: str) -> Command:
    command = ("-m", f"tools.bench.{module}", *arguments)
    return Command(name=name, arguments=command, quick=("--quick",), has_json=True)


PARTS: dict[int, tuple[Command, ...]] = {
    1: (_tests("exactness", "tests/test_gpu_replay.py", timeout_s=580),),
    2: (
        _benchmark(
            "replay, 16384 tokens",
            "replay",
            *("--tokens", "16384", "--layers", "4", "--hidden", "2048", "--expert-width", "768"),
        ),
        _benchmark("replay, 4096 tokens", "replay", "--tokens", "4096"),
        *(
            _benchmark(
                f"logprobs, {dtype}, {mib} MiB",
                "logprobs",
                *("--tokens", "16384", "--vocabulary", "75968"),
                *("--dtype", dtype, "--chunk-mib", str(mib)),
            )
            for dtype in ("bfloat16", "float32")
            for mib in (16, 64, 256)
        ),
        _benchmark("metrics", "metrics"),
    ),
    3: tuple(
        Command(
            name=f"{module}, {dtype}",
            arguments=("-m", f"tools.bench.{module}", "--dtype", dtype),
            quick=("--quick",),
            has_json=True,
        )
        for module in ("gates_kernel", "router_kernel")
        for dtype in ("bfloat16", "float32")
    ),
}


def run(command: Command, part: int, device: str) -> Outcome:
    """Run one command and return how it ended; a failure does not stop the others."""
    environment = os.environ | {"TORCHDYNAMO_DISABLE": "1", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    arguments = [sys.executable, *command.arguments]
    if device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
        if command.quick:  # the sizes in PARTS are for a GPU
            arguments = [*arguments[:3], *command.quick]
    with tempfile.TemporaryDirectory() as folder:
        figures = Path(folder) / "figures.json"
        if command.has_json:
            arguments += ["--json", str(figures)]
        started = time.monotonic()
        returncode, output = _output(arguments, environment, command.timeout_s)
        return Outcome(
            name=command.name,
            part=part,
            command=" ".join(["python", *arguments[1:]]),
            returncode=returncode,
            seconds=time.monotonic() - started,
            output=output,
            figures=json.loads(figures.read_text()) if figures.exists() else None,
        )


def _output(
    arguments: Sequence[str], environment: dict[str, str], timeout_s: int
) -> tuple[int | None, str]:
    """Return code (None: timed out) and the last lines of a process."""
    try:
        done = subprocess.run(
            arguments,
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_s,
        )
    except subprocess.TimeoutExpired as error:
        text = error.stdout or b""
        return None, _tail(text.decode() if isinstance(text, bytes) else text)
    return done.returncode, _tail(done.stdout)


def _tail(text: str) -> str:
    return "\n".join(text.splitlines()[-TAIL_LINES:])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the parts in order; 0 if every command succeeded."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--part", type=int, nargs="+", choices=sorted(PARTS), default=list(PARTS))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--json", type=Path, metavar="FILE", default=Path("gpu.json"))
    parsed = parser.parse_args(argv)
    if parsed.device == "cuda" and not _has_cuda():
        parser.error("there is no CUDA device: expected one GPU. --device cpu is a dry run")
    outcomes = []
    for part in parsed.part:
        for command in PARTS[part]:
            outcome = run(command, part, parsed.device)
            outcomes.append(outcome)
            state = "ok" if outcome.returncode == 0 else f"FAILED ({outcome.returncode})"
            print(f"part {part}: {command.name}: {state}, {outcome.seconds:.0f} s", flush=True)
            if outcome.returncode != 0:
                print(outcome.output, flush=True)
            # Written after each command: what was measured survives a lost machine.
            record = {"device": parsed.device, "results": [asdict(o) for o in outcomes]}
            parsed.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return int(any(outcome.returncode != 0 for outcome in outcomes))


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


if __name__ == "__main__":
    sys.exit(main())
