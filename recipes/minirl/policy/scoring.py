"""From the logits of a microbatch to its log-probs, the loss's inputs and the policy's ratios."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from routing_replay.metrics.policy_kl import Sequences, update_metrics
from routing_replay.metrics.typed import Metric
from routing_replay.objectives import Denominators, LossInputs
from routing_replay.objectives.logprobs import TokenScores, logprobs_at, token_logprobs

from .microbatches import Microbatch

# Log-probs and entropies of this rank's tokens, by the sequences of their microbatch. Ranks before
# the last pipeline stage have none.
Scores = dict[tuple[int, ...], TokenScores]


def mean_scores(passes: Sequence[Scores]) -> Scores:
    """Return the mean log-probs of several passes; the entropies of the first."""
    first = passes[0]
    return {
        sequences: replace(
            scores, logp_T=torch.stack([one[sequences].logp_T for one in passes]).mean(0)
        )
        for sequences, scores in first.items()
    }


@dataclass(frozen=True, kw_only=True)
class Scorer:
    """How this rank's logits become the values of its tokens.

    Args:
        temperature: Of the rollout: the policy is what the engine sampled from.
        tensor_group: Ranks among which the vocabulary is sharded; None: the logits are whole.
        context_group: Ranks among which sequences are sharded; None: they are whole.
    """

    temperature: float
    tensor_group: dist.ProcessGroup | None = None
    context_group: dist.ProcessGroup | None = None

    def token_scores(self, m: Microbatch, logits_BTV: torch.Tensor) -> TokenScores:
        """Return log-prob and entropy of every position; the backward overwrites the logits."""
        return token_logprobs(
            logits_BTV.flatten(0, 1),
            m.labels_BT.flatten(),
            reuse_logits=True,
            **self._distribution(m),
        )

    def loss_inputs(
        self, m: Microbatch, logits_BTV: torch.Tensor, denominators: Denominators
    ) -> LossInputs:
        """Return what an objective takes; the backward overwrites the logits."""
        scores, sequences = self.token_scores(m, logits_BTV), self.sequences(m)
        return LossInputs(
            logp_theta_T=scores.logp_T,
            entropy_T=scores.entropy_T,
            logp_mu_T=m.logp_mu_BT.flatten(),
            advantages_T=m.advantages_BT.flatten(),
            mask_T=m.mask_BT.flatten(),
            sequence_T=sequences.index_T,
            num_sequences=sequences.count,
            denominators=denominators,
            context_group=sequences.context_group,
            **m.fixed,
            **self._most_likely(m, logits_BTV),
        )

    def ratios(
        self,
        m: Microbatch,
        logp_theta_T: torch.Tensor,
        logp_old_T: torch.Tensor,
        logp_mu_T: torch.Tensor | None,
        suffix: str = "",
    ) -> dict[str, Metric]:
        """Return the metrics of r = pi_theta / pi_old and, given mu, of w = pi_theta / mu."""
        return update_metrics(
            logp_theta_T,
            logp_old_T,
            logp_mu_T,
            m.mask_BT.flatten(),
            suffix=suffix,
            sequences=self.sequences(m),
        )

    def sequences(self, m: Microbatch) -> Sequences:
        """Return which sequence of the microbatch each of its tokens here belongs to."""
        return Sequences(
            index_T=m.index_T, count=len(m.sequences), context_group=self.context_group
        )

    def _most_likely(self, m: Microbatch, logits_BTV: torch.Tensor) -> dict[str, torch.Tensor]:
        """pi_theta at mu's most likely tokens, if the batch has these."""
        if m.top_ids_TK is None or m.top_logp_mu_TK is None:
            return {}
        logits_TV = logits_BTV.detach().flatten(0, 1)
        theta_TK = logprobs_at(logits_TV, m.top_ids_TK, **self._distribution(m))
        return {
            "sampled_ids_T": m.labels_BT.flatten(),
            "topk_ids_TK": m.top_ids_TK,
            "topk_logp_mu_TK": m.top_logp_mu_TK,
            "topk_logp_theta_TK": theta_TK,
        }

    def _distribution(self, m: Microbatch) -> dict[str, Any]:
        """How logits become the policy: as the rollout sampled."""
        return {"temperature": self.temperature, "group": self.tensor_group, "support": m.support}
