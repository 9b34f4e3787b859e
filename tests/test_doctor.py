"""The doctor: a healthy installation is quiet, a sick one is named with cause and fix."""

import importlib.metadata
import json
import sys
from importlib.util import find_spec

import numpy as np
import pytest

from routing_replay.cli import doctor
from routing_replay.cli.model import read_model
from routing_replay.config import ReplayConfig
from routing_replay.errors import ConfigError
from routing_replay.routes.routes import Routes
from routing_replay.routes.shape import MoEShape
from routing_replay.routes.table import RouteTable


def save_table(path, **changes):
    ids = np.tile(np.array([[[0, 1]]], np.uint8), (4, 2, 1))
    routes = Routes(expert_ids_TLK=ids, layers=(0, 1), num_experts=8, **changes)
    RouteTable.from_routes([routes]).save(path)
    return path


def errors(findings):
    return [str(f) for f in findings if f.level == "error"]


def test_this_installation_has_no_errors():
    assert errors(doctor.check_versions()) == []


@pytest.mark.parametrize(
    ("name", "version", "expected"),
    [
        ("sglang", "0.5.9", "sglang: version 0.5.9 is not supported"),
        ("megatron-core", "0.20.0", "megatron-core: version 0.20.0 is not supported"),
        ("torch", "2.5.1+cu121", "torch: version 2.5.1+cu121 is not supported"),
    ],
)
def test_a_version_outside_the_bounds_is_an_error_with_the_command(
    monkeypatch, name, version, expected
):
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda n: version if n == name else real(n))
    (error,) = errors(doctor.check_versions())
    assert expected in error and f"pip install '{name}" in error


def test_a_missing_required_package_is_an_error_and_an_optional_one_is_not(monkeypatch):
    def version(name):
        if name in ("safetensors", "sglang"):
            raise importlib.metadata.PackageNotFoundError(name)
        return "0.18" if name == "megatron-core" else "2.9"

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert errors(doctor.check_versions()) == [
        "error   safetensors: not installed. pip install safetensors"
    ]


def test_a_prerelease_is_compared_as_a_version(monkeypatch):
    real = importlib.metadata.version
    versions = {"sglang": "0.5.12rc1"}
    monkeypatch.setattr(importlib.metadata, "version", lambda n: versions.get(n) or real(n))
    (error,) = errors(doctor.check_versions())
    assert "sglang: version 0.5.12rc1 is not supported" in error  # 0.5.12 is the first


def test_an_environment_without_packaging_gets_a_warning(monkeypatch):
    monkeypatch.setitem(sys.modules, "packaging.requirements", None)
    (warning,) = [f for f in doctor.check_versions() if f.level == "warning"]
    assert warning.what == "the versions cannot be compared" and "packaging" in warning.fix


@pytest.mark.skipif(not find_spec("sglang"), reason="SGLang is not installed")
def test_a_plugin_list_without_us_is_an_error(monkeypatch):
    monkeypatch.setenv("SGLANG_PLUGINS", "other")
    names = {f.name for f in doctor.check_plugin() if f.level == "error"}
    assert "sglang-plugin-list" in names


def test_a_whole_table_of_the_model_is_fine_and_another_model_is_not(tmp_path):
    path = save_table(tmp_path / "t.safetensors")
    model = MoEShape(layers=(0, 1), num_experts=8, top_k=2)
    assert [f.level for f in doctor.check_table(path, model)] == ["ok"]
    other = MoEShape(layers=(0, 1), num_experts=16, top_k=2)
    (error,) = errors(doctor.check_table(path, other))
    assert "another model" in error and "16 experts" in error


def test_a_damaged_table_is_an_error(tmp_path):
    path = save_table(tmp_path / "t.safetensors")
    content = bytearray(path.read_bytes())
    content[-200] ^= 1
    path.write_bytes(content)
    (error,) = errors(doctor.check_table(path))
    assert "the routes file is damaged" in error


def test_missing_routes_and_mixed_versions_are_named_with_their_cause(tmp_path):
    some = np.array([True, False, True, True])
    path = save_table(
        tmp_path / "t.safetensors", covered_T=some, weight_version_T=np.array([3, -1, 3, 4])
    )
    warnings = [f for f in doctor.check_table(path) if f.level == "warning"]
    assert [f.name for f in warnings] == ["table-coverage", "table-versions"]
    assert "1 of 4 rows" in warnings[0].what and "[3, 4]" in warnings[1].what
    none = save_table(tmp_path / "u.safetensors", covered_T=np.zeros(4, bool))
    (error,) = errors(doctor.check_table(none))
    assert "dropped the routes" in error and "--url URL" in error


@pytest.mark.skipif(not find_spec("megatron"), reason="megatron-core is not installed")
def test_a_megatron_configuration_that_breaks_replay_is_named(tmp_path):
    settings = {"num_moe_experts": 8, "moe_router_topk": 2, "moe_router_fusion": True}
    path = tmp_path / "args.json"
    path.write_text(json.dumps(settings))
    findings = list(doctor.check_megatron(path, ReplayConfig()))
    assert [f.name for f in findings if f.level == "error"] == ["router-fusion"]
    path.write_text(json.dumps({**settings, "moe_router_fusion": False}))
    assert errors(doctor.check_megatron(path, ReplayConfig())) == []


def test_an_unreadable_configuration_is_a_finding_not_a_crash(tmp_path):
    (error,) = errors(doctor.check_megatron(tmp_path / "absent.json", ReplayConfig()))
    assert "the configuration cannot be read" in error


@pytest.mark.parametrize(
    ("config", "layers"),
    [
        ({"num_experts": 8}, (0, 1, 2, 3)),
        # Qwen: layer i is routed where (i + 1) is a multiple of the step and i is not named dense.
        ({"num_experts": 8, "decoder_sparse_step": 2, "mlp_only_layers": [3]}, (1,)),
        ({"n_routed_experts": 8, "first_k_dense_replace": 1, "moe_layer_freq": 1}, (1, 2, 3)),
        ({"num_local_experts": 8, "moe_layer_freq": [0, 1, 0, 1]}, (1, 3)),
    ],
)
def test_the_routed_layers_are_read_from_a_checkpoint(tmp_path, config, layers):
    settings = {"num_hidden_layers": 4, "num_experts_per_tok": 2, **config}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert read_model(tmp_path) == MoEShape(layers=layers, num_experts=8, top_k=2)


def test_a_dense_checkpoint_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"num_hidden_layers": 4}))
    with pytest.raises(ConfigError, match="is not the configuration of a Mixture-of-Experts model"):
        read_model(tmp_path)


def test_a_server_that_does_not_answer_is_an_error_that_names_it():
    (error,) = errors(doctor.check_server("http://127.0.0.1:9"))
    assert "http://127.0.0.1:9" in error
