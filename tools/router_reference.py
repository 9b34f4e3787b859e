"""An independent forward of a checkpoint in transformers, router by router."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from routing_replay.routes.routes import Routes

# Router logits this close to each other may change places by rounding.
TIE = 1e-3


class Reference:
    """A model and its routers, in float32.

    Args:
        checkpoint: A Hugging Face folder.
    """

    def __init__(self, checkpoint: str | Path):
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
        self._inputs: list[tuple[Any, torch.Tensor]] = []
        self.chosen: list[Any] = []  # the last forward's ids [T, K], per router
        self._ties_TLK: torch.Tensor | None = None
        for name, module in self.model.named_modules():
            if name.endswith("mlp.gate"):
                module.register_forward_hook(self._note)

    def _note(self, gate: Any, arguments: Any, output: Any) -> Any:
        self._inputs.append((gate, arguments[0]))
        if self._ties_TLK is not None:
            output = self._with_ties(gate, self._ties_TLK[:, len(self.chosen)], *output)
        self.chosen.append(output[-1] if isinstance(output, tuple) else None)
        return output

    @staticmethod
    def _with_ties(
        gate: Any,
        theirs_TK: torch.Tensor,
        logits_TE: torch.Tensor,
        scores_TK: torch.Tensor,
        ids_TK: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The router's output with their experts where these are within rounding of its own."""
        is_known_T = (theirs_TK >= 0).all(-1)
        theirs_TK = theirs_TK.clamp(min=0)
        lowest_T, their_lowest_T = (
            logits_TE.gather(-1, ids).amin(-1) for ids in (ids_TK, theirs_TK)
        )
        is_tie_T1 = (is_known_T & (their_lowest_T >= lowest_T - TIE))[:, None]
        their_scores_TK = logits_TE.float().softmax(-1).gather(-1, theirs_TK)
        if gate.norm_topk_prob:
            their_scores_TK = their_scores_TK / their_scores_TK.sum(-1, keepdim=True)
        scores_TK = torch.where(is_tie_T1, their_scores_TK.to(scores_TK.dtype), scores_TK)
        return logits_TE, scores_TK, torch.where(is_tie_T1, theirs_TK, ids_TK)

    @torch.no_grad()
    def __call__(
        self, tokens: Sequence[int], past: Any = None, routes: Routes | None = None
    ) -> tuple[np.ndarray, np.ndarray, Any]:
        """Router logits [T, L, E] and log-probs [T, V] of `tokens`, and the cache after them.

        A tie goes the way of the last tokens' `routes`: one that went the other way would give
        this token's later layers, and all later tokens, other inputs.
        """
        self._inputs.clear()
        self.chosen.clear()
        ids = torch.tensor([list(tokens)])
        self._ties_TLK = None
        if routes is not None:
            theirs_TLK = torch.from_numpy(routes.expert_ids_TLK.astype(np.int64))
            theirs_TLK[~torch.from_numpy(routes.covered_T)] = -1
            unknown = (ids.shape[1] - len(theirs_TLK), *theirs_TLK.shape[1:])
            self._ties_TLK = torch.cat([torch.full(unknown, -1), theirs_TLK])
        output = self.model(input_ids=ids, past_key_values=past, use_cache=True)
        layers = [
            torch.nn.functional.linear(hidden.reshape(ids.shape[1], -1).float(), gate.weight)
            for gate, hidden in self._inputs
        ]
        logits_TLE = torch.stack(layers, 1).numpy()
        return logits_TLE, output.logits[0].log_softmax(-1).numpy(), output.past_key_values


def clear_of_ties(logits_TLE: np.ndarray, top_k: int) -> np.ndarray:
    """Return where the choice of the top-k is not a matter of rounding: bool [T, L]."""
    sorted_TLE = -np.sort(-logits_TLE, -1)
    return np.asarray((sorted_TLE[..., top_k - 1] - sorted_TLE[..., top_k]) > TIE)


def differing_rows(routes: Routes, logits_TLE: np.ndarray) -> np.ndarray:
    """Return which rows chose other experts than the reference, ties aside: bool [T]."""
    expected_TLK = np.sort(np.argsort(-logits_TLE, -1)[..., : routes.top_k], -1)
    got_TLK = np.sort(routes.expert_ids_TLK.astype(int), -1)
    differs_TL = (got_TLK != expected_TLK).any(-1) & clear_of_ties(logits_TLE, routes.top_k)
    return np.asarray(differs_TL.any(-1))
