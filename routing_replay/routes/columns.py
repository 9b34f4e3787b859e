"""The columns of a table, built from the routes of its sequences; layers first."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .counts import count_covered, counts_dtype
from .routes import Routes, concatenate_logits

# Rows that are copied and counted at a time: with 48 layers of 8 bytes they stay in the cache.
BLOCK_ROWS = 2048


def columns_of(
    sequences: Sequence[Routes], keeps_gates_T: np.ndarray | None
) -> dict[str, np.ndarray]:
    """Return the columns by their names in the file.

    Args:
        sequences: Of one model.
        keeps_gates_T: bool over the rows of all sequences, those whose gates are kept; None: all.
    """
    offsets_S1 = np.cumsum([0] + [r.num_rows for r in sequences]).astype(np.int64)
    ids_LTK, counts_SLE = _ids_and_counts(sequences)
    tensors = {
        "expert_ids_LTK": ids_LTK,
        "covered_T": np.concatenate([r.covered_T for r in sequences]),
        "origin_T": np.concatenate([r.origin_T for r in sequences]),
        "weight_version_T": np.concatenate([r.weight_version_T for r in sequences]),
        "offsets_S1": offsets_S1,
        "counts_SLE": counts_SLE,
    }
    gates = [r.gate_probs_TLK for r in sequences if r.gate_probs_TLK is not None]
    if len(gates) == len(sequences):
        tensors |= _gates_of(gates, offsets_S1, keeps_gates_T)
    weights = [r.combine_weights_TLK for r in sequences if r.combine_weights_TLK is not None]
    if len(weights) == len(sequences):
        tensors["combine_weights_LTK"] = _layer_first(weights)
    logits = concatenate_logits(sequences, offsets_S1[:-1])
    if logits is not None:
        tensors["logit_rows_N"] = logits.rows_N.astype(np.int64)
        tensors["logits_NLE"] = logits.values_NLE.astype(np.float32)
    return tensors


def _ids_and_counts(sequences: Sequence[Routes]) -> tuple[np.ndarray, np.ndarray]:
    """Ids [L, T, K] and counts [S, L, E]: a sequence is counted while it is in the cache."""
    first, lengths = sequences[0], [routes.num_rows for routes in sequences]
    ids_LTK = np.empty((len(first.layers), sum(lengths), first.top_k), first.expert_ids_TLK.dtype)
    counts_SLE = np.empty(
        (len(sequences), len(first.layers), first.num_experts), counts_dtype(max(lengths))
    )
    start = 0
    for number, routes in enumerate(sequences):
        rows_LTK = ids_LTK[:, start : start + routes.num_rows]
        counts_SLE[number] = _filled(rows_LTK, routes)
        start += routes.num_rows
    return ids_LTK, counts_SLE


def _filled(ids_LTK: np.ndarray, routes: Routes) -> np.ndarray | int:
    """Write a sequence's ids, layers first, and return their counts [L, E]; 0 without rows."""
    parts = []
    for start in range(0, routes.num_rows, BLOCK_ROWS):
        rows = slice(start, start + BLOCK_ROWS)
        _write_layer_first(ids_LTK[:, rows], routes.expert_ids_TLK[rows])
        covered_B = routes.covered_T[rows]
        parts.append(count_covered(ids_LTK[:, rows], covered_B, routes.num_experts))
    return sum(parts)


def _write_layer_first(target_LTK: np.ndarray, values_TLK: np.ndarray) -> None:
    item = row_item(target_LTK)
    target_LTK.view(item)[..., 0] = np.ascontiguousarray(values_TLK).view(item)[..., 0].T


def row_item(values_LTK: np.ndarray) -> np.dtype:
    """Return a row of a layer as one opaque item: numpy copies it 5 times faster than K numbers."""
    return np.dtype((np.void, values_LTK.shape[-1] * values_LTK.itemsize))


def _gates_of(
    gates: list[np.ndarray], offsets_S1: np.ndarray, keeps_gates_T: np.ndarray | None
) -> dict[str, np.ndarray]:
    """Return the columns of the gates, of all rows or of the rows to keep."""
    if keeps_gates_T is None:
        return {"gate_probs_LNK": _layer_first(gates)}
    if not keeps_gates_T.any():
        return {}
    parts = np.split(keeps_gates_T, offsets_S1[1:-1])
    kept = [part_TLK[keeps_T] for part_TLK, keeps_T in zip(gates, parts, strict=True)]
    return {
        "gate_probs_LNK": _layer_first(kept),
        "gate_rows_N": np.flatnonzero(keeps_gates_T).astype(np.int64),
    }


def _layer_first(parts_TLK: list[np.ndarray]) -> np.ndarray:
    """[T, L, K] pieces to one [L, T, K] array, without an intermediate of the whole."""
    num_rows = sum(part.shape[0] for part in parts_TLK)
    _, num_layers, top_k = parts_TLK[0].shape
    whole_LTK = np.empty((num_layers, num_rows, top_k), parts_TLK[0].dtype)
    start = 0
    for part_TLK in parts_TLK:
        stop = start + part_TLK.shape[0]
        _write_layer_first(whole_LTK[:, start:stop], part_TLK)
        start = stop
    return whole_LTK
