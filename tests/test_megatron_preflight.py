"""Preflight: every configuration under which replay would be wrong is refused, with its fix."""

import dataclasses
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from packaging.version import Version

from routing_replay import cli
from routing_replay.config import ReplayConfig, add_arguments
from routing_replay.errors import PreflightError
from routing_replay.megatron import preflight

TESTED = preflight.TESTED_VERSIONS[-1]


def config(**changes):
    """A configuration that passes, with changes; the names are TransformerConfig's."""
    settings = {
        "num_moe_experts": 8,
        "moe_router_topk": 2,
        "moe_router_load_balancing_type": "none",
        "moe_router_fusion": False,
        "cuda_graph_impl": "none",
    }
    return SimpleNamespace(**{**settings, **changes})


def names(findings, is_error=True):
    return [f.name for f in findings if f.is_error == is_error]


def test_a_plain_configuration_has_no_finding():
    assert preflight.examine(config(), version=TESTED) == []


@pytest.mark.parametrize(
    ("changes", "name", "fix"),
    [
        ({"num_moe_experts": None}, "dense-model", "Leave routing replay disabled"),
        ({"moe_router_fusion": True}, "router-fusion", "--moe-router-fusion"),
        ({"moe_router_load_balancing_type": "sinkhorn"}, "sinkhorn", "Train with aux_loss"),
        (
            {"moe_router_load_balancing_type": ["aux_loss", "quantile_balancing"]},
            "quantile-balancing",
            "Train with aux_loss",
        ),
        ({"moe_n_hash_layers": 3}, "hash-layers", "released version"),
        ({"moe_expert_capacity_factor": 1.25}, "capacity", "without a capacity factor"),
        ({"moe_expert_rank_capacity_factor": 1.5}, "rank-capacity", "without moe_paged_stash"),
        ({"moe_router_force_load_balancing": True}, "forced-routing", "benchmarks only"),
        ({"moe_router_force_biased": 0.5}, "forced-routing", "benchmarks only"),
        ({"cuda_graph_impl": "full_iteration"}, "cuda-graph", "--cuda-graph-modules"),
        (
            {"cuda_graph_impl": "local", "cuda_graph_modules": ["attn", "moe_router"]},
            "cuda-graph",
            "attn alone is fine",
        ),
        ({"enable_cuda_graph": True}, "cuda-graph", "--cuda-graph-modules"),
        ({"overlap_moe_expert_parallel_comm": True}, "expert-overlap", "Drop --overlap-moe"),
    ],
)
def test_what_would_replay_wrongly_is_an_error_with_a_fix(changes, name, fix):
    findings = preflight.examine(config(**changes), version=TESTED)
    assert names(findings) == [name]
    assert fix in findings[0].fix and findings[0].cause


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"moe_input_jitter_eps": 0.01}, "input-jitter"),
        ({"moe_router_enable_expert_bias": True}, "expert-bias"),
        ({"mtp_num_layers": 1}, "mtp"),
        ({"moe_enable_routing_replay": True}, "stock-replay"),
    ],
)
def test_what_one_should_know_is_a_warning(changes, name):
    findings = preflight.examine(config(**changes), version=TESTED)
    assert names(findings) == [] and names(findings, is_error=False) == [name]


def test_the_flex_dispatcher_needs_no_warning():
    # It takes the top-k of the gates anew: another expert only where a gate is exactly 0, and that
    # expert's output is multiplied by 0.
    assert preflight.examine(config(moe_token_dispatcher_type="flex"), version=TESTED) == []


def test_a_graph_of_the_attention_alone_is_fine():
    graphed = config(cuda_graph_impl="local", cuda_graph_modules=["attn"])
    assert preflight.examine(graphed, version=TESTED) == []


ROUTER_GRAPH = {"cuda_graph_impl": "transformer_engine", "cuda_graph_modules": ["moe_router"]}
CAPTURED = ReplayConfig(captured_routers=True, agreement_every=0)


@pytest.mark.parametrize("impl", ["transformer_engine", "local"])
def test_a_captured_router_replays_if_it_is_asked_for(impl):
    graphed = config(
        cuda_graph_impl=impl, cuda_graph_modules=["attn", "moe_router", "moe_preprocess"]
    )
    assert preflight.examine(graphed, CAPTURED, TESTED) == []
    (finding,) = preflight.examine(graphed, version=TESTED)
    assert finding.name == "cuda-graph" and "captured_routers" in finding.fix


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"cuda_graph_impl": "full_iteration", "cuda_graph_modules": []}, "all microbatches"),
        ({"cuda_graph_modules": []}, "whole MoE layers"),
        ({"cuda_graph_modules": ["moe"]}, "whole MoE layers"),
        ({"recompute_granularity": "selective", "recompute_modules": ["moe"]}, "recomputed"),
    ],
)
def test_a_graph_whose_routes_no_buffer_can_bring_stays_refused(changes, cause):
    findings = preflight.examine(config(**(ROUTER_GRAPH | changes)), CAPTURED, TESTED)
    assert names(findings) == ["cuda-graph"]
    assert cause in findings[0].cause and "captured_routers" not in findings[0].fix


