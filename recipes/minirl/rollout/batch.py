"""A step's sequences: flat columns that rank 0 saves once and every rank memory-maps.

Suffixes here: S sequences of the step, N their positions (`routing_replay.routes.batch`), C the
choices that a sampling mask left at all positions.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from routing_replay.errors import DataError, reading, writing
from routing_replay.routes.batch import RaggedBatch, position_bounds, require_columns
from routing_replay.routes.routes import Routes

BATCH_FILE = "batch.safetensors"


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One response as the rollout engine returned it; nothing is decoded and encoded again.

    Args:
        prompt_ids: int32, token ids that were sent to the server.
        response_ids: int32, token ids after the prompt: those that it sampled, its end-of-text
            token included, and between them what a tool returned.
        logp_mu: float32, log-probs of the sampled ones under the sampling distribution.
        is_sampled: bool, which of the response's tokens were sampled; all, if None.
        routes: The expert routes; None if they were not requested.
        reward: Set by the verifier.
        support: For each response token the ids that top-p and top-k kept, if `logp_mu` is the
            log-prob among these.
        support_mass: Mean probability of the kept tokens in the whole distribution.
        top_ids, top_logp_mu: [n, K], the engine's most likely tokens at each position, if they
            were requested.
        versions: int64 [n], of the weights that sampled each of the sampled tokens; -1: unknown.
            None: all are.
        num_old_context: Sampled tokens that follow rows of older weights.
    """

    prompt_ids: np.ndarray
    response_ids: np.ndarray
    logp_mu: np.ndarray
    is_sampled: np.ndarray | None = None
    routes: Routes | None = None
    reward: float = 0.0
    support: Sequence[Sequence[int]] | None = None
    support_mass: float = 1.0
    top_ids: np.ndarray | None = None
    top_logp_mu: np.ndarray | None = None
    versions: np.ndarray | None = None
    num_old_context: int = 0

    @property
    def weight_version(self) -> int:
        """Version of its oldest token; -1: unknown."""
        return -1 if self.versions is None else int(self.versions.min())

    @property
    def predicts_sampled_T(self) -> np.ndarray:
        """Which tokens' forwards predict a sampled token; bool, without the last token."""
        predicts_T = np.zeros(len(self.prompt_ids) + len(self.response_ids) - 1, np.bool_)
        is_sampled = True if self.is_sampled is None else self.is_sampled
        predicts_T[len(self.prompt_ids) - 1 :] = is_sampled
        return predicts_T


