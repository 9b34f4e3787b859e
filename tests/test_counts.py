"""Counts of tokens per sequence, layer and expert: exact, kept in the file, cheap."""

import sys

import numpy as np
import oracles
import pytest
from test_table import random_routes

from routing_replay.errors import TableError
from routing_replay.routes import counts
from routing_replay.routes.table import RouteTable


@pytest.fixture(params=[16, 400], ids=["uint8", "uint16"])
def table(request):
    sequences = [random_routes(n, n, experts=request.param) for n in (5, 1, 0, 3000)]
    return RouteTable.from_routes(sequences)


def test_counts_are_those_of_a_loop_over_all_slots(table):
    assert table.counts_SLE.tolist() == oracles.expert_counts(table)


@pytest.fixture(params=["compiled", "numpy"])
def way(request, monkeypatch):
    """Counts of any size by one of the two ways."""
    counts._compiled.cache_clear()
    if request.param == "numpy":
        monkeypatch.setitem(sys.modules, "numba", None)
    else:
        pytest.importorskip("numba")
    monkeypatch.setattr(counts, "COMPILED_IDS", 0)
    yield request.param
    counts._compiled.cache_clear()


def test_compiled_counts_are_numpys(table, way):
    assert (counts._compiled() is not None) == (way == "compiled")
    recounted = counts.count_sequences(
        table.expert_ids_LTK, table.covered_T, table.offsets_S1, table.shape.num_experts
    )
    assert recounted.tolist() == oracles.expert_counts(table)


@pytest.mark.parametrize("num_ids", [0, 7, 8, 21])
def test_ids_that_fill_no_whole_word_are_counted(way, num_ids):
    ids_LN = np.arange(2 * num_ids, dtype=np.uint8).reshape(2, num_ids) % 5
    expected = [[int((row == expert).sum()) for expert in range(5)] for row in ids_LN]
    assert counts.count_layers(ids_LN, 5).tolist() == expected


def test_an_id_out_of_range_is_refused_before_anything_is_written(way):
    with pytest.raises(IndexError, match="an expert id is out of range: expected below 4"):
        counts.count_layers(np.full((1, 16), 4, np.uint8), 4)


def test_counts_survive_the_file_and_a_read_only_map_is_counted_without_a_warning(
    table, tmp_path, recwarn
):
    opened = RouteTable.open(table.save(tmp_path / "routes.safetensors"))
    np.testing.assert_array_equal(opened.counts_SLE, table.counts_SLE)
    opened.counts_SLE = None
    np.testing.assert_array_equal(opened.expert_counts(), table.counts_SLE)
    assert not recwarn.list


def test_a_count_takes_the_bytes_that_the_longest_sequence_needs():
    # An expert occurs at most once in a row: 255 rows fit in one byte, 256 do not.
    types = [counts.counts_dtype(n) for n in (0, 255, 256, 65535, 65536)]
    assert types == [np.uint8, np.uint8, np.uint16, np.uint16, np.uint32]


def test_a_recording_without_counts_is_counted_when_asked():
    filled = RouteTable.from_routes([random_routes(7, 1, gates=False)])
    empty = RouteTable.empty(filled.shape, [8])
    assert empty.counts_SLE is None and empty.expert_counts().sum() == 0
    empty.expert_ids_LTK[:], empty.covered_T[:] = filled.expert_ids_LTK, filled.covered_T
    np.testing.assert_array_equal(empty.expert_counts(), filled.counts_SLE)


def test_counts_of_another_shape_are_damage(tmp_path):
    table = RouteTable.from_routes([random_routes(4, 0)])
    table.columns["counts_SLE"] = table.counts_SLE[:, :-1]
    with pytest.raises(TableError, match="the routes file is damaged; expected columns of one"):
        RouteTable.open(table.save(tmp_path / "routes.safetensors"))
