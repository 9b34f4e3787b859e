"""The plan's estimate of a trainer's memory against what one GPU allocates.

    python -m tools.bench.memory [--layers 4] [--hidden 1024] [--tokens 8192] [--recompute full]

A Qwen3-MoE with bfloat16 weights, float32 gradients and AdamW runs two steps with R3, as the recipe
trains it; `torch.cuda.max_memory_allocated` is taken over the second. The plan assumes balanced
experts, and the routes here are drawn, which are. On a CPU the model runs, and nothing is measured.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from recipes.minirl.policy.models import make_optimizer
from recipes.minirl.settings.sections import TrainingSettings
from recipes.model import memory, parallel
from recipes.model.model import ModelConfig, build_model, transformer_config
from recipes.model.tiny import tiny_config
from routing_replay.config import ReplayConfig
from routing_replay.megatron import attach
from routing_replay.objectives.logprobs import token_logprobs
from routing_replay.routes.table import RouteTable

from .paired import device, finish, is_too_much, parse, parser

# isort: split
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.transformer.module import Float16Module


def model_config(arguments: argparse.Namespace) -> ModelConfig:
    """Return Megatron's configuration of the model."""
    hf = tiny_config(
        layers=arguments.layers,
        hidden=arguments.hidden,
        experts=arguments.experts,
        top_k=arguments.top_k,
        vocab=arguments.vocabulary,
        heads=max(2, arguments.hidden // 64),
        expert_size=arguments.expert_width,
        max_position_embeddings=arguments.tokens,
    )
    return transformer_config(
        hf,
        parallel.ParallelLayout(),
        dtype=torch.bfloat16,
        recompute=arguments.recompute,
        spec=arguments.spec,
    )


def allocated() -> int:
    """Return the bytes that torch holds on the GPU; 0 on a CPU."""
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


class Trainer:
    """A model and its optimizer; `grown` has the bytes that each part took.

    Args:
        arguments: Sizes.
    """

    def __init__(self, arguments: argparse.Namespace):
        self.arguments, self.config = arguments, model_config(arguments)
        self.layout, self.grown, before = parallel.ParallelLayout(), {}, allocated()
        (chunk,) = build_model(self.config, self.layout)
        wrapped = Float16Module(self.config, chunk)
        self.grown["weights"], before = allocated() - before, allocated()
        ddp = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True, use_distributed_optimizer=True
        )
        self.chunk = DistributedDataParallel(self.config, ddp, wrapped)
        self.grown["gradients"], before = allocated() - before, allocated()
        settings = TrainingSettings(distributed_optimizer=True)
        self.optimizer = make_optimizer([self.chunk], settings, torch.bfloat16)
        self.replay = attach([self.chunk], ReplayConfig(mode="R3", agreement_every=0))
        self.step()  # the optimizer makes its states in the first
        self.grown["optimizer"] = allocated() - before

    def step(self) -> None:
        """Train on one sequence with drawn routes."""
        num_tokens = self.arguments.tokens
        tokens_1T = torch.arange(num_tokens, device=device()).unsqueeze(0)
        tokens_1T = tokens_1T % self.arguments.vocabulary
        positions_1T = torch.arange(num_tokens, device=device()).unsqueeze(0)
        table = self._drawn(num_tokens)
        self.chunk.zero_grad_buffer()
        with self.replay.replaying(table):
            with self.replay.microbatch(torch.from_numpy(table.rows(0, num_tokens))[None]):
                logits_1TV = self.chunk(tokens_1T, positions_1T, None, fp32_output=False)
            scores = token_logprobs(logits_1TV[0], tokens_1T[0], reuse_logits=True)
            (-scores.logp_T.mean()).backward()
        del logits_1TV
        self.chunk.finish_grad_sync()
        self.optimizer.step()

    def _drawn(self, num_tokens: int) -> RouteTable:
        shape = self.replay.shape
        table = RouteTable.empty(shape, [num_tokens], source="rollout")
        scores = np.random.default_rng(0).random((table.num_rows, shape.num_experts))
        table.expert_ids_LTK[:] = scores.argsort(-1)[None, :, : shape.top_k]
        table.covered_T[:] = True
        return table


def main(argv: Sequence[str] | None = None) -> None:
    """Print estimate and measurement of every part."""
    made = parser(__doc__)
    sizes = {"layers": 4, "hidden": 1024, "experts": 64, "expert-width": 512, "tokens": 8192}
    for name, default in (sizes | {"vocabulary": 75968, "top-k": 8}).items():
        made.add_argument(f"--{name}", type=int, default=default)
    made.add_argument("--recompute", choices=("none", "full"), default="full")
    made.add_argument("--spec", choices=("auto", "te", "local"), default="local")
    quick = {"layers": 1, "hidden": 64, "experts": 16, "expert_width": 64, "tokens": 64}
    arguments = parse(made, argv, quick | {"vocabulary": 128})
    if is_too_much(arguments):
        return
    parallel.initialize(parallel.ParallelLayout(), seed=1)
    figures = compare(arguments)
    print(f"| part | estimated, MiB | measured, MiB |\n| {'--- | ' * 3}")
    for name, (estimated, measured) in figures.items():
        print(f"| {name} | {estimated / 2**20:.1f} | {measured / 2**20:.1f} |")
    if not torch.cuda.is_available():
        print("A CPU has no device memory: it ran, and nothing was measured.")
    finish("memory", arguments, figures)
    parallel.destroy()


def compare(arguments: argparse.Namespace) -> dict[str, tuple[int, int]]:
    """Return (estimated, measured) bytes of every part."""
    trainer = Trainer(arguments)
    workload = memory.Workload(
        num_ranks=1,
        microbatch_tokens=arguments.tokens,
        distributed_optimizer=True,
        fp32_logits=False,
    )
    estimate = memory.estimate(trainer.config, trainer.layout, workload)
    before, peak = allocated(), 0
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    trainer.step()
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated() - before
    figures: dict[str, Any] = {
        name: (getattr(estimate, name), measured) for name, measured in trainer.grown.items()
    }
    passing = estimate.activations + estimate.logits + estimate.routes
    figures["activations, logits, routes"] = passing, peak
    figures["all"] = estimate.total, peak + sum(trainer.grown.values())
    return figures


if __name__ == "__main__":
    main()
