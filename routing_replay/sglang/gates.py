"""Capture inside the model: expert ids, gate probabilities and sampled router logits.

It rides on SGLang's own capture, which already does the hard part: a preallocated device buffer
that is written inside the graph-capturable region, one asynchronous copy per step beside the other
results, and a host buffer indexed by KV slot, so that a radix-cache hit keeps its rows. Ours only
changes what is written:

- a slot of the int32 device buffer holds the expert id in its upper and the gate probability, as
  float16 bits, in its lower half: gates cost no byte more than stock's ids;
- what goes to the host is compact: one byte or two for an id, two for a gate (`slots`).
"""

from __future__ import annotations

from typing import Any

import torch

GATE_BITS = 16
# float16 bits of a quiet nan: no gate was captured for this slot.
NO_GATE = 0x7E00


def score_function(topk_config: Any) -> str | None:
    """Return how this router scores its experts; None if it is the model's own function."""
    if topk_config.custom_routing_function is not None:
        return None
    if topk_config.use_grouped_topk and topk_config.correction_bias is not None:
        return "sigmoid"  # SGLang's biased grouped router ignores scoring_func
    return str(topk_config.scoring_func)


def gate_probs(
    router_logits_TE: torch.Tensor, expert_ids_TK: torch.Tensor, function: str
) -> torch.Tensor:
    """Probability of each selected expert over ALL experts, float32 [T, K].

    From the raw logits: bias, groups, renormalisation and scaling happen after them and never
    touch these. Sigmoid and sqrtsoftplus routers define no distribution; theirs is the score over
    the sum of all scores, as in `agreement.router_probs`.
    """
    # A padded row may carry any id; an index out of range would end the process on a GPU.
    ids_TK = expert_ids_TK.clamp(0, router_logits_TE.shape[1] - 1).long()
    if function == "softmax":
        # One kernel, where logsumexp is six: this runs once per layer and step.
        probs_TE = router_logits_TE.softmax(-1, dtype=torch.float32)
        return probs_TE.gather(1, ids_TK)
    logits_TE = router_logits_TE.float()
    if function == "sigmoid":
        scores_TE = logits_TE.sigmoid()
    else:
        scores_TE = torch.nn.functional.softplus(logits_TE).sqrt()
    return scores_TE.gather(1, ids_TK) / scores_TE.sum(-1, keepdim=True)


def pack(expert_ids_TK: torch.Tensor, gates_TK: torch.Tensor | None) -> torch.Tensor:
    """Ids and gates in one int32 [T, K]."""
    if gates_TK is None:
        return (expert_ids_TK.int() << GATE_BITS) | NO_GATE
    packed_TK = expert_ids_TK.new_empty(expert_ids_TK.shape, dtype=torch.int32)
    # The low half comes first in memory. Two copies that convert, instead of shifts and masks.
    halves_TK2 = packed_TK.view(torch.int16).view(*packed_TK.shape, 2)
    halves_TK2[..., 1] = expert_ids_TK
    halves_TK2.view(torch.float16)[..., 0] = gates_TK
    return packed_TK


def unpack(packed_TLK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids (int16) and gates (float16, nan where there is none) of packed slots; views."""
    halves_TLK2 = packed_TLK.view(torch.int16).view(*packed_TLK.shape, 2)
    return halves_TLK2[..., 1], halves_TLK2.view(torch.float16)[..., 0]


def parse_version(text: str | int | None) -> int:
    """Return a weight version as a number; -1 if it has no name or one that is no number."""
    try:
        return int(text)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return -1
