"""How many tokens of each sequence select each expert, layer by layer: exact integers."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import numpy as np

# Ids from which the compiled loop is worth the second in which its compiler loads.
COMPILED_IDS = 1 << 15
WORD = np.dtype(np.uint64)


def counts_dtype(most_rows: int) -> np.dtype:
    """Return the smallest type of a count: an expert occurs at most once in a row."""
    return np.min_scalar_type(most_rows)


def count_experts(ids: np.ndarray, num_experts: int) -> np.ndarray:
    """Return how often each expert occurs in an array of ids of any shape; integers [E].

    Args:
        ids: uint8 or uint16, each below `num_experts`.
    """
    counts_E: np.ndarray = count_layers(ids.reshape(1, -1), num_experts)[0]
    return counts_E


def count_layers(ids_LTK: np.ndarray, num_experts: int) -> np.ndarray:
    """Return how often each expert occurs in each layer; integers [L, E].

    Raises:
        IndexError: An id that is not below `num_experts`.
    """
    ids_LN = ids_LTK.reshape(len(ids_LTK), -1)
    add_counts = _compiled() if ids_LN.size >= COMPILED_IDS else None
    if add_counts is None:
        rows = [np.bincount(ids_N, minlength=num_experts) for ids_N in ids_LN]
        if any(len(row) > num_experts for row in rows):
            raise _out_of_range(num_experts)
        return np.stack(rows)
    # The loop writes where the ids say: a byte is below 256, two bytes are looked at before.
    is_byte = ids_LN.dtype == np.uint8
    if not is_byte and int(ids_LN.max(initial=0)) >= num_experts:
        raise _out_of_range(num_experts)
    # 32 bits: sums in 16 wait longer for one another, sums in 64 fill more of the cache.
    counts_LE = np.zeros((len(ids_LN), 256 if is_byte else num_experts), np.uint32)
    in_words = ids_LN.shape[1] // WORD.itemsize * WORD.itemsize if is_byte else 0
    add_counts(ids_LN[:, :in_words].view(WORD), ids_LN[:, in_words:], counts_LE)
    if counts_LE[:, num_experts:].any():
        raise _out_of_range(num_experts)
    return counts_LE[:, :num_experts]


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
    """Return the counts of one sequence's covered rows; integers [L, E]."""
    if not covered_T.all():
        ids_LTK = ids_LTK[:, covered_T]
    return count_layers(ids_LTK, num_experts)


@functools.cache
def _compiled() -> Callable[..., None] | None:
    """`_add_counts` as machine code, five times as fast as numpy; None without numba.

    numba comes with SGLang; a trainer may be without.
    """
    try:
        numba = importlib.import_module("numba")
    except ImportError:
        return None
    try:
        compiled: Any = numba.njit(_add_counts, nogil=True, cache=True)
    except RuntimeError:  # no folder to keep it in
        compiled = numba.njit(_add_counts, nogil=True)
    function: Callable[..., None] = compiled
    return function


def _add_counts(words_LW: np.ndarray, rest_LN: np.ndarray, counts_LE: np.ndarray) -> None:
    """Count the bytes of the words, and the ids of the rest; one addition in memory for each."""
    for layer in range(len(counts_LE)):
        counts_E = counts_LE[layer]
        for word in words_LW[layer]:
            for shift in range(0, 64, 8):
                counts_E[(word >> np.uint64(shift)) & np.uint64(255)] += np.uint32(1)
        for expert in rest_LN[layer]:
            counts_E[expert] += np.uint32(1)


def _out_of_range(num_experts: int) -> IndexError:
    return IndexError(f"an expert id is out of range: expected below {num_experts}")
