"""How evenly a step's routes use the experts, layer by layer."""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist

from ..routes.counts import count_experts
from ..routes.step_routes import StepRoutes
from .typed import LayerMean, Metric

# Rows that are counted per layer, in evenly spaced blocks: 16,384, or all of a smaller table. With
# 512 experts and top-8 an evenly used one is expected 256 times: a count of 0 is no accident.
NUM_BLOCKS, BLOCK_ROWS = 256, 64


def expert_load(
    table: StepRoutes,
    group: dist.ProcessGroup | None = None,
    device: torch.device | str | None = None,
) -> dict[str, Metric]:
    """Return dead experts and the largest load of each layer, over a step's covered routes.

    - `routing_replay/dead_experts`: share of a layer's experts that no token selects.
    - `routing_replay/max_load`: largest share of a layer's selections that one expert takes.

    The counting is host work outside of every forward pass. Collective: counts are summed over the
    ranks, so tables of data-parallel ranks are counted together. Ranks that share a table weigh it
    alike, which leaves both shares as they are.

    Args:
        table: The routes that the step's updates take: the rollout's, or recorded ones.
        group: Process group; the world if None. Without an initialised world nothing is reduced.
        device: Where the communication happens: the CPU for gloo (default), the GPU for NCCL.
    """
    shape, rows_M = table.shape, _sampled_rows(table.covered_T & table.local_rows())
    counts_LE = torch.zeros(len(shape.layers), shape.num_experts, dtype=torch.int64)
    for layer in table.local_layers():
        (ids_MK,) = table.gather([layer], rows_M)
        counts = torch.from_numpy(count_experts(ids_MK, shape.num_experts))
        counts_LE[shape.layers.index(layer)] = counts
    if dist.is_available() and dist.is_initialized():
        counts_LE = counts_LE.to(device or "cpu")
        dist.all_reduce(counts_LE, group=group)
    total_L = counts_LE.sum(1)
    has_routes_L = (total_L > 0).double()
    shares = {
        "dead_experts": (counts_LE == 0).double().mean(1),
        "max_load": counts_LE.amax(1) / total_L.clamp(min=1),
    }
    return {
        f"routing_replay/{name}": LayerMean(
            layers=shape.layers, total_L=share_L * has_routes_L, count_L=has_routes_L
        )
        for name, share_L in shares.items()
    }


def _sampled_rows(covered_T: np.ndarray) -> np.ndarray:
    """Return covered rows in blocks, because a page of a mapped file holds many rows."""
    num_blocks = -(-len(covered_T) // BLOCK_ROWS)
    count = min(num_blocks, NUM_BLOCKS)
    blocks_B = np.arange(count) * num_blocks // max(1, count)
    rows_M = (blocks_B[:, None] * BLOCK_ROWS + np.arange(BLOCK_ROWS)).reshape(-1)
    rows_M = rows_M[rows_M < len(covered_T)]
    return np.compress(covered_T[rows_M], rows_M)
