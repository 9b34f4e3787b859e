"""Two more families, and two processes: sigmoid routers with bias and groups; plain softmax."""

import os
import sys
from importlib.util import find_spec

import numpy as np
import pytest
from sglang_checks import Reference, assert_ids_follow, softmax
from sglang_servers import ARGUMENTS, random_prompt, request, write_checkpoint
from tiny_models import write_tiny_glm4_moe
from tiny_models_sglang import write_tiny_dots1, write_tiny_olmoe

from recipes.serving import cpu
from recipes.serving.server import ServerOptions, launch
from routing_replay.errors import ServerError
from routing_replay.rollout import RolloutClient, probe
from routing_replay.routes.shape import MoEShape

pytestmark = pytest.mark.skipif(not find_spec("sglang"), reason="SGLang is not installed")


def served(checkpoint, model, *arguments, **environment):
    """A server of the checkpoint and a client that insists on the model."""
    options = ServerOptions(
        capture="logits",
        logit_fraction=1.0,
        arguments=(*ARGUMENTS, *arguments),
        environment={"OMP_NUM_THREADS": "1", **environment},
    )
    server = launch(checkpoint, options)
    return server, RolloutClient([server.url], model)


def assert_gates(routes, logits_TLE, scores_TLE):
    """Gates are the scores over all experts; logits are the reference's; every row has both."""
    probs_TLE = scores_TLE / scores_TLE.sum(-1, keepdims=True)
    ids_TLK = routes.expert_ids_TLK.astype(np.int64)
    expected_TLK = np.take_along_axis(probs_TLE, ids_TLK, -1)
    np.testing.assert_allclose(routes.gate_probs_TLK, expected_TLK, atol=2.0**-11 + 1e-4)
    assert routes.router_logits.rows_N.tolist() == list(range(routes.num_rows))
    np.testing.assert_allclose(routes.router_logits.values_NLE, logits_TLE, atol=2e-3)


@pytest.mark.slow
def test_glm4_moe_on_two_processes_without_overlap(tmp_path):
    """First layer dense, sigmoid with bias and groups, scaled by 1.5, a shared expert; TP 2."""
    checkpoint = write_tiny_glm4_moe(tmp_path / "glm4")
    model = MoEShape(layers=(1, 2), num_experts=8, top_k=4)
    server, client = served(
        checkpoint,
        model,
        *("--tp-size", "2"),
        "--disable-overlap-schedule",
        SGLANG_CPU_OMP_THREADS_BIND="0|1",
    )
    with server:
        assert "2 layers, 8 experts, top-4" in str(probe(server.url, model, "logits"))
        asked = [request(random_prompt(n, length=40), capture="logits") for n in range(2)]
        completions = client.generate(asked)
    reference = Reference(checkpoint)
    for one, completion in zip(asked, completions, strict=True):
        logits_TLE, _, _ = reference([*one.input_ids, *completion.output_ids][:-1])
        routes = completion.routes
        assert routes.covered_T.all()
        assert_gates(routes, logits_TLE, 1 / (1 + np.exp(-logits_TLE)))
        assert_chosen(routes, reference.chosen)
        # Renormalised; SGLang scales the layer's sum by 1.5, which the weights must hold.
        scores_TLE = 1 / (1 + np.exp(-logits_TLE))
        ids_TLK = routes.expert_ids_TLK.astype(np.int64)
        selected_TLK = np.take_along_axis(scores_TLE, ids_TLK, -1)
        expected_TLK = 1.5 * selected_TLK / selected_TLK.sum(-1, keepdims=True)
        np.testing.assert_allclose(routes.combine_weights_TLK, expected_TLK, atol=2e-3)


def assert_chosen(routes, chosen_LTK):
    """transformers' own selection, as sets."""
    for column, ids_TK in enumerate(chosen_LTK):
        got_TK = np.sort(routes.expert_ids_TLK[:, column].astype(int), -1)
        is_equal_T = (got_TK == np.sort(ids_TK.numpy(), -1)).all(-1)
        # A tie within rounding may fall either way; in 51 random rows one is rare, two are not.
        assert is_equal_T.sum() >= len(is_equal_T) - 1


def test_a_real_server_refuses_to_start_where_rows_would_be_wrong(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "qwen3", seed=0)
    with pytest.raises(ServerError, match="no true routes with pp_size=2 and the capture level"):
        served(checkpoint, None, "--pp-size", "2", SGLANG_CPU_OMP_THREADS_BIND="0|1")


@pytest.mark.slow
def test_olmoe_without_renormalisation(tmp_path):
    checkpoint = write_tiny_olmoe(tmp_path / "olmoe")
    model = MoEShape(layers=(0, 1), num_experts=12, top_k=3)
    server, client = served(checkpoint, model)
    with server:
        asked = request(random_prompt(1, length=40), capture="logits")
        (completion,) = client.generate([asked])
    logits_TLE, _, _ = Reference(checkpoint)([*asked.input_ids, *completion.output_ids][:-1])
    assert_ids_follow(completion.routes, logits_TLE)
    assert_gates(completion.routes, logits_TLE, softmax(logits_TLE))


@pytest.mark.slow
def test_a_model_of_the_transformers_backend_is_refused_at_the_first_forward(tmp_path):
    """SGLang has no dots1 of its own; transformers' routers never reach its TopK module."""
    checkpoint = write_tiny_dots1(tmp_path / "dots1")
    message = "no router of this model reports its experts.*got Dots1ForCausalLM.*--model-impl"
    with pytest.raises(ServerError, match=f"(?s){message}"):
        served(checkpoint, None)


@pytest.mark.parametrize("is_wanted", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_server_of_an_unknown_version_starts_unless_it_shall_return_routes(tmp_path, is_wanted):
    checkpoint = write_tiny_olmoe(tmp_path / "olmoe")
    metadata = tmp_path / "newer" / "sglang-0.7.0.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text("Metadata-Version: 2.1\nName: sglang\nVersion: 0.7.0\n")
    path = os.pathsep.join([str(metadata.parent.parent), str(cpu.STUBS), *sys.path[1:]])
    options = ServerOptions(
        # Whoever does not ask for routes has no setting of ours either: the level is then ids.
        capture="ids" if is_wanted else "off",
        arguments=ARGUMENTS,
        environment={"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "ROUTING_REPLAY_CAPTURE": "ids"},
        log_path=tmp_path / "log",
    )
    if is_wanted:
        with pytest.raises(ServerError, match="does not know this SGLang.*got 0.7.0"):
            launch(checkpoint, options)
    else:
        with launch(checkpoint, options) as server:
            server.check()
