"""Capture inside the model: expert ids, gate probabilities and sampled router logits.

It rides on SGLang's own capture, which already does the hard part: a preallocated device buffer
that is written inside the graph-capturable region, one asynchronous copy per step beside the other
results, and a host buffer indexed by KV slot, so that a radix-cache hit keeps its rows. Ours only
changes what is written and what is known about it:

- a slot of the int32 buffers holds the expert id in its upper and the gate probability, as float16
  bits, in its lower half: gates cost no byte more than stock's ids;
- beside each KV slot stands a stamp: origin and weight version of the forward that wrote it.
"""

from __future__ import annotations

import numpy as np
import torch

from ..routes import Origin

GATE_BITS = 16
GATE_MASK = (1 << GATE_BITS) - 1
# float16 bits of a quiet nan: no gate was captured for this slot.
NO_GATE = 0x7E00
NOT_WRITTEN = 0


def score_function(topk_config) -> str | None:
    """How this router scores its experts; None if it is the model's own function."""
    if topk_config.custom_routing_function is not None:
        return None
    if topk_config.use_grouped_topk and topk_config.correction_bias is not None:
        return "sigmoid"  # SGLang's biased grouped router, whatever the configuration says
    return topk_config.scoring_func


def gate_probs(
    router_logits_TE: torch.Tensor, expert_ids_TK: torch.Tensor, function: str
) -> torch.Tensor:
    """Probability of each selected expert over ALL experts, float32 [T, K].

    From the raw logits: bias, groups, renormalisation and scaling happen after them and never
    touch these. Sigmoid and sqrtsoftplus routers define no distribution; theirs is the score over
    the sum of all scores, as in `agreement.router_probs`.
    """
    # A padded row may carry any id; an index out of range would end the process on a GPU.
    ids_TK = expert_ids_TK.long().clamp(0, router_logits_TE.shape[1] - 1)
    logits_TE = router_logits_TE.float()
    if function == "softmax":
        total_T1 = logits_TE.logsumexp(-1, keepdim=True)
        return (logits_TE.gather(1, ids_TK) - total_T1).exp()
    if function == "sigmoid":
        scores_TE = logits_TE.sigmoid()
    else:
        scores_TE = torch.nn.functional.softplus(logits_TE).sqrt()
    return scores_TE.gather(1, ids_TK) / scores_TE.sum(-1, keepdim=True)


def pack(expert_ids_TK: torch.Tensor, gates_TK: torch.Tensor | None) -> torch.Tensor:
    """Ids and gates in one int32 [T, K]."""
    ids_TK = expert_ids_TK.int() << GATE_BITS
    if gates_TK is None:
        return ids_TK | NO_GATE
    # Rounding may not lift a probability above one or make a nan of it.
    bits_TK = gates_TK.clamp(0, 1).half().view(torch.int16).int()
    return ids_TK | (bits_TK & GATE_MASK)


def unpack(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ids (int32) and gates (float16, nan where there is none) of packed slots."""
    gates = (packed & GATE_MASK).astype(np.uint16).view(np.float16)
    return packed >> GATE_BITS, gates


class Stamps:
    """Origin and weight version of the forward that wrote each KV slot, in four bytes."""

    def __init__(self, num_slots: int):
        self.stamp_N = np.zeros(num_slots, np.int32)
        self.versions: list[int] = []

    def stamp(self, origin: Origin, weight_version: int) -> int:
        if not self.versions or self.versions[-1] != weight_version:
            self.versions.append(weight_version)
        return (len(self.versions) - 1) * len(Origin) + origin

    def origin(self, stamp_T: np.ndarray) -> np.ndarray:
        return (stamp_T % len(Origin)).astype(np.uint8)

    def weight_version(self, stamp_T: np.ndarray) -> np.ndarray:
        if not self.versions:
            return np.full(len(stamp_T), -1, np.int64)
        version_T = np.array(self.versions, np.int64)[stamp_T // len(Origin)]
        return np.where(stamp_T == NOT_WRITTEN, -1, version_T)


def parse_version(text) -> int:
    """A weight version as a number; -1 where nobody named it or it is none."""
    try:
        return int(text)
    except (TypeError, ValueError):
        return -1
