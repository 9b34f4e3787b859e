"""RouteTable: what goes in comes out, and a file that is not what it says is refused."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from routing_replay.errors import TableError
from routing_replay.routes.routes import ROW_COLUMNS, Routes
from routing_replay.routes.shape import MoEShape
from routing_replay.routes.table import RouteTable

LAYERS, EXPERTS, TOP_K = (1, 2, 4), 16, 3


def random_routes(num_rows, seed, experts=EXPERTS, layers=LAYERS, gates=True):
    """Distinct random experts per row and layer; every third row uncovered."""
    rng = np.random.default_rng(seed)
    shape = (num_rows, len(layers), experts)
    ids = np.argsort(rng.random(shape), axis=-1)[..., :TOP_K]
    return Routes(
        expert_ids_TLK=ids.astype(np.uint8 if experts <= 256 else np.uint16),
        covered_T=np.arange(num_rows) % 3 != 2,
        layers=layers,
        num_experts=experts,
        combine_weights_TLK=rng.random(ids.shape, np.float32) if gates else None,
        gate_probs_TLK=rng.random(ids.shape).astype(np.float16) if gates else None,
        weight_version_T=np.full(num_rows, seed, np.int64),
    )


def assert_same_routes(left, right):
    for name in ROW_COLUMNS:
        np.testing.assert_array_equal(getattr(left, name), getattr(right, name), err_msg=name)
    assert (left.layers, left.num_experts) == (right.layers, right.num_experts)


@pytest.fixture
def sequences():
    return [random_routes(n, seed) for seed, n in enumerate((5, 1, 0, 8))]


@pytest.fixture
def path(tmp_path, sequences):
    return RouteTable.from_routes(sequences).save(tmp_path / "routes.safetensors")


def test_every_sequence_survives_the_file(path, sequences):
    table = RouteTable.open(path)
    assert table.num_sequences == 4 and table.num_rows == 14
    for ours, read in zip(sequences, table.sequences(), strict=True):
        assert_same_routes(ours, read)


def test_gates_of_some_rows_are_those_of_the_whole_table(tmp_path, sequences):
    whole = RouteTable.from_routes(sequences)
    keeps_gates_T = np.arange(14) % 4 == 1  # rows 1, 5, 9 and 13 of the sequences' 5, 1, 0 and 8
    sampled = RouteTable.from_routes(sequences, keeps_gates_T=keeps_gates_T)
    sampled = RouteTable.open(sampled.save(tmp_path / "r.safetensors"))
    rows_T = np.array([13, -1, 5, 2, 1, 9])
    has_gates_T = sampled.has_gates(rows_T)
    assert has_gates_T.tolist() == [True, False, True, False, True, True]
    assert whole.has_gates(rows_T).tolist() == [True, False, True, True, True, True]
    rows_M = rows_T[has_gates_T]
    np.testing.assert_array_equal(
        sampled.gather_gates((4, 1), rows_M), whole.gather_gates((4, 1), rows_M)
    )
    # A slot is one byte of id and two of gate.
    slots = 14 * len(LAYERS) * TOP_K
    assert whole.gate_probs_LNK.nbytes == 2 * slots
    assert sampled.gate_probs_LNK.nbytes == 2 * slots * 4 // 14
    assert sampled.sequence(0).gate_probs_TLK is None


def test_a_table_without_a_row_with_gates_has_none(sequences):
    table = RouteTable.from_routes(sequences, keeps_gates_T=np.zeros(14, bool))
    assert table.gather_gates(LAYERS, np.array([0])) is None
    assert not table.has_gates(np.arange(14)).any()


@pytest.mark.parametrize("rows", [[1, 1, 2], [2, 1, 3], [1, 2, 14], [-1, 0, 1]])
def test_gates_of_rows_that_are_not_in_the_table_are_damage(tmp_path, sequences, rows):
    table = RouteTable.from_routes(sequences, keeps_gates_T=np.arange(14) < 3)
    table.gate_rows_N[:] = rows
    with pytest.raises(TableError, match="the routes file is damaged"):
        RouteTable.open(table.save(tmp_path / "r.safetensors"))


def test_more_than_256_experts_are_kept_in_two_bytes(tmp_path):
    routes = random_routes(4, 0, experts=512)
    path = RouteTable.from_routes([routes]).save(tmp_path / "r.safetensors")
    table = RouteTable.open(path)
    assert table.expert_ids_LTK.dtype == np.uint16
    assert_same_routes(routes, table.sequence(0))


def test_any_safetensors_reader_opens_the_file(path, sequences):
    tensors = load_file(path)
    np.testing.assert_array_equal(
        tensors["expert_ids_LTK"][:, :5], sequences[0].expert_ids_TLK.swapaxes(0, 1)
    )


def test_rows_point_at_the_tokens_own_routes_and_skip_uncovered_ones(path, sequences):
    table = RouteTable.open(path)
    # The last sequence owns rows 6..13 of 14; every third of its rows is uncovered.
    assert table.rows(3, num_tokens=10).tolist() == [6, 7, -1, 9, 10, -1, 12, 13, -1, -1]
    row = table.rows(3, num_tokens=10)[4]
    np.testing.assert_array_equal(table.expert_ids_LTK[:, row], sequences[3].expert_ids_TLK[4])


def test_as_many_rows_as_tokens_means_they_are_shifted(path):
    with pytest.raises(TableError, match=r"expected at most 7 rows for 8 tokens; got 8"):
        RouteTable.open(path).rows(3, num_tokens=8)


def test_a_table_of_another_model_names_both(path):
    ours = MoEShape(layers=(0, 1, 2), num_experts=32, top_k=4)
    with pytest.raises(TableError, match=r"layers 0-2, 32 experts, top-4.*1-2,4, 16 experts"):
        RouteTable.open(path).check_shape(ours)


def test_sequences_of_different_models_do_not_mix():
    with pytest.raises(TableError, match="the sequences belong to different models: layers differ"):
        RouteTable.from_routes([random_routes(2, 0), random_routes(2, 0, layers=(0, 1, 2))])


def test_every_flipped_byte_is_noticed(path, tmp_path):
    whole = path.read_bytes()
    reference = [r.expert_ids_TLK for r in RouteTable.open(path).sequences()]
    rng = np.random.default_rng(0)
    noticed = 0
    for at in rng.integers(0, len(whole), 300):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << int(rng.integers(8))
        other = tmp_path / "damaged.safetensors"
        other.write_bytes(damaged)
        try:
            table = RouteTable.open(other)
        except TableError:
            noticed += 1
        else:  # white space and the like: then the content must be the original
            for ours, read in zip(reference, table.sequences(), strict=True):
                np.testing.assert_array_equal(ours, read.expert_ids_TLK)
    assert noticed > 250


@pytest.mark.parametrize("content", [b"", b"short", b"PK\x03\x04 a zip file, say", b"{}" * 99])
def test_a_file_that_is_no_safetensors_file_is_told_so(tmp_path, content):
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(TableError, match="the file is no safetensors file.*first bytes b'"):
        RouteTable.open(tmp_path / "x.pt")


@pytest.mark.parametrize("kept", [200, -1])
def test_a_file_cut_short_is_damaged(path, kept):
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(TableError, match="damaged"):
        RouteTable.open(path)


def test_a_foreign_safetensors_file_is_named_so(tmp_path):
    from safetensors.numpy import save_file

    save_file({"x": np.zeros(3)}, tmp_path / "weights.safetensors")
    with pytest.raises(TableError, match="not a routes file"):
        RouteTable.open(tmp_path / "weights.safetensors")


def test_a_lying_shape_does_not_allocate(path):
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    header["expert_ids_LTK"]["shape"] = [3, 1 << 40, 1 << 40]
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + whole[8 + length :])
    with pytest.raises(TableError, match="does not fit"):
        RouteTable.open(path)


def test_a_full_disk_leaves_the_earlier_file_whole(path, sequences):
    import resource

    before = path.read_bytes()
    table = RouteTable.from_routes(sequences * 40)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    import signal

    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, hard))
    try:
        with pytest.raises(TableError, match="cannot be written.*earlier file of this name"):
            table.save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]
