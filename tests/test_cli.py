"""The console command: what it prints, in words and as JSON, and its exit codes."""

import base64
import json
import subprocess
import sys

import numpy as np
import pytest

from routing_replay.cli import main
from routing_replay.cli.model import parse_layers
from routing_replay.errors import ConfigError
from routing_replay.routes.routes import Routes
from routing_replay.routes.table import RouteTable

MODEL_FLAGS = ["--experts", "8", "--top-k", "2", "--layers", "0-1"]


@pytest.fixture
def table(tmp_path):
    ids = np.random.default_rng(0).random((6, 2, 8)).argsort(-1)[..., :2].astype(np.uint8)
    routes = Routes(expert_ids_TLK=ids, layers=(0, 1), num_experts=8)
    return RouteTable.from_routes([routes]).save(tmp_path / "a.safetensors")


@pytest.fixture
def other(tmp_path, table):
    ids = np.array(RouteTable.open(table).expert_ids_LTK.swapaxes(0, 1))
    ids[:, 1] = np.sort((ids[:, 1] + 1) % 8, -1)
    routes = Routes(expert_ids_TLK=ids, layers=(0, 1), num_experts=8)
    return RouteTable.from_routes([routes]).save(tmp_path / "b.safetensors")


def run_json(capsys, *arguments):
    code = main([*map(str, arguments), "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_every_verb_explains_itself(capsys):
    verbs = ("doctor", "inspect", "diff", "bisect", "noise", "report", "convert")
    for verb in ([], *([name] for name in verbs)):
        assert main([*verb, "--help"]) == 0
        assert "usage: routing-replay" in capsys.readouterr().out


def test_wrong_usage_exits_with_two(capsys):
    assert main([]) == 2
    assert main(["inspect"]) == 2
    assert main(["convert", "a", "b"]) == 2
    assert "one of the arguments --from --to is required" in capsys.readouterr().err


def test_inspect_prints_text_and_json(capsys, table):
    assert main(["inspect", str(table)]) == 0
    assert "2 routed layers, 8 experts, top-2" in capsys.readouterr().out
    code, content = run_json(capsys, "inspect", table)
    assert (code, content["num_rows"], len(content["loads"])) == (0, 6, 2)


def test_a_file_that_is_not_ours_exits_with_one_and_a_message(capsys, tmp_path):
    (tmp_path / "x.pt").write_bytes(b"PK not ours")
    assert main(["inspect", str(tmp_path / "x.pt")]) == 1
    assert "routing-replay: the file is no safetensors file" in capsys.readouterr().err
    code, content = run_json(capsys, "inspect", tmp_path / "x.pt")
    assert (code, content["error"]) == (1, "TableError")


def test_diff_names_the_layer_and_can_fail_a_job(capsys, table, other):
    code, content = run_json(capsys, "diff", table, other)
    assert (
        code == 0 and content["layers"][0]["overlap"] == 1 and content["layers"][1]["overlap"] < 1
    )
    assert main(["diff", str(table), str(other), "--min-overlap", "0.99"]) == 1
    assert main(["diff", str(table), str(table), "--min-overlap", "0.99"]) == 0
    assert "overlap@K 1.000000" in capsys.readouterr().out


def test_decoding_needs_tokens_and_a_tokenizer(capsys, table):
    assert main(["diff", str(table), str(table), "--tokenizer", "x"]) == 1
    assert "expected --tokens FILE --tokenizer PATH" in capsys.readouterr().err


def test_report_writes_the_page_and_repeats_the_warnings(capsys, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    row = {"step": 0, "train_infer/kl_k3": 0.5}
    (run / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    (run / "config.json").write_text("{}")
    assert main(["report", str(run), "-o", str(tmp_path / "r.html")]) == 0
    assert "error  " in capsys.readouterr().out and (tmp_path / "r.html").exists()
    code, content = run_json(capsys, "report", run, "-o", tmp_path / "r.html")
    assert code == 0 and content["findings"][str(run)][0]["level"] == "error"


def test_convert_imports_and_exports(capsys, tmp_path, table):
    ids = np.array(RouteTable.open(table).expert_ids_LTK.swapaxes(0, 1)).astype("<i4")
    meta = {
        "prompt_tokens": 3,
        "completion_tokens": 4,
        "routed_experts": base64.b64encode(ids.tobytes()).decode(),
    }
    (tmp_path / "r.jsonl").write_text(json.dumps({"meta_info": meta}))
    target = tmp_path / "c.safetensors"
    assert main(["convert", str(tmp_path / "r.jsonl"), str(target), "--from", "sglang"]) == 1
    assert "do not describe their model" in capsys.readouterr().err
    code, content = run_json(
        capsys, "convert", tmp_path / "r.jsonl", target, "--from", "sglang", *MODEL_FLAGS
    )
    assert code == 0 and content == {
        "target": str(target),
        "sequences": 1,
        "rows": 6,
        "covered": 6,
    }
    assert main(["diff", str(table), str(target), "--min-overlap", "1"]) == 0
    assert main(["convert", str(target), str(tmp_path / "s.jsonl"), "--to", "sglang"]) == 0
    exported = json.loads((tmp_path / "s.jsonl").read_text())["meta_info"]
    assert exported["routed_experts"] == meta["routed_experts"]


def test_doctor_exits_with_one_on_an_error(capsys, table, tmp_path):
    code, content = run_json(capsys, "doctor", "--table", table, *MODEL_FLAGS)
    levels = {f["name"]: f["level"] for f in content["findings"]}
    assert levels["table"] == levels["torch"] == "ok"
    assert main(["doctor", "--table", str(tmp_path / "absent.safetensors")]) == 1
    assert capsys.readouterr().out.startswith("error   table: the routes file cannot be read")


def test_layers_are_given_as_ranges():
    assert parse_layers("0-2,5") == (0, 1, 2, 5)
    with pytest.raises(
        ConfigError, match="the list of layers cannot be read; expected as 0-3,5,7; got '1-x'"
    ):
        parse_layers("1-x")


def test_the_package_runs_as_a_module(table):
    command = [sys.executable, "-m", "routing_replay.cli", "inspect", str(table), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["num_rows"] == 6


def test_the_command_starts_without_megatron_sglang_or_transformers():
    code = (
        "import sys; from routing_replay.cli import main; main(['inspect', '--help']); "
        "print([m for m in ('megatron', 'sglang', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
