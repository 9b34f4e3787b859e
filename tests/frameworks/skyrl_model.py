"""SkyRL's real MegatronModelWrapper around a tiny model of ours, on CPUs."""

from __future__ import annotations

import contextlib
import zlib
from typing import Any

import stand_ins
import tiny_batch
import torch

stand_ins.prepare()
stand_ins.name_what_skyrl_expects_of_a_newer_bridge()

# isort: split
from megatron.core.transformer.moe.router_replay import RouterReplay  # noqa: E402
from skyrl.backends.skyrl_train.utils import ppo_utils  # noqa: E402
from skyrl.backends.skyrl_train.utils.packed_tensor import PackedTensor  # noqa: E402
from skyrl.backends.skyrl_train.workers.megatron import megatron_model_wrapper  # noqa: E402
from skyrl.train.config import TrainerConfig  # noqa: E402

from recipes.model.model import build_model, transformer_config  # noqa: E402
from recipes.model.parallel import ParallelLayout  # noqa: E402
from routing_replay.adapters import skyrl, skyrl_losses  # noqa: E402

NAMES = (
    "get_forward_backward_func",
    "setup_per_microbatch_replay_forward",
    "setup_per_microbatch_replay_backward",
    "router_replay_schedule",
)
skyrl_losses.register(ppo_utils)


@contextlib.contextmanager
def patched():
    """Within: SkyRL's worker with our adapter; afterwards SkyRL's own functions again."""
    stock = {name: getattr(megatron_model_wrapper, name) for name in NAMES}
    skyrl.patch_wrapper(megatron_model_wrapper)
    try:
        yield
    finally:
        for name, function in stock.items():
            setattr(megatron_model_wrapper, name, function)


def wrapper(
    checkpoint: str, layout: ParallelLayout, packed: bool, loss: str = "routing_replay/grpo"
) -> Any:
    """SkyRL's wrapper; its model has the same weights in every layout."""
    RouterReplay.global_router_replay_instances.clear()
    config = transformer_config(
        checkpoint, layout, variable_seq_lengths=True, moe_enable_routing_replay=True
    )
    chunks = build_model(config, layout)
    for chunk in chunks:
        for name, parameter in sorted(chunk.named_parameters()):
            seed = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=seed)
    settings = TrainerConfig()
    settings.remove_microbatch_padding = packed
    settings.algorithm.use_kl_loss = False
    loss_fn = ppo_utils.PolicyLossRegistry.get(loss)
    return megatron_model_wrapper.MegatronModelWrapper(settings, chunks, policy_loss_fn=loss_fn)


def micro_batches(
    size: int, routed: list[torch.Tensor] | None, tokens: list[torch.Tensor] | None = None
) -> list[dict[str, Any]]:
    """The left-padded sequences in microbatches, as SkyRL's worker builds them."""
    tokens = tiny_batch.sequences(0) if tokens is None else tokens
    width = max(map(len, tokens))
    result = []
    for start in range(0, len(tokens), size):
        part = tokens[start : start + size]
        mask, without = (torch.zeros(len(part), width, dtype=torch.int64) for _ in range(2))
        ids = torch.zeros_like(mask)
        segments = []
        for row, sequence in enumerate(part):
            mask[row, -len(sequence) :] = 1
            ids[row, -len(sequence) :] = sequence
            if routed is not None:
                segment = routed[start + row].clone()
                is_missing = ~segment.any(2).any(1)
                without[row, -len(sequence) :] = is_missing.long()
                segment[is_missing] = torch.arange(segment.shape[-1], dtype=segment.dtype)
                segments.append(segment)
        actions = width - 1
        noise = torch.Generator().manual_seed(start)
        result.append(
            {
                "sequences": ids,
                "attention_mask": mask,
                "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
                "num_actions": actions,
                "old_action_log_probs": -4 * torch.rand(len(part), actions, generator=noise),
                "rollout_action_logprobs": -4 * torch.rand(len(part), actions, generator=noise),
                "base_action_log_probs": None,
                "advantages": torch.randn(len(part), 1, generator=noise).expand(-1, actions),
                "loss_mask": (mask[:, 1:] * mask[:, :-1]).float(),
                "response_mask": mask[:, 1:] * mask[:, :-1],
                "num_microbatches": -(-len(tokens) // size),
                "rollout_expert_indices": PackedTensor.from_segments(segments)
                if segments
                else None,
                "router_padding_mask": (without + (1 - mask) > 0) if segments else None,
            }
        )
    return result


def log_probs(made: Any, batches: list[dict[str, Any]]) -> torch.Tensor | None:
    """Of the real tokens; None on a stage without outputs."""
    from megatron.core import parallel_state

    size, width = batches[0]["sequences"].shape
    with torch.no_grad():
        values = made.forward(batches, width, size)
    if not parallel_state.is_pipeline_last_stage(ignore_virtual=True):
        return None
    masks = torch.cat([b["attention_mask"][:, 1:] * b["attention_mask"][:, :-1] for b in batches])
    return values[masks[:, -values.shape[1] :].bool()]


def gradients(made: Any, *mini_batches: list[dict[str, Any]]) -> tuple[dict[str, Any], list[Any]]:
    """Gradients of mini-batches by parameter name, and SkyRL's metrics of the last one's parts."""
    for chunk in made.actor_module:
        chunk.zero_grad()
    for batches in mini_batches:
        size, width = batches[0]["sequences"].shape
        # SkyRL takes fields out of a microbatch as it reads them.
        copies = [dict(micro) for micro in batches]
        metrics = made.forward_backward_mini_batch(copies, width, size)
    named = {
        f"{number}.{name}": parameter.grad.clone()
        for number, chunk in enumerate(made.actor_module)
        for name, parameter in chunk.named_parameters()
        if parameter.grad is not None
    }
    return named, metrics
