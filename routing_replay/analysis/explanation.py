"""Why the routes of a layer are unrelated in two tables: shifted, swapped, or renumbered."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ..routes.table import RouteTable

# Enough rows to tell any explanation from chance, few enough to try them all.
SAMPLE_ROWS = 1 << 14
# Healthy layers agree on 0.94 and more, even with weights a few updates apart.
HEALTHY_OVERLAP = 0.9
# An explanation must remove this share of the disagreement; chance removes next to nothing.
EXPLAINED_SHARE = 0.75
MAX_SHIFT = 2


def explain_layer(first: RouteTable, second: RouteTable, index: int) -> str:
    """Return one clause about a layer, or "" if it is healthy or nothing simple explains it.

    Args:
        first, second: Tables of the same tokens.
        index: Of the layer among the routed layers.
    """
    rows_R = np.flatnonzero(first.covered_T & second.covered_T)[:SAMPLE_ROWS]
    if not len(rows_R):
        return ""
    ids_RK = np.asarray(first.expert_ids_LTK[index])[rows_R]
    other_RK = np.asarray(second.expert_ids_LTK[index])[rows_R]
    num_experts = first.shape.num_experts
    agreement = _overlap(ids_RK, other_RK)
    if agreement >= HEALTHY_OVERLAP:
        return ""
    best, text = agreement + EXPLAINED_SHARE * (1 - agreement), ""
    for candidate_RK, explanation in _candidates(second, index, rows_R, ids_RK, num_experts):
        overlap = _overlap(ids_RK, candidate_RK)
        if overlap > best:
            best, text = overlap, f"{explanation} (overlap then {overlap:.3f})"
    return text


def _candidates(
    second: RouteTable, index: int, rows_R: np.ndarray, ids_RK: np.ndarray, num_experts: int
) -> Iterator[tuple[np.ndarray, str]]:
    layer_TK = second.expert_ids_LTK[index]
    for shift in range(-MAX_SHIFT, MAX_SHIFT + 1):
        if shift:
            shifted_R = np.clip(rows_R + shift, 0, second.num_rows - 1)
            side = "later" if shift > 0 else "earlier"
            text = f"shifted: its rows stand {abs(shift)} token(s) {side} in the second file"
            yield np.asarray(layer_TK)[shifted_R], text
    for other, layer in enumerate(second.shape.layers):
        if other != index:
            other_RK = np.asarray(second.expert_ids_LTK[other])[rows_R]
            yield other_RK, f"swapped: the second file holds them under layer {layer}"
    renumbered_E = _renumbering(np.asarray(layer_TK)[rows_R], ids_RK, num_experts)
    if renumbered_E is not None:
        text = "renumbered: one permutation of the experts maps the second file to the first"
        yield renumbered_E[np.asarray(layer_TK)[rows_R]], text


def _renumbering(from_RK: np.ndarray, to_RK: np.ndarray, num_experts: int) -> np.ndarray | None:
    """The permutation under which most slots agree, found for each expert; None without one."""
    together_EE = np.zeros((num_experts, num_experts), np.int64)
    for slot_R in from_RK.T:
        for other_R in to_RK.T:
            np.add.at(together_EE, (slot_R, other_R), 1)
    # Shares instead of counts: a busy expert would otherwise match every other one.
    counts_E = np.bincount(to_RK.reshape(-1), minlength=num_experts)
    best_E: np.ndarray = (together_EE / np.maximum(counts_E, 1)).argmax(1)
    used_E = np.bincount(from_RK.reshape(-1), minlength=num_experts) > 0
    if len(set(best_E[used_E].tolist())) < used_E.sum():
        return None
    return best_E


def _overlap(ids_RK: np.ndarray, other_RK: np.ndarray) -> float:
    return float((ids_RK[:, :, None] == other_RK[:, None, :]).any(-1).mean())
