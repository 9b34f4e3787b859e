"""What `tools.bench.plan_step` trains on: a model with preferences, sequences, drawn routes."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recipes.minirl.rollout.batch import Batch, Sample
from recipes.model.tiny import tiny_config
from routing_replay.routes.routes import Routes
from routing_replay.routes.table import RouteTable

VOCAB = 128


def write_model(arguments: argparse.Namespace, folder: Path) -> None:
    """Write a random Qwen3-MoE whose routers prefer some experts.

    All embeddings share one direction, and each router has its own liking for it.
    """
    from transformers import Qwen3MoeForCausalLM

    torch.manual_seed(arguments.seed)
    config = tiny_config(
        layers=arguments.layers,
        hidden=arguments.hidden,
        experts=arguments.experts,
        top_k=arguments.top_k,
        vocab=VOCAB,
        expert_size=arguments.expert_size,
        initializer_range=0.02,
        max_position_embeddings=16 * arguments.length,
    )
    model = Qwen3MoeForCausalLM(config)
    direction_H = torch.nn.functional.normalize(torch.randn(arguments.hidden), dim=0)
    with torch.no_grad():
        embeddings: Any = model.get_input_embeddings()
        embeddings.weight.normal_().add_(arguments.hidden**0.5 * direction_H)
        for layer in model.model.layers:
            # The direction is about 0.7 of a normalised state, whose length is the root of hidden.
            liking_E = torch.randn(arguments.experts) * arguments.skew
            scale = 0.7 * arguments.hidden**0.5
            gate: Any = layer.mlp.gate
            gate.weight.normal_(std=arguments.hidden**-0.5)
            gate.weight.add_(liking_E[:, None] * direction_H / scale)
    model.save_pretrained(folder)


def random_batch(lengths_S: np.ndarray, seed: int) -> Batch:
    """Return sequences of random tokens, all sampled but the first."""
    generator = np.random.default_rng(seed)
    samples = []
    for length in lengths_S.tolist():
        tokens = generator.integers(VOCAB, size=length, dtype=np.int32)
        logp_mu = np.full(length - 1, -1.0, np.float32)
        samples.append(Sample(prompt_ids=tokens[:1], response_ids=tokens[1:], logp_mu=logp_mu))
    batch = Batch.from_samples(samples, 1)
    return replace(
        batch, advantages_S=torch.from_numpy(generator.normal(size=len(samples))).float()
    )


def random_lengths(arguments: argparse.Namespace, seed: int) -> np.ndarray:
    """Return log-normal lengths around `length`, at most four times as long."""
    generator = np.random.default_rng(seed)
    drawn_S = generator.lognormal(np.log(arguments.length), 0.5, arguments.sequences)
    lengths_S: np.ndarray = np.clip(drawn_S, 3, 4 * arguments.length).astype(np.int64)
    return lengths_S


def drawn_table(arguments: argparse.Namespace, lengths_S: np.ndarray, seed: int) -> RouteTable:
    """Return routes of four topics whose experts follow Zipf's law; see `plan.synthetic`."""
    generator = np.random.default_rng(seed)
    shape = (arguments.layers, arguments.experts)
    ranks_LE = np.argsort(np.random.default_rng(arguments.seed).random(shape), axis=1)
    ranks_PLE = np.argsort(np.random.default_rng(arguments.seed + 1).random((4, *shape)), axis=2)
    shares_E = np.arange(1, arguments.experts + 1) ** -float(arguments.skew)
    log_PLE = np.log(shares_E[ranks_LE] + shares_E[ranks_PLE])
    routes = []
    for length, topic in zip(
        lengths_S.tolist(), generator.integers(4, size=len(lengths_S)), strict=True
    ):
        # The largest of Gumbel noise and log-shares are draws without replacement.
        scores_TLE = log_PLE[topic] + generator.gumbel(size=(length - 1, *shape))
        ids_TLK = np.argsort(-scores_TLE, axis=2)[..., : arguments.top_k].astype(np.uint8)
        layers = tuple(range(arguments.layers))
        routes.append(Routes(expert_ids_TLK=ids_TLK, layers=layers, num_experts=arguments.experts))
    return RouteTable.from_routes(routes)
