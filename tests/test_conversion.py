"""Import and export: the routes survive, and no pickle runs code."""

import base64
import json
import os
import pickle

import numpy as np
import pytest
import torch

from routing_replay.errors import DataError
from routing_replay.routes import conversion, payload
from routing_replay.routes.conversion import export_rollout_dump, export_sglang, import_routes
from routing_replay.routes.routes import Routes
from routing_replay.routes.shape import MoEShape
from routing_replay.routes.spool import RouteSpool
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
    assert sorted(os.listdir(tmp_path)) == ["4.pt", "t.safetensors"]  # no spool is left


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


def test_lists_of_routers_are_imported(tmp_path, sequences):
    routers = [
        [torch.from_numpy(r.expert_ids_TLK[:, place].astype(np.int64)) for r in sequences]
        for place in range(3)
    ]
    torch.save(routers, tmp_path / "rank0_routing_replay.pt")
    table = import_routes(
        "routers", tmp_path / "rank0_routing_replay.pt", tmp_path / "t.safetensors", MODEL
    )
    assert_same(table, sequences)
    assert table.source == "training"
    torch.save(routers[:2], tmp_path / "two.pt")
    with pytest.raises(DataError, match="expected 3 routers.*got 2 routers"):
        import_routes("routers", tmp_path / "two.pt", tmp_path / "t2.safetensors", MODEL)


def trace_lines(sequences, step=3, first=0):
    for routes in sequences:
        for place in range(3):
            ids = np.sort(routes.expert_ids_TLK[:, place], -1).tolist()
            yield {"step": step, "block": "decoder", "layer": place + first, "top_indices": ids}
            yield {"step": step, "block": "mtp", "layer": place, "top_indices": ids}


def test_router_traces_are_imported_microbatch_by_microbatch(tmp_path, sequences):
    lines = [*trace_lines(sequences), *trace_lines(sequences[:1], step=4)]
    (tmp_path / "trace.jsonl").write_text("\n".join(map(json.dumps, lines)))
    # The trace counts the routed layers of its stage from 0; globally they are 1, 2, 3.
    table = import_routes(
        "trace", tmp_path / "trace.jsonl", tmp_path / "t.safetensors", MODEL, first_layer=1
    )
    assert table.num_sequences == 2
    for got, expected in zip(table.sequences(), sequences, strict=True):
        np.testing.assert_array_equal(got.expert_ids_TLK, np.sort(expected.expert_ids_TLK, -1))
    with pytest.raises(DataError, match=r"one of the layers \(1, 2, 3\); got layer 0 \+ 0"):
        import_routes("trace", tmp_path / "trace.jsonl", tmp_path / "u.safetensors", MODEL)


def test_a_trace_with_an_incomplete_microbatch_is_refused(tmp_path, sequences):
    lines = list(trace_lines(sequences))[:-2]
    (tmp_path / "trace.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(DataError, match=r"1 whole microbatches, left over by layer: \{1: 1, 2: 1"):
        import_routes(
            "trace", tmp_path / "trace.jsonl", tmp_path / "t.safetensors", MODEL, first_layer=1
        )


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


def test_vllm_responses_are_imported(tmp_path, sequences):
    routes = sequences[0]
    choice = {"routed_experts": wide(routes).tolist(), "token_ids": [1, 2, 3]}
    response = {"choices": [choice], "prompt_token_ids": [7, 8, 9]}
    (tmp_path / "r.jsonl").write_text(json.dumps(response))
    table = import_routes("vllm", tmp_path / "r.jsonl", tmp_path / "t.safetensors", MODEL)
    assert_same(table, [routes])
    assert table.origin_T.tolist() == [1, 1, 1, 2, 2]


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


def test_the_spool_keeps_gates_only_if_every_sequence_has_them(tmp_path, sequences):
    gates = np.full((5, 3, 2), 0.25, np.float16)
    with_gates = random_routes(5, gate_probs_TLK=gates)
    for parts, has_gates in (([with_gates] * 2, True), ([with_gates, sequences[1]], False)):
        with RouteSpool(MODEL, tmp_path / "t.safetensors") as spool:
            for part in parts:
                spool.add(part)
            spool.finish("rollout")
        table = RouteTable.open(tmp_path / "t.safetensors")
        assert (table.gate_probs_LTK is not None) == has_gates
        assert_same(table, parts)


def test_files_of_another_format_say_what_was_expected(tmp_path):
    torch.save({"weights": torch.zeros(2)}, tmp_path / "x.pt")
    with pytest.raises(DataError, match='another format; expected a dictionary with a list "samp'):
        import_routes("rollout", tmp_path / "x.pt", tmp_path / "t.safetensors", MODEL)
    (tmp_path / "r.jsonl").write_text("not json\n")
    with pytest.raises(DataError, match="another format; expected JSON or JSON lines"):
        import_routes("sglang", tmp_path / "r.jsonl", tmp_path / "t.safetensors", MODEL)
    with pytest.raises(DataError, match="the file cannot be read"):
        import_routes("vllm", tmp_path / "absent.jsonl", tmp_path / "t.safetensors", MODEL)