def test_what_a_captured_router_cannot_do_is_an_error():
    asked = ReplayConfig(captured_routers=True, unset_router_fusion=True)
    findings = preflight.examine(config(**ROUTER_GRAPH, moe_router_fusion=True), asked, TESTED)
    assert names(findings) == ["captured-agreement", "captured-fusion"]
    kernel = ReplayConfig(captured_routers=True, agreement_every=0, kernel=True)
    assert preflight.examine(config(**ROUTER_GRAPH, moe_router_fusion=True), kernel, TESTED) == []


def test_unsetting_the_fusion_makes_it_acceptable():
    replay = ReplayConfig(unset_router_fusion=True)
    assert preflight.examine(config(moe_router_fusion=True), replay, TESTED) == []


def test_the_kernel_takes_a_fused_router():
    replay = ReplayConfig(kernel=True)
    assert preflight.examine(config(moe_router_fusion=True), replay, TESTED) == []


@pytest.mark.parametrize("version", preflight.TESTED_VERSIONS)
def test_a_tested_version_has_no_finding(version):
    assert preflight.examine(config(), version=version) == []


def test_the_versions_are_those_of_make_test_versions():
    source = Path(__file__).parent.parent.joinpath(".ci", "test_versions").read_text()
    assert f"versions={preflight.TESTED_VERSIONS},".replace("'", '"') in source


@pytest.mark.parametrize("version", ["0.15.3", "0.16.0", "0.20.0", "0.20.0rc1", "1.0.0"])
def test_an_unsupported_version_is_an_error_that_names_the_tested_ones(version):
    [finding] = preflight.examine(config(), version=version)
    assert finding.is_error and f"megatron-core {version} is not supported" in finding.what
    assert all(tested in finding.fix for tested in preflight.TESTED_VERSIONS)


@pytest.mark.parametrize("version", ["0.16.2", "0.17.0", "0.19.0rc7", "0.19.2+d98e8a64", "0.19.99"])
def test_an_untested_version_is_a_warning_that_names_the_tested_ones(version):
    [finding] = preflight.examine(config(), version=version)
    assert not finding.is_error and f"megatron-core {version} was not tested" in finding.what
    assert all(tested in finding.fix for tested in preflight.TESTED_VERSIONS)


def test_require_raises_the_error_and_warns_of_the_rest():
    with pytest.raises(PreflightError, match="moe_router_fusion is on.*--moe-router-fusion"):
        preflight.require(config(moe_router_fusion=True), ReplayConfig())
    with pytest.warns(UserWarning, match="expert-bias"):
        preflight.require(config(moe_router_enable_expert_bias=True), ReplayConfig())


def test_saved_arguments_are_read_by_their_names():
    arguments = SimpleNamespace(num_experts=8, moe_router_fusion=True)
    assert names(preflight.examine(arguments, version=TESTED)) == ["router-fusion"]


def test_a_configuration_without_megatrons_names_is_not_taken_for_a_dense_model():
    nested = SimpleNamespace(model={"num_moe_experts": 8})
    assert names(preflight.examine(nested, version=TESTED)) == ["no-moe-settings"]


@pytest.mark.skipif(not find_spec("megatron"), reason="megatron-core is not installed")
def test_the_doctor_reads_a_saved_configuration_without_a_model(tmp_path, capsys):
    # Megatron's own configuration, as its checkpoints' run configurations hold it.
    from recipes.model import cpu  # noqa: F401  isort: skip
    from megatron.core.transformer.transformer_config import TransformerConfig

    real = TransformerConfig(
        num_layers=2, hidden_size=16, num_attention_heads=2, num_moe_experts=8, moe_router_topk=2
    )
    settings = {f.name: getattr(real, f.name) for f in dataclasses.fields(real)}
    simple = {k: v for k, v in settings.items() if isinstance(v, int | float | str | list | None)}
    path = tmp_path / "saved.yaml"
    for changes, code, text in (
        ({}, 0, f"replay works with {path}"),
        ({"moe_router_fusion": True}, 1, "router-fusion: moe_router_fusion is on"),
        ({"moe_expert_capacity_factor": 1.5}, 1, "capacity: moe_expert_capacity_factor is set"),
    ):
        path.write_text(yaml.safe_dump(simple | changes))
        assert cli.main(["doctor", "--megatron-args", str(path)]) == code
        assert text in capsys.readouterr().out


@pytest.mark.skipif(
    Version(metadata.version("megatron-core")) < Version("0.17"),
    reason="the wheels before 0.17 hold no training script",
)
def test_the_flags_of_replay_are_an_extra_args_provider_of_megatrons_own_parser(monkeypatch):
    from recipes.model import cpu  # noqa: F401  isort: skip
    from megatron.training.arguments import parse_args

    flags = ["--routing-replay-mode", "R2", "--routing-replay-agreement-every", "3"]
    monkeypatch.setattr("sys.argv", ["pretrain_gpt.py", *flags])
    arguments = parse_args(extra_args_provider=add_arguments, ignore_unknown_args=True)
    assert ReplayConfig.from_arguments(arguments) == ReplayConfig(mode="R2", agreement_every=3)
