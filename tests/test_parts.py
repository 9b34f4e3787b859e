"""Routes in parts: the same rows as one table, read where they are needed, refused where wrong."""

import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from routing_replay.errors import TableError
from routing_replay.routes.part_index import PartIndex
from routing_replay.routes.parts import PartedTable, open_table, write_parts
from routing_replay.routes.routes import RouterLogits, Routes
from routing_replay.routes.shape import MoEShape
from routing_replay.routes.table import RouteTable

LAYERS, TOP_K = (0, 1, 2, 5, 6, 9), 3
# Two pipeline ranks with two chunks each, interleaved.
STAGES = ((0, 1, 6), (2, 5, 9))
GROUPS = ((5, 1, 0), (8,), (4, 4, 3))


def routes_of(num_rows, seed, num_experts):
    rng = np.random.default_rng(seed)
    ids = np.argsort(rng.random((num_rows, len(LAYERS), num_experts)), axis=-1)[..., :TOP_K]
    covered_T = rng.random(num_rows) < 0.7
    kept = np.flatnonzero(covered_T & (rng.random(num_rows) < 0.5))
    logits = rng.random((len(kept), len(LAYERS), num_experts), np.float32)
    return Routes(
        expert_ids_TLK=ids.astype(np.uint8 if num_experts <= 256 else np.uint16),
        covered_T=covered_T,
        layers=LAYERS,
        num_experts=num_experts,
        combine_weights_TLK=rng.random(ids.shape, np.float32),
        gate_probs_TLK=rng.random(ids.shape).astype(np.float16),
        router_logits=RouterLogits(rows_N=kept, values_NLE=logits),
        weight_version_T=np.full(num_rows, seed, np.int64),
    )


@pytest.fixture(params=[16, 300])
def step(request, tmp_path):
    """A step's folder with its parts and index, and the same routes in one table."""
    rng = np.random.default_rng(0)
    groups, sequences, kept = [], [], []
    for number, lengths in enumerate(GROUPS):
        routes = [routes_of(n, 10 * number + i, request.param) for i, n in enumerate(lengths)]
        keeps_T = rng.random(sum(lengths)) < 0.4
        groups.append(write_parts(tmp_path, f"g{number}", routes, STAGES, keeps_T, True))
        sequences += routes
        kept.append(keeps_T)
    shape = MoEShape(layers=LAYERS, num_experts=request.param, top_k=TOP_K)
    index = PartIndex(shape=shape, stages=STAGES, groups=groups)
    path = index.save(tmp_path / "routes.safetensors")
    return path, RouteTable.from_routes(sequences, keeps_gates_T=np.concatenate(kept))


def assert_same_rows(parts, whole, layers, rows_T):
    covered = rows_T[rows_T >= 0]
    np.testing.assert_array_equal(parts.gather(layers, covered), whole.gather(layers, covered))
    np.testing.assert_array_equal(
        parts.gather_weights(layers, covered), whole.gather_weights(layers, covered)
    )
    np.testing.assert_array_equal(parts.versions(covered), whole.versions(covered))
    for name in ("gates", "logits"):
        has = f"has_{name}"
        np.testing.assert_array_equal(getattr(parts, has)(rows_T), getattr(whole, has)(rows_T))
        kept = rows_T[getattr(whole, has)(rows_T)]
        gather = f"gather_{name}"
        np.testing.assert_array_equal(
            getattr(parts, gather)(layers, kept), getattr(whole, gather)(layers, kept)
        )


def test_parts_have_the_rows_of_one_table(step):
    path, whole = step
    parts = PartedTable.open(path)
    rng = np.random.default_rng(1)
    for layers in (LAYERS, (6,), (5, 0, 2), STAGES[1]):
        rows_T = rng.integers(-1, whole.num_rows, 40)
        assert_same_rows(parts, whole, layers, rows_T)
    np.testing.assert_array_equal(parts.gather(LAYERS, np.array([-1, 3]))[:, 0], 0)
    np.testing.assert_array_equal(parts.covered_T, whole.covered_T)
    np.testing.assert_array_equal(parts.expert_counts(), whole.expert_counts())
    assert (parts.newest_version, parts.shape) == (whole.newest_version, whole.shape)
    assert parts.local_rows().all() and parts.local_layers() == LAYERS
    lengths = np.diff(whole.offsets_S1) + 1
    assert parts.token_rows(lengths).equal(whole.token_rows(lengths))


