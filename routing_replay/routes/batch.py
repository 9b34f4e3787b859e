"""A step's sequences without padding: their positions one after another in flat columns.

A position belongs to the forward that consumes token t of a sequence and predicts token t + 1. A
sequence has one position fewer than tokens. Suffix N: the positions of all sequences.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..errors import DataError, reading
from .token_rows import RowSource

BATCH_COLUMNS = ("input_ids_N", "labels_N", "mask_N", "logp_mu_N", "lengths_S")

# A batch with this column holds log-probs after top-p and top-k.
MASK_COLUMN = "support_ids_C"


@dataclass(frozen=True, kw_only=True)
class RaggedBatch:
    """Sequences of different lengths.

    Args:
        input_ids_N: int64; the last token of a sequence is never fed to the model and left out.
        labels_N: int64, the next token.
        mask_N: bool, the label was sampled.
        logp_mu_N: float32, log mu of the label where the mask holds.
        lengths_S: int64, tokens of each sequence, the last one included.

    Raises:
        DataError: A column has not one value for each position.
    """

    input_ids_N: torch.Tensor
    labels_N: torch.Tensor
    mask_N: torch.Tensor
    logp_mu_N: torch.Tensor
    lengths_S: torch.Tensor

    def __post_init__(self) -> None:
        columns = (self.input_ids_N, self.labels_N, self.mask_N, self.logp_mu_N)
        shapes = {tuple(column.shape) for column in columns}
        expected = (int((self.lengths_S - 1).sum()),)
        if shapes != {expected}:
            raise DataError(
                "the columns of a batch do not fit its lengths",
                expected=f"{expected[0]} positions, one fewer than tokens in each sequence",
                got=sorted(shapes),
            )

    @property
    def bounds_S1(self) -> torch.Tensor:
        """Where each sequence's positions start, and the end: int64."""
        return position_bounds(self.lengths_S)

    @property
    def sequence_N(self) -> torch.Tensor:
        """The sequence of each position: int64."""
        return torch.arange(len(self.lengths_S)).repeat_interleave(self.lengths_S - 1)

    @property
    def num_sampled_S(self) -> torch.Tensor:
        """The sampled tokens of each sequence: int64."""
        return self.sums(self.mask_N.long())

    def positions(self, first: int, stop: int) -> slice:
        """Return where the sequences `first` to `stop - 1` are on the axis N."""
        bounds_S1 = self.bounds_S1
        return slice(int(bounds_S1[first]), int(bounds_S1[stop]))

    def sums(self, values_N: torch.Tensor) -> torch.Tensor:
        """Return the sum over each sequence, [S, ...]."""
        sums_S = values_N.new_zeros(len(self.lengths_S), *values_N.shape[1:])
        return sums_S.index_add(0, self.sequence_N, values_N)

    def token_rows(self, source: RowSource) -> torch.Tensor:
        """Return the row of each position's routes in a table or recording, or -1; int64 [N]."""
        return source.token_rows(self.lengths_S, cu_seqlens=self.bounds_S1)


@dataclass(frozen=True, kw_only=True)
class RolloutBatch(RaggedBatch):
    """A saved rollout batch: token ids, what was sampled, and the engine's log-probs of it.

    Args:
        fingerprint: Of the file, to recognise it on resuming.
    """

    fingerprint: str = ""

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> RolloutBatch:
        """Read `batch.safetensors` as the recipe writes it; further columns are ignored.

        Raises:
            DataError: Unreadable, padded, a column is missing, or mu is not of the whole
                vocabulary.
        """
        with reading(path, "the rollout batch", DataError, also=(SafetensorError,)):
            digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]
            tensors = load_file(Path(path))
        require_columns(tensors, path)
        if MASK_COLUMN in tensors:
            raise DataError(
                "the batch was sampled under a sampling mask: mu is not of the whole vocabulary",
                where=path,
                fix="Take a batch of a run without --top-p and --top-k",
            )
        return cls(**{name: tensors[name] for name in BATCH_COLUMNS}, fingerprint=digest)


def position_bounds(lengths_S: torch.Tensor) -> torch.Tensor:
    """Return where the positions of each sequence start, and the end; int64 [S + 1]."""
    return torch.nn.functional.pad((lengths_S - 1).cumsum(0), (1, 0))


def require_columns(names: Collection[str], path: str | os.PathLike[str]) -> None:
    """Raise unless a file's columns are those of a batch.

    Raises:
        DataError: A column is missing; the message says whether an older version wrote the file.
    """
    if set(BATCH_COLUMNS) <= set(names):
        return
    is_padded = "input_ids_ST" in names
    raise DataError(
        "the rollout batch is padded, as older versions wrote it"
        if is_padded
        else "the file is not a rollout batch",
        expected=f"the columns {BATCH_COLUMNS}",
        got=sorted(names),
        where=path,
        fix="Take a batch that this version sampled" if is_padded else None,
    )
