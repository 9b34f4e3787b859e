"""Load of the experts: dead ones and the busiest, from the routes of a step."""

import math

import numpy as np
import pytest
import torch.distributed as dist
import torch.multiprocessing as mp
from torch_ranks import start_ranks

from routing_replay.metrics import load
from routing_replay.metrics.load import expert_load
from routing_replay.metrics.typed import to_floats
from routing_replay.routes.routes import Routes
from routing_replay.routes.table import RouteTable


def table_of(ids_TLK, num_experts, layers):
    routes = Routes(
        expert_ids_TLK=np.asarray(ids_TLK, np.uint8), layers=layers, num_experts=num_experts
    )
    return RouteTable.from_routes([routes])


def test_dead_experts_and_the_largest_share_are_counted_per_layer():
    # Layer 1: experts 0 (3 of 6 selections), 1, 2, 3 of 4. Layer 4: only 0 and 1, half dead.
    ids_TLK = [[[0, 1], [0, 1]], [[0, 2], [1, 0]], [[3, 0], [0, 1]]]
    values = to_floats(expert_load(table_of(ids_TLK, 4, layers=(1, 4))))
    assert values["routing_replay/dead_experts"].layers == {1: 0.0, 4: 0.5}
    assert values["routing_replay/max_load"].layers == {1: 0.5, 4: 0.5}
    assert values["routing_replay/dead_experts"].mean == 0.25


def test_rows_without_routes_are_not_counted():
    table = table_of([[[0, 1]], [[2, 3]]], 4, layers=(0,))
    table.covered_T[1] = False
    assert to_floats(expert_load(table))["routing_replay/dead_experts"].layers == {0: 0.5}
    table.covered_T[:] = False
    values = to_floats(expert_load(table))
    assert all(math.isnan(metric.layers[0]) for metric in values.values())


def test_a_large_table_is_counted_in_blocks_over_its_whole_length(monkeypatch):
    monkeypatch.setattr(load, "NUM_BLOCKS", 4)
    monkeypatch.setattr(load, "BLOCK_ROWS", 8)
    # 10 blocks of 8 rows; blocks 0, 2, 5 and 7 are counted. Block b selects experts b and 15.
    ids_TLK = np.stack([np.repeat(np.arange(10), 8), np.full(80, 15)], -1)[:, None]
    values = to_floats(expert_load(table_of(ids_TLK, 16, layers=(0,))))
    assert values["routing_replay/dead_experts"].layers == {0: 11 / 16}
    assert values["routing_replay/max_load"].layers == {0: 0.5}


def _rank(rank, path, queue):
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    # Rank 0 selects experts 0 and 1 twice, rank 1 experts 2 and 3 once: 2 of 6 is the most.
    ids_TLK = [[[0, 1]], [[0, 1]]] if rank == 0 else [[[2, 3]]]
    values = to_floats(expert_load(table_of(ids_TLK, 5, layers=(0,))))
    queue.put([values[f"routing_replay/{name}"].mean for name in ("dead_experts", "max_load")])
    dist.destroy_process_group()


def test_tables_of_data_parallel_ranks_are_counted_together(tmp_path):
    queue = mp.get_context("spawn").SimpleQueue()
    context = start_ranks(_rank, (tmp_path / "store", queue), 2, join=False)
    values = [queue.get() for _ in range(2)]
    while not context.join():
        pass
    assert values == [pytest.approx([1 / 5, 2 / 6])] * 2
