"""Seconds of each leg of a step, from stated rates: a plan's estimate, not a measurement."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..settings.config import RecipeConfig

GIGA = 1e9
TERA = 1e12
# Bytes of the combine weight that these capture levels keep beside each id.
WEIGHT_BYTES = {"weights": 4, "logits": 4}
# A backward pass costs two forwards; full recomputation adds one more forward.
FORWARDS_PER_UPDATE = {"none": 3.0, "moe": 4.0, "full": 4.0}


@dataclass(frozen=True, kw_only=True)
class ModelCost:
    """What a model costs per token and per copy.

    Args:
        forward_flops: Of a token of a mean sequence.
        checkpoint_bytes: Of the weights as they are published.
        route_slots: Experts per token, over all MoE layers.
        id_bytes: Of an expert id as it is stored.
    """

    forward_flops: float
    checkpoint_bytes: int
    route_slots: int
    id_bytes: int


@dataclass(frozen=True, kw_only=True)
class Leg:
    """One part of a step.

    Args:
        name: What is done.
        seconds: How long it takes.
        formula: The numbers that it follows from.
    """

    name: str
    seconds: float
    formula: str

    def text(self) -> str:
        """Return one line."""
        return f"{self.name} {self.seconds:.1f} s = {self.formula}"


def mean_tokens(config: RecipeConfig) -> tuple[int, int]:
    """Return the mean (prompt, response) tokens of a sequence."""
    response = config.plan.plan_response_tokens or config.rollout.max_new_tokens
    return config.plan.plan_prompt_tokens, min(response, config.rollout.max_new_tokens)


def legs(config: RecipeConfig, cost: ModelCost, num_server_gpus: int) -> Iterator[Leg]:
    """Yield the legs of a step, in their order."""
    p, batch = config.plan, config.batch_size
    prompt, response = mean_tokens(config)
    tokens = batch * (prompt + response)
    rate = p.plan_rollout_tokens_per_s
    yield Leg(
        name="rollout",
        seconds=batch * response / (num_server_gpus * rate),
        formula=f"{batch} x {response} tokens / ({num_server_gpus} GPUs x {rate:g} tokens/s)",
    )
    if config.replay.mode == "R3":
        yield _routes(config, cost, tokens)
    # pi_old's pass; the frozen reference's; every Nth step one more without replay.
    live = 1 / config.run.measure_live_every if config.run.measure_live_every else 0.0
    yield _passes(config, cost, "score", 1 + config.needs_reference + live, 1)
    forwards = FORWARDS_PER_UPDATE[config.training.recompute]
    yield _passes(config, cost, "update", forwards, config.num_mini_batches)
    yield _weights(config, cost.checkpoint_bytes / GIGA)


def _weights(config: RecipeConfig, gigabytes: float) -> Leg:
    p, num_servers = config.plan, max(1, config.plan.plan_server_nodes)
    if config.rollout.publish != "disk":
        return Leg(
            name="weights",
            seconds=gigabytes / p.plan_network_gb_per_s,
            formula=f"{gigabytes:.1f} GB, in buckets to {num_servers} servers "
            f"at {p.plan_network_gb_per_s:g} GB/s",
        )
    return Leg(
        name="weights",
        seconds=gigabytes * (1 + num_servers) / p.plan_disk_gb_per_s,
        formula=f"{gigabytes:.1f} GB x (1 write + {num_servers} reads) "
        f"/ {p.plan_disk_gb_per_s:g} GB/s",
    )


def step_seconds(config: RecipeConfig, steps: Sequence[Leg]) -> float:
    """Return the time of all legs: one after another, or with the rollout beside the training."""
    seconds = {leg.name: leg.seconds for leg in steps}
    if not config.rollout.ahead:
        return sum(seconds.values())
    rollout, weights = seconds.pop("rollout"), seconds.pop("weights")
    return max(rollout, sum(seconds.values())) + weights


def _passes(
    config: RecipeConfig, cost: ModelCost, name: str, forwards: float, num_schedules: int
) -> Leg:
    """The leg of all tokens' passes, in so many runs of the pipeline's schedule."""
    ranks, tflops = config.world_size, config.plan.plan_trainer_tflops
    prompt, response = mean_tokens(config)
    # Padded sequences are as long as the longest of their microbatch, at worst the longest.
    is_packed = config.training.microbatch_tokens > 0
    length = prompt + (response if is_packed else config.rollout.max_new_tokens)
    computed = config.batch_size * length
    fill = _fill(config, computed // num_schedules, length)
    stages = config.training.pipeline_parallel
    return Leg(
        name=name,
        seconds=computed * cost.forward_flops * forwards * fill / (ranks * tflops * TERA),
        formula=f"{computed} tokens x {cost.forward_flops:.3g} FLOP x {forwards:g} forwards "
        f"/ ({ranks} GPUs x {tflops:g} TFLOP/s)"
        + (f" x {fill:.2f} to fill {stages} stages" if stages > 1 else ""),
    )


def _fill(config: RecipeConfig, tokens: int, sequence_tokens: int) -> float:
    """Return the time of a schedule over that of its microbatches alone, with equal stages.

    Args:
        tokens: Of the schedule, over all data-parallel ranks.
        sequence_tokens: Of a sequence, padding included.
    """
    t = config.training
    model_ranks = t.tensor_parallel * t.pipeline_parallel * t.context_parallel
    microbatch = t.microbatch_tokens or t.microbatch_size * sequence_tokens
    per_rank = tokens * model_ranks / config.world_size
    num_microbatches = max(1, math.ceil(per_rank / max(1, microbatch)))
    return 1 + (t.pipeline_parallel - 1) / t.virtual_pipeline / num_microbatches


def _routes(config: RecipeConfig, cost: ModelCost, tokens: int) -> Leg:
    # The gates of the compared tokens, which add about a tenth, are left out.
    element = cost.id_bytes + WEIGHT_BYTES.get(config.telemetry.capture, 0)
    gigabytes = tokens * cost.route_slots * element / GIGA
    speed = config.plan.plan_disk_gb_per_s
    return Leg(
        name="routes",
        seconds=gigabytes * (1 + config.run.nnodes) / speed,
        formula=f"{gigabytes:.1f} GB x (1 write + {config.run.nnodes} reads) / {speed:g} GB/s",
    )
