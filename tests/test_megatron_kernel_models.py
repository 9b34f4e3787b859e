"""Whole models with `kernel=True`: cases of the replay matrix, fused routers, refusals."""

import pytest
import torch
from megatron_worlds import run_world
from replay_cases import Case

IN_THE_MODEL = [
    Case(recompute="full", is_packed=True),
    Case(router="groups", recompute="full"),
    Case(router="sigmoid_bias", recompute="moe"),
    Case(router="aux_loss", recompute="moe"),
    Case(router="z_loss"),
    Case(router="pre_softmax_scaled", has_mtp=True),
]


@pytest.fixture(scope="module")
def in_models():
    with pytest.MonkeyPatch.context() as patch:
        if not torch.cuda.is_available():
            patch.setenv("TRITON_INTERPRET", "1")
        (results,) = run_world("megatron_kernel_matrix:run", 1, IN_THE_MODEL, timeout_s=500)
    return results


@pytest.mark.timeout(600)
def test_models_train_with_the_kernel_as_with_the_torch_form(in_models):
    assert in_models["wrong"] == []


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
