"""Packaging of routing_replay (tool settings: pyproject.toml; tested pins: constraints.txt)."""

from pathlib import Path

from setuptools import find_packages, setup

SGLANG = ["sglang>=0.5.12,<0.6"]
MEGATRON = ["megatron-core>=0.16.1,<0.20"]
# The client speaks HTTP through httpx, so that a trainer needs no SGLang installed.
RECIPE = [
    "httpx",
    "math-verify[antlr4_13_2]",
    "pyyaml",
    "tensorboard",
    "tqdm",
    "transformers>=5.0",
]

setup(
    name="routing_replay",
    version="0.1.0",
    description="Replays and measures MoE expert routing from SGLang rollouts in Megatron training",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    python_requires=">=3.10",
    packages=find_packages(include=["routing_replay", "routing_replay.*"]),
    package_data={
        "routing_replay.report": ["*.html", "*.css", "*.js"],
    },
    install_requires=["torch>=2.6", "numpy>=1.26", "safetensors>=0.4.5"],
    extras_require={
        "sglang": SGLANG,
        "megatron": MEGATRON,
        "te": ["transformer-engine[pytorch]>=2.6"],
        "recipe": RECIPE,
        "test": ["mypy", "pytest", "pytest-timeout", "ruff"],
    },
    entry_points={
        "console_scripts": ["routing-replay = routing_replay.cli:main"],
        "sglang.srt.plugins": ["routing_replay = routing_replay.sglang.plugin:register"],
    },
)
