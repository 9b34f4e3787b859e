"""A saved rollout batch: token ids, what was sampled, and the engine's log-probs of it."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..errors import DataError, reading

BATCH_COLUMNS = ("input_ids_ST", "labels_ST", "mask_ST", "logp_mu_ST", "lengths_S")

# A batch with this column holds log-probs after top-p and top-k.
MASK_COLUMN = "support_ids_N"


@dataclass(frozen=True, kw_only=True)
class RolloutBatch:
    """A saved rollout batch, aligned to the inputs: position t predicts token t + 1.

    Args:
        input_ids_ST: int64; the last token of a sequence is never fed to the model and left out.
        labels_ST: int64, the next token.
        mask_ST: bool, the label was sampled.
        logp_mu_ST: float32, log mu of the label where the mask holds.
        lengths_S: int64, tokens of each sequence, the last one included.
        fingerprint: Of the file, to recognise it on resuming.
    """

    input_ids_ST: torch.Tensor
    labels_ST: torch.Tensor
    mask_ST: torch.Tensor
    logp_mu_ST: torch.Tensor
    lengths_S: torch.Tensor
    fingerprint: str = ""

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> RolloutBatch:
        """Read `batch.safetensors` as the recipe writes it; further columns are ignored.

        Raises:
            DataError: Unreadable, a column is missing, or mu is not of the whole vocabulary.
        """
        with reading(path, "the rollout batch", DataError, also=(SafetensorError,)):
            digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]
            tensors = load_file(Path(path))
        if not tensors.keys() >= set(BATCH_COLUMNS):
            raise DataError(
                "the file is not a rollout batch",
                expected=f"the columns {BATCH_COLUMNS}",
                got=sorted(tensors),
                where=path,
            )
        if MASK_COLUMN in tensors:
            raise DataError(
                "the batch was sampled under a sampling mask: mu is not of the whole vocabulary",
                where=path,
                fix="Take a batch of a run without --top-p and --top-k",
            )
        return cls(**{name: tensors[name] for name in BATCH_COLUMNS}, fingerprint=digest)
