"""Our objectives in slime and miles: `--loss-type custom_loss`, and

    --custom-loss-function-path routing_replay.adapters.slime_loss.loss

Keys of `--custom-config-path`: `replay_objective` (minirl) and `replay_objective_parameters`.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from typing import Any

import torch
from megatron.core import parallel_state

from .. import objectives
from ..errors import ConfigError
from ..objectives import Denominators, LossInputs, Objective

# Modules of their log-probs and of their context slices.
MODULES = {
    "slime": ("slime.backends.megatron_utils.loss", "slime.backends.megatron_utils.cp_utils"),
    "miles": (
        "miles.backends.training_utils.loss_hub.logit_processors",
        "miles.backends.training_utils.cp_utils",
    ),
}
TOKEN_MEAN = "token-mean"
# They divide the sum of all microbatches and ranks by the step's rollouts, or by its tokens.
UNDIVIDED = {"num_sequences": 1, "num_tokens": 1}


def loss(
    args: Any,
    batch: dict[str, Any],
    logits: torch.Tensor,
    sum_of_sample_mean: Callable[[torch.Tensor], torch.Tensor],
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return an objective's loss of a microbatch, and metrics, both as their loss hook has them.

    Raises:
        ConfigError: An aggregation that is not theirs: `token-mean` goes with
            --calculate-per-token-loss, the others without.
    """
    objective = _objective(args)
    package = next(p for p in MODULES if f"{p}.backends.megatron_utils.model" in sys.modules)
    processors, slices = (importlib.import_module(name) for name in MODULES[package])
    lengths = {name: batch[name] for name in ("total_lengths", "response_lengths")}
    padded = {"max_seq_lens": batch["max_seq_lens"]} if batch.get("max_seq_lens") else {}
    _, scores = processors.get_log_probs_and_entropy(
        logits,
        args=args,
        unconcat_tokens=batch["unconcat_tokens"],
        with_entropy="entropy_T" in objective.needs,
        **lengths,
        **padded,
    )
    layout = [["bshd", n] for n in padded.get("max_seq_lens", ())] or [[]] * len(
        batch["loss_masks"]
    )
    parts = zip(batch["loss_masks"], *lengths.values(), layout, strict=False)
    masks = [slices.slice_log_prob_with_cp(m, t, r, *where) for m, t, r, where in parts]
    outputs = objective(_inputs(args, batch, scores, masks))
    kept = sum_of_sample_mean(outputs.kept_T.to(logits.dtype))
    # A microbatch without a token in the loss must reach the model's collectives all the same.
    total = outputs.loss + 0 * logits.sum()
    return total, {"loss": total.detach().clone(), "kept_fraction": kept}


def _objective(args: Any) -> Objective:
    name = getattr(args, "replay_objective", "minirl")
    objective = objectives.get(name, **getattr(args, "replay_objective_parameters", {}))
    how = objective.parameters.aggregation
    if (how == TOKEN_MEAN) != args.calculate_per_token_loss:
        raise ConfigError(
            f"the aggregation of objective {name!r} is not the job's",
            expected=f"{TOKEN_MEAN} with --calculate-per-token-loss, another without",
            got=how,
            fix="Set replay_objective_parameters: {aggregation: ...}, or the flag",
        )
    return objective


def _inputs(
    args: Any, batch: dict[str, Any], scores: dict[str, Any], masks: list[torch.Tensor]
) -> LossInputs:
    theta = scores["log_probs"]
    device = theta[0].device
    joined = functools.partial(torch.cat, dim=0)
    old = batch.get("log_probs") or [part.detach() for part in theta]
    has_context = parallel_state.get_context_parallel_world_size() > 1
    sizes = torch.tensor([len(part) for part in theta], device=device)
    return LossInputs(
        logp_theta_T=joined(theta),
        logp_old_T=joined(old),
        logp_mu_T=joined(batch.get("rollout_log_probs") or old),
        advantages_T=joined(batch["advantages"]),
        mask_T=joined(masks).to(device).bool(),
        sequence_T=torch.arange(len(theta), device=device).repeat_interleave(sizes),
        num_sequences=len(theta),
        denominators=Denominators(**UNDIVIDED, max_length=args.rollout_max_response_len),
        lengths_S=torch.stack([mask.sum() for mask in batch["loss_masks"]]).to(device),
        context_group=parallel_state.get_context_parallel_group() if has_context else None,
        logp_ref_T=joined(batch["ref_log_probs"]) if batch.get("ref_log_probs") else None,
        entropy_T=joined(scores["entropy"]) if "entropy" in scores else None,
    )
