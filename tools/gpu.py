"""Prove on one GPU what one GPU can prove: `make gpu`. THIS HAS NOT BEEN RUN ON A GPU YET.

Needs this repository, torch with Triton, transformers, safetensors, pytest, and the wheel of
megatron-core (2.3 MB); neither a network, nor SGLang, nor Transformer Engine. Each part fits ten
minutes on an H100 or H200, and each is useful alone:

    python -m tools.gpu --part 1 --json gpu1.json
    python -m tools.gpu_page gpu1.json gpu2.json --output docs/measurements/DATE-gpu.md

    1  Exactness. The replay matrix of one rank on CUDA, bitwise in deterministic mode: own routes,
       random routes row by row, recomputation in the autograd engine's device thread, packing,
       multi-token prediction, hybrids. Replay, recording and agreement under
       set_sync_debug_mode("error"): they never wait for the device. How many passes repeat bitwise
       without deterministic mode. Resume in bfloat16 with the distributed optimizer. Microbatches
       that overlap as in an interleaved pipeline, their recomputations by hand.
    2  CUDA graphs. Capture of ids and gates, by torch and by the kernel, over 1,000 steps with
       padding rows, graphs of three sizes in one pool and copies on a second stream, every row
       compared; the replay router likewise. Routers of a model in graphs: every microbatch
       dispatches its own rows, also where backwards come late. SGLang's own select_experts, where
       SGLang is installed.
    3  Time. Replay against live routing and Megatron's own replay; log-probs by chunk size; the
       metrics' share of a step; recording's copies; permutation, its noise and error; the local
       spec's attention against a causal kernel.
    4  Kernels and memory. The replay router and the gates of the capture against the limit of the
       memory's bandwidth and against torch's forms; a profiler's trace of a replayed microbatch;
       the plan's memory estimate against what is allocated.

What one GPU cannot prove: TP, EP, PP and DP above 1 on NCCL, DeepEP, Transformer Engine, FP8
grouped GEMMs, and a whole SGLang server. With `--dry-run` everything runs on the CPU with the
smallest sizes, kernels in Triton's interpreter, and no figure means anything.
"""

from __future__ import annotations

import argparse
import datetime
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
# A CPU that others use too is that much slower than the machine of the time limits.
DRY_RUN_PATIENCE = 6


@dataclass(frozen=True, kw_only=True)
class Command:
    """One command of a part.

    Args:
        name: In the results.
        arguments: Of this Python.
        quick: Arguments that replace the sizes in a dry run.
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


def _tests(name: str, file: str, names: str = "", quick: str = "", timeout_s: int = 300) -> Command:
    """A command that runs the tests of a file whose names match; in a dry run those of `quick`."""
    # Warnings of engines would fill what is kept of the output.
    command = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore", file)
    selection = ("-k", names) if names else ()
    return Command(
        name=name,
        arguments=(*command, *selection),
        quick=(*command[2:], "-k", quick) if quick else (),
        timeout_s=timeout_s,
    )


def _benchmark(name: str, module: str, *arguments: str) -> Command:
    command = ("-m", f"tools.bench.{module}", *arguments)
    return Command(name=name, arguments=command, quick=("--quick",), has_json=True)


_LAYERS = ("--layers", "4", "--hidden", "2048", "--expert-width", "768")
_VOCABULARY = ("--tokens", "16384", "--vocabulary", "75968")
# One of each kind: the whole matrix takes a CPU half an hour, and `make test-matrix` runs it.
_FEW_CASES = (
    "recompute_full-packed or recompute_moe-sigmoid_bias-padded or padded-mtp or "
    "recompute_full-groups-padded-latent or padded-hybrid"
)
_REPLAY, _GRAPHS = "tests/test_gpu_replay.py", "tests/test_gpu_graphs.py"
PARTS: dict[int, tuple[Command, ...]] = {
    1: (
        _tests("replay matrix", _REPLAY, "deterministic", quick=_FEW_CASES, timeout_s=400),
        _tests("syncs, noise, resume", _REPLAY, "not deterministic"),
        _tests("pipelines by hand", _GRAPHS, "pipelines"),
    ),
    2: (
        _tests("captured rows", "tests/test_gpu_capture.py"),
        _tests("routers in graphs", _GRAPHS, "not pipelines"),
    ),
    3: (
        _benchmark("replay, 16384 tokens", "replay", "--tokens", "16384", *_LAYERS),
        _benchmark("replay, 4096 tokens", "replay", "--tokens", "4096"),
        *(
            _benchmark(
                f"logprobs, {dtype}, {mib} MiB",
                "logprobs",
                *_VOCABULARY,
                *("--dtype", dtype, "--chunk-mib", str(mib)),
            )
            for dtype in ("bfloat16", "float32")
            for mib in (16, 64, 256)
        ),
        _benchmark("metrics", "metrics"),
        _benchmark("recording", "recording"),
        _benchmark("permute", "permute"),
        _benchmark("attention", "attention"),
    ),
    4: (
        *(
            _benchmark(f"{module}, {dtype}", module, "--dtype", dtype)
            for module in ("gates_kernel", "router_kernel")
            for dtype in ("bfloat16", "float32")
        ),
        _benchmark("trace", "trace", "--trace", "gpu-trace.json"),
        _benchmark("memory", "memory"),
        _benchmark("memory without recomputation", "memory", "--recompute", "none"),
    ),
}


def run(command: Command, part: int, is_dry: bool) -> Outcome:
    """Run one command and return how it ended; a failure does not stop the others."""
    environment = os.environ | {"TORCHDYNAMO_DISABLE": "1", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    arguments = [sys.executable, *command.arguments]
    if is_dry:
        environment["CUDA_VISIBLE_DEVICES"] = ""
        if command.quick:  # the sizes in PARTS are for a GPU
            arguments = [*arguments[:3], *command.quick]
    shown = ["python", *arguments[1:]]
    with tempfile.TemporaryDirectory() as folder:
        figures = Path(folder) / "figures.json"
        if command.has_json:
            arguments += ["--json", str(figures)]
        started = time.monotonic()
        timeout_s = command.timeout_s * (DRY_RUN_PATIENCE if is_dry else 1)
        returncode, output = _output(arguments, environment, timeout_s)
        return Outcome(
            name=command.name,
            part=part,
            command=" ".join(shown),
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
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, smallest sizes")
    parser.add_argument("--json", type=Path, metavar="FILE", default=Path("gpu.json"))
    parsed = parser.parse_args(argv)
    if not parsed.dry_run and not _has_cuda():
        parser.error("there is no CUDA device: expected one GPU, or --dry-run")
    outcomes = []
    for part in parsed.part:
        for command in PARTS[part]:
            outcome = run(command, part, parsed.dry_run)
            outcomes.append(outcome)
            state = "ok" if outcome.returncode == 0 else f"FAILED ({outcome.returncode})"
            print(f"part {part}: {command.name}: {state}, {outcome.seconds:.0f} s", flush=True)
            if outcome.returncode != 0:
                print(outcome.output, flush=True)
            # Written after each command: what was measured survives a lost machine.
            record = {"is_dry": parsed.dry_run, "date": f"{datetime.date.today()}"}
            record |= {"results": [asdict(o) for o in outcomes]}
            parsed.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return int(any(outcome.returncode != 0 for outcome in outcomes))


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


if __name__ == "__main__":
    sys.exit(main())