@dataclass(frozen=True, kw_only=True)
class Batch(RaggedBatch):
    """The sequences of a step, groups one after another.

    Args:
        rewards_S: float32, the verifier's.
        group_S: int64; sequences of one prompt have one number.
        version_N: int32, of the weights that sampled the label where the mask holds; -1: unknown.
        num_prompts: int64, one number: prompts consumed for the batch, replaced ones included.
        advantages_S: float32; 0 until they are computed, which may need log-probs.
        support_ids_C, support_offsets_N1: Keep Sampling Mask: at position n the int32 ids from
            `offsets[n]` to `offsets[n + 1]` could be sampled. None: all tokens.
        top_ids_NK, top_logp_mu_NK: int32 and float32, the engine's most likely tokens.
    """

    rewards_S: torch.Tensor
    group_S: torch.Tensor
    version_N: torch.Tensor
    num_prompts: torch.Tensor
    advantages_S: torch.Tensor
    support_ids_C: torch.Tensor | None = None
    support_offsets_N1: torch.Tensor | None = None
    top_ids_NK: torch.Tensor | None = None
    top_logp_mu_NK: torch.Tensor | None = None

    @classmethod
    def from_samples(
        cls, samples: Sequence[Sample], group_size: int, num_prompts: int | None = None
    ) -> Batch:
        """Join the samples' tokens, masks and log-probs."""
        num_groups = len(samples) // group_size
        lengths_S = torch.tensor([len(s.prompt_ids) + len(s.response_ids) for s in samples])
        bounds = position_bounds(lengths_S).tolist()
        input_ids_N = torch.empty(bounds[-1], dtype=torch.int64)
        labels_N = torch.empty_like(input_ids_N)
        mask_N = torch.zeros(bounds[-1], dtype=torch.bool)
        for sample, (start, stop) in zip(samples, itertools.pairwise(bounds), strict=True):
            tokens = torch.from_numpy(np.concatenate([sample.prompt_ids, sample.response_ids]))
            input_ids_N[start:stop] = tokens[:-1]
            labels_N[start:stop] = tokens[1:]
            mask_N[start:stop] = torch.from_numpy(sample.predicts_sampled_T)
        logp_mu_N = torch.zeros(bounds[-1])
        logp_mu = np.concatenate([sample.logp_mu for sample in samples])
        logp_mu_N[mask_N] = torch.from_numpy(logp_mu).float()
        version_N = torch.full((bounds[-1],), -1, dtype=torch.int32)
        versions = [
            np.full(len(s.logp_mu), -1) if s.versions is None else s.versions for s in samples
        ]
        version_N[mask_N] = torch.from_numpy(np.concatenate(versions)).int()
        return cls(
            input_ids_N=input_ids_N,
            labels_N=labels_N,
            mask_N=mask_N,
            logp_mu_N=logp_mu_N,
            lengths_S=lengths_S,
            rewards_S=torch.tensor([s.reward for s in samples]),
            group_S=torch.arange(len(samples)) // group_size,
            version_N=version_N,
            num_prompts=torch.tensor(num_groups if num_prompts is None else num_prompts),
            advantages_S=torch.zeros(len(samples)),
            **_support_of(samples, mask_N),
            **_top_of(samples, mask_N),
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
        """Memory-map a saved batch.

        Raises:
            DataError: Unreadable, or no batch of this version.
        """
        with (
            # TypeError: a column that only another version knows.
            reading(path, "the batch", DataError, also=(SafetensorError, TypeError)),
            safe_open(Path(path), "pt") as file,
        ):
            names = list(file.keys())
            require_columns(names, path)
            return cls(**{name: file.get_tensor(name) for name in names})

    def lag_N(self, weight_version: int) -> torch.Tensor:
        """Return each token's lag; the arguments are those of `version_lag`."""
        return version_lag(self.version_N, weight_version)


def version_lag(version_N: torch.Tensor, weight_version: int) -> torch.Tensor:
    """Return by how many versions weights are newer than those that sampled; 0 if unknown."""
    return torch.where(version_N < 0, 0, weight_version - version_N)


def _support_of(samples: Sequence[Sample], mask_N: torch.Tensor) -> dict[str, torch.Tensor]:
    """The concatenated supports of all response tokens; nothing without a sampling mask."""
    if samples[0].support is None:
        return {}
    supports = [ids for s in samples for ids in s.support or ()]
    counts_N = torch.zeros(mask_N.shape, dtype=torch.int64)
    counts_N[mask_N] = torch.tensor([len(ids) for ids in supports])
    return {
        "support_ids_C": torch.tensor([v for ids in supports for v in ids], dtype=torch.int32),
        "support_offsets_N1": torch.nn.functional.pad(counts_N.cumsum(0), (1, 0)),
    }


def _top_of(samples: Sequence[Sample], mask_N: torch.Tensor) -> dict[str, torch.Tensor]:
    """The engine's most likely tokens at each response token; nothing if not requested."""
    if samples[0].top_ids is None:
        return {}
    shape = (len(mask_N), samples[0].top_ids.shape[1])
    ids_NK, logp_NK = torch.zeros(shape, dtype=torch.int32), torch.zeros(shape)
    ids_NK[mask_N] = torch.from_numpy(np.concatenate([s.top_ids for s in samples])).int()
    logp_NK[mask_N] = torch.from_numpy(np.concatenate([s.top_logp_mu for s in samples])).float()
    return {"top_ids_NK": ids_NK, "top_logp_mu_NK": logp_NK}
