"""Whole models with `kernel=True`: cases of the replay matrix, fused routers, refusals."""

import pytest
import torch
from megatron_worlds import run_kernel_world
from replay_cases import Case

from recipes.model.parallel import ParallelLayout

pytestmark = pytest.mark.slow

TP, CP = ParallelLayout(tensor=2), ParallelLayout(context=2)  # TP with sequence parallelism
PP = ParallelLayout(pipeline=2)
VPP = ParallelLayout(pipeline=2, virtual_pipeline=2)
EP = ParallelLayout(expert=2)

IN_THE_MODEL = [
    Case(recompute="full", is_packed=True),
    Case(router="groups", recompute="full"),
    Case(router="sigmoid_bias", recompute="moe"),
    Case(router="aux_loss", recompute="moe"),
    Case(router="z_loss"),
    Case(router="pre_softmax_scaled", has_mtp=True),
]

RANKS = "megatron_kernel_matrix:run_ranks"
ON_2_RANKS = [
    Case(layout=TP, router="sigmoid_bias", recompute="full"),
    Case(layout=VPP, is_packed=True),
]
REST_ON_2_RANKS = [
    Case(layout=TP, router="groups", is_packed=True),
    Case(layout=PP, recompute="full"),
    Case(layout=PP, router="aux_loss", dense=(0,)),
    Case(layout=VPP, router="groups", recompute="full"),
    Case(layout=CP, is_packed=True, is_ragged=True),
    Case(layout=CP, router="pre_softmax_scaled", recompute="moe"),
    Case(layout=EP, recompute="moe"),
    Case(layout=EP, dispatcher="allgather", router="sigmoid_bias"),
]
ON_4_RANKS = [
    Case(layout=ParallelLayout(tensor=2, pipeline=2), recompute="full"),
    Case(layout=ParallelLayout(tensor=2, expert=4, expert_tensor=1), router="groups"),
    Case(layout=ParallelLayout(pipeline=2, context=2), is_packed=True),
]


@pytest.fixture(scope="module")
def in_models():
    return run_kernel_world("megatron_kernel_matrix:run", 1, IN_THE_MODEL)[0]


@pytest.mark.timeout(600)
def test_models_train_with_the_kernel_as_with_the_torch_form(in_models):
    assert in_models["wrong"] == []


@pytest.mark.timeout(600)
def test_ranks_of_tensor_and_pipeline_parallelism_replay_with_the_kernel_and_in_captured_routers():
    captured = [Case(layout=VPP)]
    assert sum(run_kernel_world(RANKS, 2, ON_2_RANKS, captured), []) == []


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("num_ranks", "cases"), [(2, REST_ON_2_RANKS), (4, ON_4_RANKS)], ids=["2 ranks", "4 ranks"]
)
def test_ranks_of_other_layouts_replay_with_the_kernel(num_ranks, cases):
    captured = [Case(layout=cases[0].layout), Case(layout=cases[-1].layout)]
    assert sum(run_kernel_world(RANKS, num_ranks, cases, captured), []) == []


def test_the_kernel_replays_the_named_layers_only_as_the_torch_form_does(in_models):
    layers = in_models["layers"]
    assert layers["wrong"] == []
    assert layers["receipts"][0] == layers["receipts"][1]


def test_a_fused_router_replays_and_records_with_the_kernel_and_is_stock_outside(in_models):
    fused = in_models["fused"]
    # Without Transformer Engine the fused router raises; inside the scopes it did not run.
    assert fused["stock"] is not None
    assert fused["stock"] == fused["outside"] == fused["after"]
    assert fused["replayed"] == ([], 4 * 4)  # layers x microbatches
    assert fused["recorded"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_the_kernel_is_refused_without_a_gpu_when_the_model_is_attached(in_models):
    kind, message = in_models["refused"]["no GPU"]
    assert kind == "ConfigError" and "a kernel cannot run on this device" in message


def test_the_kernel_is_refused_on_a_router_that_it_does_not_know(in_models):
    kind, message = in_models["refused"]["unknown router"]
    assert kind == "PreflightError" and "does not know this router" in message