def test_a_process_opens_its_own_sequences_and_layers(step, tmp_path):
    path, whole = step
    index = PartIndex.open(path)
    files = index.files(sequences=[3, 6], layers=[2, 9])
    assert files == ["g1_stage_1.safetensors", "g2_stage_1.safetensors"]
    node = tmp_path / "node"
    node.mkdir()
    for name in files:
        shutil.copy(tmp_path / name, node)
    parts = PartedTable.open(path, [3, 6], [2, 9], folder=node)
    rows_T = np.flatnonzero(parts.local_rows())
    assert rows_T.tolist() == list(range(6, 25)) and parts.local_layers() == STAGES[1]
    assert_same_rows(parts, whole, STAGES[1], rows_T)
    with pytest.raises(TableError, match=r"has not opened[\s\S]*'g0', stage 1"):
        parts.gather([2], np.array([0]))
    with pytest.raises(TableError, match=r"has not opened[\s\S]*'g1', stage 0"):
        parts.gather([0], np.array([7]))
    with pytest.raises(TableError, match=r"has not opened[\s\S]*'g0'"):
        parts.has_gates(np.array([0]))


def test_parts_join_to_the_table(step, tmp_path):
    path, whole = step
    joined = open_table(open_table(path).save(tmp_path / "joined.safetensors"))
    assert joined.columns.keys() == whole.columns.keys()
    for name, column in whole.columns.items():
        np.testing.assert_array_equal(joined.columns[name], column, err_msg=name)


def test_a_part_of_another_step_or_run_is_refused(step, tmp_path):
    path, whole = step
    name = PartIndex.open(path).groups[1].name
    other = routes_of(8, 99, whole.shape.num_experts)
    write_parts(tmp_path, name, [other], STAGES)
    with pytest.raises(TableError, match="belongs to another step or run"):
        PartedTable.open(path)
    # Those of the other groups are what they were.
    PartedTable.open(path, sequences=[0, 4])


def test_a_part_of_another_stage_is_refused(step, tmp_path):
    path, _ = step
    shutil.copy(tmp_path / "g0_stage_1.safetensors", tmp_path / "g0_stage_0.safetensors")
    with pytest.raises(TableError, match="belongs to another step or run"):
        PartedTable.open(path)


def test_damage_and_loss_are_found_before_anything_is_replayed(step, tmp_path):
    path, _ = step
    part = tmp_path / "g2_stage_0.safetensors"
    content = bytearray(part.read_bytes())
    ids = content.index(b"}") // 8 * 8 + 600
    content[ids] ^= 1
    part.write_bytes(content)
    with pytest.raises(TableError, match="damaged|another step"):
        PartedTable.open(path)
    part.unlink()
    with pytest.raises(TableError, match="g2_stage_0"):
        PartedTable.open(path)
    PartedTable.open(path, layers=STAGES[1])


def test_an_index_that_is_none_is_refused(step, tmp_path):
    path, _ = step
    with pytest.raises(TableError, match="no index of routes in parts"):
        PartedTable.open(tmp_path / "g0_stage_0.safetensors")
    tensors = load_file(path)
    del tensors["uncovered_N"]
    save_file(tensors, path, PartIndex.open(path)._description())
    with pytest.raises(TableError, match="no index of routes in parts"):
        PartedTable.open(path)
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(TableError, match="no index of routes in parts"):
        PartedTable.open(path)
    path.unlink()
    with pytest.raises(TableError, match=r"routes\.safetensors"):
        PartedTable.open(path)


def test_an_index_without_counts_says_how_to_get_them(tmp_path):
    groups = [write_parts(tmp_path, "g", [routes_of(5, 0, 16)], STAGES)]
    shape = MoEShape(layers=LAYERS, num_experts=16, top_k=TOP_K)
    index = PartIndex(shape=shape, stages=STAGES, groups=groups)
    parts = PartedTable.open(index.save(tmp_path / "index.safetensors"))
    with pytest.raises(TableError, match="keeps_counts=True"):
        parts.expert_counts()
