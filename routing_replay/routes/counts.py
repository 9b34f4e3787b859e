"""How many tokens of each sequence select each expert, layer by layer: exact integers."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

# Ids that are counted at a time: torch.bincount takes several threads above, which cost more than
# they save. Below the smaller number a call of it takes longer than numpy's.
PIECE_IDS, SHORT_IDS = 1 << 15, 1 << 13


def counts_dtype(most_rows: int) -> np.dtype:
    """Return the smallest type of a count: an expert occurs at most once in a row."""
    return np.min_scalar_type(most_rows)


def count_experts(ids: np.ndarray, num_experts: int) -> np.ndarray:
    """Return how often each expert occurs in an array of ids of any shape; int64 [E].

    Args:
        ids: uint8 or uint16, each below `num_experts`.
    """
    counts_E: np.ndarray = count_layers(ids.reshape(1, -1), num_experts)[0]
    return counts_E


def count_layers(ids_LTK: np.ndarray, num_experts: int) -> np.ndarray:
    """Return how often each expert occurs in each layer; int64 [L, E]."""
    ids_LN = ids_LTK.reshape(len(ids_LTK), -1)
    if ids_LN.shape[1] < SHORT_IDS:
        return np.stack([np.bincount(ids_N, minlength=num_experts) for ids_N in ids_LN])
    import torch  # counts bytes without widening them

    counts_LE = np.zeros((len(ids_LN), num_experts), np.int64)
    for start in range(0, ids_LN.shape[1], PIECE_IDS):
        for layer, piece_N in enumerate(_as_tensor(ids_LN[:, start : start + PIECE_IDS])):
            counts_LE[layer] += torch.bincount(piece_N, minlength=num_experts).numpy()
    return counts_LE


def count_sequences(
    ids_LTK: np.ndarray, covered_T: np.ndarray, offsets_S1: np.ndarray, num_experts: int
) -> np.ndarray:
    """Return the counts of every sequence of a table; rows that are not covered do not count.

    Args:
        ids_LTK: Expert ids of all rows.
        covered_T: bool, rows that are known to be true.
        offsets_S1: Sequence s owns the rows offsets[s] .. offsets[s + 1].
        num_experts: E.

    Returns:
        Unsigned integers [S, L, E].
    """
    lengths_S = np.diff(offsets_S1)
    shape = (len(lengths_S), len(ids_LTK), num_experts)
    counts_SLE = np.zeros(shape, counts_dtype(int(lengths_S.max(initial=0))))
    for sequence, (start, stop) in enumerate(zip(offsets_S1[:-1], offsets_S1[1:], strict=True)):
        counts_SLE[sequence] = count_covered(
            ids_LTK[:, start:stop], covered_T[start:stop], num_experts
        )
    return counts_SLE


def count_covered(ids_LTK: np.ndarray, covered_T: np.ndarray, num_experts: int) -> np.ndarray:
    """Return the counts of one sequence's covered rows; int64 [L, E]."""
    if not covered_T.all():
        ids_LTK = ids_LTK[:, covered_T]
    return count_layers(ids_LTK, num_experts)


def _as_tensor(ids_LN: np.ndarray) -> torch.Tensor:
    import torch

    if ids_LN.dtype == np.uint16:
        ids_LN = ids_LN.view(np.int16)  # ids are below 2**15, and torch counts no uint16
    if ids_LN.flags.writeable:
        return torch.from_numpy(ids_LN)
    with warnings.catch_warnings():
        # A memory-mapped table is read-only, and only read here.
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(ids_LN)
