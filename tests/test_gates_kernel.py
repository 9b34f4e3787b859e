"""The gates-capture kernel against its torch form and against float64."""

import gates_kernel_checks as checks
import pytest
import torch
from triton_process import run_check

FUNCTIONS = ("softmax", "sigmoid", "sqrtsoftplus")


@pytest.mark.parametrize("num_experts", [64, 128, 256, 384, 512])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_ids_and_gates_are_those_of_the_torch_form(num_experts, function):
    assert run_check(checks.check_layer, num_experts, 8, function, torch.float32) == []


@pytest.mark.parametrize("top_k", range(1, 11))
def test_every_top_k_from_1_to_10_is_that_of_the_torch_form(top_k):
    assert run_check(checks.check_layer, 16, top_k, "softmax", torch.bfloat16) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_half_precision_logits_give_the_gates_of_the_torch_form(function, dtype):
    assert run_check(checks.check_layer, 64, 6, function, dtype) == []


def test_strided_logits_and_ids_are_read_in_place():
    assert run_check(checks.check_strides) == []


def test_an_empty_batch_writes_nothing():
    assert run_check(checks.check_empty) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"function": "tanh"}, ["softmax, sigmoid, sqrtsoftplus", "'tanh'"]),
        ({"packed_TK": torch.zeros(4, 3, dtype=torch.int32)}, ["int32 slots [T, K]", "[4, 3]"]),
        ({"packed_TK": torch.zeros(4, 2, dtype=torch.int64)}, ["torch.int64"]),
        ({"router_logits_TE": torch.zeros(0, 8)}, ["logits [T, E]", "[0, 8]"]),
    ],
)
def test_a_router_call_that_does_not_fit_is_refused(change, words):
    message = run_check(checks.refusal, change)
    assert all(word in message for word in [*words, "Turn the kernel off"]), message
