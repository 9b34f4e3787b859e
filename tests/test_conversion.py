"""Import and export: the routes survive, and no pickle runs code."""

import base64
import json
import os
import pickle

import numpy as np
import pytest
import torch

from routing_replay.errors import ConfigError, DataError
from routing_replay.routes import conversion, payload
from routing_replay.routes.conversion import export_rollout_dump, export_sglang, import_routes
from routing_replay.routes.routes import Routes
from routing_replay.routes.shape import MoEShape
from routing_replay.routes.table import RouteTable

# Layer 0 is dense: stock engines return zeros for it.
MODEL = MoEShape(layers=(1, 2, 3), num_experts=8, top_k=2)


def random_routes(num_rows, seed=0, **changes):
    scores = np.random.default_rng(seed).random((num_rows, 3, 8))
    ids_TLK = scores.argsort(-1)[..., :2].astype(np.uint8)
    return Routes(expert_ids_TLK=ids_TLK, layers=MODEL.layers, num_experts=8, **changes)


def wide(routes):
    all_TLK = np.zeros((routes.num_rows, 4, 2), np.int32)
    all_TLK[:, 1:] = routes.expert_ids_TLK
    return all_TLK


@pytest.fixture
def sequences():
    return [random_routes(5, seed=0), random_routes(9, seed=1)]


def assert_same(table, sequences):
    assert table.num_sequences == len(sequences)
    for got, expected in zip(table.sequences(), sequences, strict=True):
        np.testing.assert_array_equal(got.expert_ids_TLK, expected.expert_ids_TLK)
        np.testing.assert_array_equal(got.covered_T, expected.covered_T)


@pytest.mark.parametrize("as_array", [torch.from_numpy, np.asarray], ids=["slime", "miles"])
def test_rollout_dumps_are_imported(tmp_path, sequences, as_array):
    samples = [
        {
            "tokens": list(range(r.num_rows + 1)),
            "status": "completed",
            "rollout_routed_experts": as_array(wide(r)),
            "reward": 1.0,
        }
        for r in sequences
    ]
    samples.append({"tokens": [1, 2, 3], "rollout_routed_experts": None})
    torch.save({"rollout_id": 4, "samples": samples}, tmp_path / "4.pt")
    table = import_routes("rollout", tmp_path / "4.pt", tmp_path / "t.safetensors", MODEL)
    missing = conversion._uncovered(MODEL, 2)
    assert_same(table, [*sequences, missing])
    assert table.source == "rollout"
    assert sorted(os.listdir(tmp_path)) == ["4.pt", "t.safetensors"]


