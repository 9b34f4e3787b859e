"""A step's sequences: padded arrays that rank 0 saves once and every rank memory-maps.

Every array is aligned to the inputs: position t of a row belongs to the forward that consumes
token t and predicts token t + 1. Suffixes here: S sequences of the step, T positions.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from routing_replay.errors import DataError, writing
from routing_replay.routes.routes import Routes
from routing_replay.routes.token_rows import RowSource

BATCH_FILE = "batch.safetensors"
PAD_ID = 0  # any id: padding follows the sequence and is outside every mask


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One response as the rollout engine returned it; nothing is decoded and encoded again.

    Args:
        prompt_ids: Token ids that were sent to the server.
        response_ids: Token ids after the prompt: those that it sampled, its end-of-text token
            included, and between them what a tool returned.
        logp_mu: Log-probs of the sampled ones under the sampling distribution.
        is_sampled: Which of the response's tokens were sampled; all, if None.
        routes: The expert routes; None if they were not requested.
        reward: Set by the verifier.
        support: For each response token the ids that top-p and top-k kept, if `logp_mu` is the
            log-prob among these.
        support_mass: Mean probability of the kept tokens in the whole distribution.
        top_ids, top_logp_mu: [n, K], the engine's most likely tokens at each position, if they
            were requested.
        weight_version: Of the oldest weights that sampled a part of it; -1: unknown.
    """

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    logp_mu: tuple[float, ...]
    is_sampled: tuple[bool, ...] | None = None
    routes: Routes | None = None
    reward: float = 0.0
    support: Sequence[Sequence[int]] | None = None
    support_mass: float = 1.0
    top_ids: np.ndarray | None = None
    top_logp_mu: np.ndarray | None = None
    weight_version: int = -1


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The sequences of a step, groups one after another.

    Args:
        input_ids_ST: int64; without the last token of a sequence, which no forward consumes.
        labels_ST: int64, the next token.
        mask_ST: bool, the label was sampled.
        logp_mu_ST: float32, log mu of the label where the mask holds.
        lengths_S: int64, tokens of the whole sequence, the last one included.
        rewards_S: float32, the verifier's.
        group_S: int64; sequences of one prompt have one number.
        version_S: int64, of the weights that sampled; -1: unknown.
        num_prompts: int64, one number: prompts consumed for the batch, replaced ones included.
        advantages_S: float32; 0 until they are computed, which may need log-probs.
        support_ids_N, support_starts_ST, support_counts_ST: Keep Sampling Mask: at a position the
            `counts` ids of `support_ids_N` from `starts` on could be sampled. None: all tokens.
        top_ids_STK, top_logp_mu_STK: int32 and float32, the engine's most likely tokens.
    """

    input_ids_ST: torch.Tensor
    labels_ST: torch.Tensor
    mask_ST: torch.Tensor
    logp_mu_ST: torch.Tensor
    lengths_S: torch.Tensor
    rewards_S: torch.Tensor
    group_S: torch.Tensor
    version_S: torch.Tensor
    num_prompts: torch.Tensor
    advantages_S: torch.Tensor
    support_ids_N: torch.Tensor | None = None
    support_starts_ST: torch.Tensor | None = None
    support_counts_ST: torch.Tensor | None = None
    top_ids_STK: torch.Tensor | None = None
    top_logp_mu_STK: torch.Tensor | None = None

    @classmethod
    def from_samples(
        cls,
        samples: Sequence[Sample],
        group_size: int,
        multiple: int,
        num_prompts: int | None = None,
    ) -> Batch:
        """Pad to a common length that is a multiple of what the parallel layout divides it by."""
        num_groups = len(samples) // group_size
        longest = max(len(s.prompt_ids) + len(s.response_ids) - 1 for s in samples)
        shape = (len(samples), -(-longest // multiple) * multiple)
        input_ids_ST = torch.full(shape, PAD_ID)
        labels_ST = torch.full(shape, PAD_ID)
        mask_ST = torch.zeros(shape, dtype=torch.bool)
        for row, sample in enumerate(samples):
            ids = itertools.chain(sample.prompt_ids, sample.response_ids)
            # Several times as fast as a tensor of Python's integers.
            tokens = torch.from_numpy(np.fromiter(ids, np.int64))
            stop = len(tokens) - 1
            input_ids_ST[row, :stop] = tokens[:-1]
            labels_ST[row, :stop] = tokens[1:]
            sampled_T = mask_ST[row, len(sample.prompt_ids) - 1 : stop]
            sampled_T[:] = True if sample.is_sampled is None else torch.tensor(sample.is_sampled)
        logp_mu_ST = torch.zeros(shape)
        # Row by row, left to right: the order of the sampled tokens of all samples.
        logp_mu = itertools.chain.from_iterable(sample.logp_mu for sample in samples)
        logp_mu_ST[mask_ST] = torch.from_numpy(np.fromiter(logp_mu, np.float32))
        return cls(
            input_ids_ST=input_ids_ST,
            labels_ST=labels_ST,
            mask_ST=mask_ST,
            logp_mu_ST=logp_mu_ST,
            lengths_S=torch.tensor([len(s.prompt_ids) + len(s.response_ids) for s in samples]),
            rewards_S=torch.tensor([s.reward for s in samples]),
            group_S=torch.arange(len(samples)) // group_size,
            version_S=torch.tensor([s.weight_version for s in samples]),
            num_prompts=torch.tensor(num_groups if num_prompts is None else num_prompts),
            advantages_S=torch.zeros(len(samples)),
            **_support_of(samples, mask_ST),
            **_top_of(samples, mask_ST),
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file.

        Raises:
            DataError: The disk is full or not writable.
        """
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        tensors = {name: value.contiguous() for name, value in values.items() if value is not None}
        with writing(path, "the batch", DataError):
            save_file(tensors, path)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Batch:
        """Memory-map a saved batch."""
        with safe_open(Path(path), "pt") as file:
            return cls(**{name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118

    def lag_S(self, weight_version: int) -> torch.Tensor:
        """Return by how many versions weights are newer than those that sampled; 0 if unknown."""
        return torch.where(self.version_S < 0, 0, weight_version - self.version_S)

    def token_rows(self, source: RowSource) -> torch.Tensor:
        """Return the row of each position's routes in a table or recording, or -1.

        Returns:
            int64 [S, T].
        """
        return source.token_rows(self.lengths_S, width=self.input_ids_ST.shape[1])


def _support_of(samples: Sequence[Sample], mask_ST: torch.Tensor) -> dict[str, torch.Tensor]:
    """The concatenated supports of all response tokens; nothing without a sampling mask."""
    if samples[0].support is None:
        return {}
    supports = [ids for s in samples for ids in s.support or ()]
    counts_ST = torch.zeros(mask_ST.shape, dtype=torch.int64)
    counts_ST[mask_ST] = torch.tensor([len(ids) for ids in supports])
    starts_ST = (counts_ST.flatten().cumsum(0) - counts_ST.flatten()).view(mask_ST.shape)
    return {
        "support_ids_N": torch.tensor([v for ids in supports for v in ids], dtype=torch.int32),
        "support_starts_ST": starts_ST,
        "support_counts_ST": counts_ST,
    }


def _top_of(samples: Sequence[Sample], mask_ST: torch.Tensor) -> dict[str, torch.Tensor]:
    """The engine's most likely tokens at each response token; nothing if not requested."""
    if samples[0].top_ids is None:
        return {}
    shape = (*mask_ST.shape, samples[0].top_ids.shape[1])
    ids_STK, logp_STK = torch.zeros(shape, dtype=torch.int32), torch.zeros(shape)
    ids_STK[mask_ST] = torch.from_numpy(np.concatenate([s.top_ids for s in samples])).int()
    logp_STK[mask_ST] = torch.from_numpy(np.concatenate([s.top_logp_mu for s in samples])).float()
    return {"top_ids_STK": ids_STK, "top_logp_mu_STK": logp_STK}
