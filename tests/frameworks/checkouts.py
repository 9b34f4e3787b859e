"""Frameworks that no package index has: their checkouts, and runs of a script beside them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).parent
ROOT = FOLDER.parent.parent
VARIABLES = {
    "slime": "ROUTING_REPLAY_SLIME",
    "miles": "ROUTING_REPLAY_MILES",
    "nemo_rl": "ROUTING_REPLAY_NEMO_RL",
}
# What they import on the way to a training step and a CPU does not need.
MISSING = {
    "nemo_rl": ("mlflow", "swanlab", "wandb", "matplotlib", "soundfile", "pynvml"),
    "slime": ("sglang", "sglang_router", "memray", "deep_ep", "torch_memory_saver"),
    "miles": (
        *("sglang", "sglang_router", "memray", "deep_ep", "torch_memory_saver", "mooncake"),
        *("torchft", "polars", "psycopg", "ring_flash_attn", "kubernetes_asyncio"),
    ),
}


def checkout_of(package: str) -> str:
    """Return the folder of a checkout, or skip the test and say how to run it."""
    variable = VARIABLES[package]
    if variable not in os.environ:
        pytest.skip(f"{variable}=CHECKOUT make test-frameworks runs it (docs/adopt/{package}.md)")
    return os.environ[variable]


def run(
    script: str, folder: Path, num_ranks: int, options: dict[str, Any], **variables: str
) -> tuple[list[dict[str, Any]], str]:
    """Run a script of this folder on some ranks; return what each rank saved, and the output."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "options.json"
    path.write_text(json.dumps(options | {"folder": str(folder)}))
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *launcher, str(FOLDER / script), str(path)],
        env=os.environ
        | {
            "PYTHONPATH": f"{ROOT}:{FOLDER}",
            "OMP_NUM_THREADS": "1",
            "TORCHDYNAMO_DISABLE": "1",
            "HF_HUB_OFFLINE": "1",
            "CUDA_DEVICE_MAX_CONNECTIONS": "1",  # Megatron asks for it beside TP and CP
        }
        | variables,
        capture_output=True,
        text=True,
        timeout=600,
    )
    output = done.stdout + done.stderr
    files = [folder / f"rank{rank}.pt" for rank in range(num_ranks)]
    saved = [torch.load(file, weights_only=False) for file in files if file.exists()]
    assert done.returncode or len(saved) == num_ranks, output[-3000:]
    return saved, output