class Harmful:
    """Unpickling this would create a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("save", [torch.save, lambda x, p: p.write_bytes(pickle.dumps(x))])
def test_a_pickle_that_wants_to_run_code_is_refused_and_does_not(tmp_path, save):
    trap = tmp_path / "trap"
    save({"samples": [Harmful(trap)]}, tmp_path / "evil.pt")
    trap.unlink(missing_ok=True)
    with pytest.raises(DataError, match="not one of tensors and plain values.*runs no code"):
        import_routes("rollout", tmp_path / "evil.pt", tmp_path / "t.safetensors", MODEL)
    assert not trap.exists() and not (tmp_path / "t.safetensors").exists()


def test_a_sample_with_routes_of_other_tokens_is_refused(tmp_path, sequences):
    sample = {"tokens": [1, 2], "rollout_routed_experts": torch.from_numpy(wide(sequences[0]))}
    torch.save({"samples": [sample]}, tmp_path / "x.pt")
    with pytest.raises(DataError, match="expected 1 rows for 2 tokens; got 5.*sequence 0 of"):
        import_routes("rollout", tmp_path / "x.pt", tmp_path / "t.safetensors", MODEL)


def test_sglang_responses_are_imported_stock_and_compact(tmp_path, sequences):
    stock = base64.b64encode(wide(sequences[0]).tobytes()).decode()
    compact = base64.b64encode(payload.encode(sequences[1])).decode()
    delta = base64.b64encode(payload.encode(sequences[1][4:], start=4)).decode()
    responses = [
        {"meta_info": {"prompt_tokens": 2, "completion_tokens": 4, "routed_experts": stock}},
        {"meta_info": {"prompt_tokens": 2, "completion_tokens": 8, "routed_experts": compact}},
        {"meta_info": {"prompt_tokens": 2, "completion_tokens": 8, "routed_experts": delta}},
    ]
    (tmp_path / "r.json").write_text(json.dumps(responses))
    table = import_routes("sglang", tmp_path / "r.json", tmp_path / "t.safetensors", MODEL)
    uncovered = sequences[1].uncover(np.arange(9) < 4)
    assert_same(table, [*sequences, uncovered])


def test_an_exported_dump_and_exported_responses_come_back_equal(tmp_path, sequences):
    table = RouteTable.from_routes(sequences)
    tokens = [list(range(r.num_rows + 1)) for r in sequences]
    export_rollout_dump(table, tmp_path / "dump.pt", tokens)
    export_sglang(table, tmp_path / "r.jsonl")
    for kind, name in (("rollout", "dump.pt"), ("sglang", "r.jsonl")):
        back = import_routes(kind, tmp_path / name, tmp_path / f"{kind}.safetensors", MODEL)
        assert_same(back, sequences)
    with pytest.raises(DataError, match="expected 6 tokens; got 7"):
        export_rollout_dump(table, tmp_path / "dump.pt", [list(range(7))])


def test_missing_rows_are_not_exported_as_zeros(tmp_path, sequences):
    table = RouteTable.from_routes([sequences[0].uncover(np.arange(5) == 2)])
    with pytest.raises(DataError, match="knows no missing rows.*got 1 rows"):
        export_sglang(table, tmp_path / "r.jsonl")


def test_an_export_that_fails_leaves_no_file(tmp_path, sequences):
    table = RouteTable.from_routes([sequences[0], sequences[1].uncover(np.arange(9) == 2)])
    with pytest.raises(DataError, match="knows no missing rows"):
        export_sglang(table, tmp_path / "r.jsonl")
    with pytest.raises(DataError, match="the responses cannot be written; got No such file"):
        export_sglang(RouteTable.from_routes(sequences), tmp_path / "absent" / "r.jsonl")
    assert os.listdir(tmp_path) == []


def test_files_of_another_format_say_what_was_expected(tmp_path):
    torch.save({"weights": torch.zeros(2)}, tmp_path / "x.pt")
    with pytest.raises(DataError, match='another format; expected a dictionary with a list "samp'):
        import_routes("rollout", tmp_path / "x.pt", tmp_path / "t.safetensors", MODEL)
    (tmp_path / "r.jsonl").write_text("not json\n")
    with pytest.raises(DataError, match="another format; expected JSON or JSON lines"):
        import_routes("sglang", tmp_path / "r.jsonl", tmp_path / "t.safetensors", MODEL)
    with pytest.raises(DataError, match="the file cannot be read"):
        import_routes("sglang", tmp_path / "absent.jsonl", tmp_path / "t.safetensors", MODEL)
    torch.save({"samples": [{"ids": [1]}]}, tmp_path / "y.pt")
    with pytest.raises(DataError, match='expected a dictionary with "tokens".*sample 0'):
        import_routes("rollout", tmp_path / "y.pt", tmp_path / "t.safetensors", MODEL)
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(DataError, match="the file holds no sequence"):
        import_routes("sglang", tmp_path / "empty.jsonl", tmp_path / "t.safetensors", MODEL)
    with pytest.raises(ConfigError, match="unknown kind of file.*Did you mean 'sglang'"):
        import_routes("sglan", tmp_path / "r.jsonl", tmp_path / "t.safetensors", MODEL)
