"""How evenly a step's routes use the experts, layer by layer."""

from __future__ import annotations

import numpy as np
import torch

from ..routes.table import RouteTable
from .typed import LayerMean, Metric

# Rows that are counted per layer, in evenly spaced blocks: 16,384, or all of a smaller table. With
# 512 experts and top-8 an evenly used one is expected 256 times: a count of 0 is no accident.
NUM_BLOCKS, BLOCK_ROWS = 256, 64
# numpy widens ids to int64: pieces that stay in the cache are an order of magnitude faster.
COUNTED_IDS = 2**16


def expert_load(table: RouteTable) -> dict[str, Metric]:
    """Dead experts and the largest load of each layer, over the step's covered routes.

    - `routing_replay/dead_experts`: share of a layer's experts that no token selects.
    - `routing_replay/max_load`: largest share of a layer's selections that one expert takes.

    Host work on the table, outside of every forward pass: no device is touched. Where ranks hold
    tables of their own rows (`Recording.own_table`), the reduced value is the mean over ranks.

    Args:
        table: The routes that the step's updates take: the rollout's, or recorded ones.
    """
    dead_L, largest_L, num_counted_L = [], [], []
    rows_M = _sampled_rows(table.covered_T)
    for ids_TK in table.expert_ids_LTK:
        counts_E = count_experts(ids_TK[rows_M], table.shape.num_experts)
        dead_L.append(float((counts_E == 0).mean()))
        largest_L.append(float(counts_E.max() / max(1, counts_E.sum())))
        num_counted_L.append(float(len(rows_M) > 0))
    return {
        f"routing_replay/{name}": LayerMean(
            layers=table.shape.layers,
            total_L=torch.tensor(values_L, dtype=torch.float64),
            count_L=torch.tensor(num_counted_L, dtype=torch.float64),
        )
        for name, values_L in (("dead_experts", dead_L), ("max_load", largest_L))
    }


def count_experts(ids_TK: np.ndarray, num_experts: int) -> np.ndarray:
    """How often each expert is selected; int64 [E]."""
    ids_N = ids_TK.reshape(-1)
    counts_E = np.zeros(num_experts, np.int64)
    for start in range(0, len(ids_N), COUNTED_IDS):
        counts_E += np.bincount(ids_N[start : start + COUNTED_IDS], minlength=num_experts)
    return counts_E


def _sampled_rows(covered_T: np.ndarray) -> np.ndarray:
    """Covered rows of the sampled blocks. Blocks, because a page of a mapped file holds many."""
    num_blocks = -(-len(covered_T) // BLOCK_ROWS)
    count = min(num_blocks, NUM_BLOCKS)
    blocks_B = np.arange(count) * num_blocks // max(1, count)
    rows_M = (blocks_B[:, None] * BLOCK_ROWS + np.arange(BLOCK_ROWS)).reshape(-1)
    rows_M = rows_M[rows_M < len(covered_T)]
    return np.compress(covered_T[rows_M], rows_M)
