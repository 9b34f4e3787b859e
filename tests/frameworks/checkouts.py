"""Frameworks that no package index has: the folders of their checkouts, named by variables."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import stand_ins

ROOT = Path(__file__).parent.parent.parent
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


def named() -> list[str]:
    """Return the packages whose checkouts are named."""
    return [package for package, variable in VARIABLES.items() if variable in os.environ]


def put_on_path(package: str) -> None:
    """Let this process import a checkout; end it if none is named."""
    if package not in named():
        sys.exit(f"{VARIABLES[package]} names no checkout (docs/adopt/{package}.md)")
    stand_ins.prepare(*MISSING[package])
    if os.environ[VARIABLES[package]] not in sys.path:
        sys.path.insert(0, os.environ[VARIABLES[package]])
