"""The replay router equals stock Megatron with our selection, for every router of the matrix."""

import pytest
import torch
from replay_cases import ROUTERS
from triton_process import run_check

from recipes.model import cpu  # noqa: F401  (makes Megatron importable)
from routing_replay.errors import PreflightError
from routing_replay.megatron import patch_routing

# isort: split
from megatron.core.transformer.moe.router import TopKRouter

# Aux losses, z-loss and shared experts lie outside of what the kernel computes.
FORMS = (
    "softmax",
    "pre_softmax",
    "pre_softmax_scaled",
    "sigmoid",
    "sigmoid_bias",
    "sqrtsoftplus_bias",
    "groups",
    "softmax_groups",
)


def check(*arguments):
    return run_check(_check_router, *arguments)


def _check_router(device, *arguments):
    # Megatron and Triton are imported where the kernel runs.
    from megatron_router_kernel_checks import check_router

    return check_router(device, *arguments)


def test_the_list_names_every_router_whose_weights_are_its_own():
    kept = {"pre_softmax", "score_function", "expert_bias", "num_groups", "scaling_factor"}
    own = {
        name
        for name, fields in ROUTERS.items()
        if any(word in field for word in kept for field in fields)
    }
    assert own | {"softmax"} == set(FORMS)


@pytest.mark.parametrize("router", FORMS)
@pytest.mark.parametrize("num_experts", [8, 128])
def test_weights_map_and_gradient_are_as_exact_as_megatrons(router, num_experts):
    assert check(router, num_experts, torch.float32) == []


@pytest.mark.parametrize("router", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_other_router_dtypes_are_as_exact_as_megatrons(router, dtype):
    assert check(router, 32, dtype) == []


@pytest.mark.parametrize(("num_experts", "top_k"), [(256, 8), (384, 6), (512, 10)])
@pytest.mark.parametrize("router", ["softmax", "groups"])
def test_large_routers_are_as_exact_as_megatrons(router, num_experts, top_k):
    assert check(router, num_experts, torch.float32, top_k) == []


def _check_seam(device, *arguments):
    from megatron_router_seam_checks import check_seam

    return check_seam(device, *arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a router of CPU tensors")
@pytest.mark.parametrize("router", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_router_with_the_kernel_routes_recomputes_counts_and_records_as_without(router, dtype):
    assert run_check(_check_seam, router, dtype) == []


def test_a_router_that_routes_by_other_code_is_refused():
    class Other(TopKRouter):
        def routing(self, logits, padding_mask=None):
            return logits, padding_mask

    patch_routing.require(TopKRouter.__new__(TopKRouter))
    with pytest.raises(PreflightError, match="does not know this router.*Leave `kernel` off"):
        patch_routing.require(Other.__new__(Other))
