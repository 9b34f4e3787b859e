"""Inspection of routes files against counts made by hand and by an oracle."""

import numpy as np
import pytest

from routing_replay.analysis.inspection import expert_loads, inspect_table
from routing_replay.routes.origin import Origin
from routing_replay.routes.routes import Routes
from routing_replay.routes.table import RouteTable


def random_table(num_rows=200, layers=3, experts=8, top_k=2, seed=0):
    generator = np.random.default_rng(seed)
    dtype = np.uint8 if experts <= 256 else np.uint16
    order = generator.random((num_rows, layers, experts)).argsort(-1)
    routes = Routes(
        expert_ids_TLK=order[..., :top_k].astype(dtype),
        layers=range(layers),
        num_experts=experts,
        covered_T=generator.random(num_rows) < 0.8,
    )
    half = num_rows // 2
    return RouteTable.from_routes([routes[:half], routes[half:]])


def oracle_loads(table):
    loads = [[0] * table.shape.num_experts for _ in table.shape.layers]
    for index, ids_TK in enumerate(table.expert_ids_LTK):
        for row, ids in enumerate(ids_TK):
            for expert in ids if table.covered_T[row] else ():
                loads[index][expert] += 1
    return loads


@pytest.mark.parametrize(("experts", "top_k"), [(8, 2), (8, 3), (300, 4)])
def test_loads_equal_the_oracle_for_every_dtype_and_across_blocks(monkeypatch, experts, top_k):
    monkeypatch.setattr("routing_replay.analysis.inspection.BLOCK_ROWS", 64)
    table = random_table(experts=experts, top_k=top_k)
    assert [list(load) for load in expert_loads(table)] == oracle_loads(table)


def test_balance_is_described_as_documented():
    # 4 rows, top-2 of 4 experts: expert 0 in every row, expert 1 in two, 2 in two, 3 never.
    ids = [[[0, 1]], [[0, 1]], [[0, 2]], [[0, 2]]]
    table = RouteTable.from_routes(
        [Routes(expert_ids_TLK=np.array(ids, np.uint8), layers=(5,), num_experts=4)]
    )
    (load,) = inspect_table(table).loads
    assert load.layer == 5
    assert load.max_violation == pytest.approx(4 / 2 - 1)  # mean load 8 / 4
    assert (load.num_dead, load.busiest, load.busiest_share) == (1, 0, 0.5)
    # H = -(0.5 ln 0.5 + 2 * 0.25 ln 0.25) = 1.0397; over ln 4 = 1.3863
    assert load.entropy == pytest.approx(0.75)


def test_origins_versions_and_coverage_are_counted():
    routes = Routes(
        expert_ids_TLK=np.array([[[0, 1]]] * 4, np.uint8),
        layers=(0,),
        num_experts=4,
        covered_T=np.array([True, True, True, False]),
        origin_T=np.array([Origin.PREFILL, Origin.DECODE, Origin.DECODE, 0], np.uint8),
        weight_version_T=np.array([3, 3, 4, -1]),
    )
    inspection = inspect_table(RouteTable.from_routes([routes, routes[:1]]))
    assert (
        inspection.num_sequences,
        inspection.shortest,
        inspection.longest,
        inspection.coverage,
    ) == (2, 1, 4, 0.8)
    assert inspection.origins == {"absent": 1, "prefill": 2, "decode": 2}
    assert inspection.weight_versions == {-1: 1, 3: 3, 4: 1}
    assert "rows 1 to 4" in inspection.text() and "unknown: 1" in inspection.text()


def test_an_empty_table_is_described_too():
    empty = Routes(expert_ids_TLK=np.zeros((0, 2, 2), np.uint8), layers=(0, 1), num_experts=4)
    inspection = inspect_table(RouteTable.from_routes([empty]))
    assert (inspection.num_rows, inspection.coverage, inspection.loads[0].num_dead) == (0, 0.0, 4)
