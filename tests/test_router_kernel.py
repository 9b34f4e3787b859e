"""The replay router against a naive oracle: weights, map, gradient, live tokens, bad inputs."""

import pytest
import router_kernel_checks as checks
import torch
from triton_process import run_check

EXPERTS = (8, 32, 128, 256, 384, 512)
FORMS = {
    "softmax": {},
    "softmax_scaled": {"scaling_factor": 2.5},
    "pre_softmax": {"use_pre_softmax": True, "scaling_factor": 2.5},
    "sigmoid": {"score_function": "sigmoid", "scaling_factor": 1.5},
    "sqrtsoftplus": {"score_function": "sqrtsoftplus"},
}
DTYPES = (torch.float32, torch.bfloat16, torch.float64)


@pytest.mark.parametrize("num_experts", EXPERTS)
@pytest.mark.parametrize("form", FORMS)
def test_replayed_weights_map_and_gradient_are_as_exact_as_torchs(num_experts, form):
    fields = {"top_k": min(8, num_experts // 2), **FORMS[form]}
    assert run_check(checks.check_replayed, num_experts, fields, torch.float32) == []


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_other_dtypes_are_as_exact_as_torchs(dtype, form):
    fields = {"top_k": 6, **FORMS[form]}
    assert run_check(checks.check_replayed, 64, fields, dtype) == []


@pytest.mark.parametrize("top_k", range(1, 11))
@pytest.mark.parametrize("form", ["softmax", "sigmoid"])
def test_every_top_k_from_1_to_10_is_as_exact_as_torchs(top_k, form):
    fields = {"top_k": top_k, **FORMS[form]}
    assert run_check(checks.check_replayed, 32, fields, torch.float32) == []


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("num_experts", [8, 128, 384])
def test_live_tokens_take_their_top_k_and_leave_it_in_their_ids(num_experts, form):
    fields = {"top_k": 3, **FORMS[form]}
    has_bias = "score_function" in fields
    found = run_check(checks.check_live, num_experts, fields, torch.float32, has_bias)
    assert found == []


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", ["pre_softmax", "sigmoid"])
@pytest.mark.parametrize(("num_experts", "num_groups"), [(32, 4), (384, 6)])
def test_live_tokens_stay_within_their_best_groups(num_experts, num_groups, form, dtype):
    # Top-4 in 2 groups: a group counts by the sum of its 2 best experts.
    groups = {"num_groups": num_groups, "group_top_k": 2}
    fields = {"top_k": 4, **FORMS[form], **groups}
    assert run_check(checks.check_live, num_experts, fields, dtype, form == "sigmoid") == []


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_of_equal_logits_the_lowest_expert_is_selected(dtype):
    assert run_check(checks.check_live, 64, {"top_k": 6}, dtype, False, True) == []


def test_nan_wins_and_the_sign_of_zero_decides_nothing():
    nan, inf = float("nan"), float("inf")
    rows = [
        [0.0, 1.0, nan, 2.0],  # nan, then 2: as torch.topk
        [-0.0, 0.0, -0.0, 0.0],  # all alike: the lowest two
        [-inf, -inf, 3.0, -inf],  # a masked expert is selected once, not the same one again
        [-1.0, -2.0, -3.0, -0.5],  # negative numbers order as numbers
    ]
    expected = [[2, 3], [0, 1], [2, 0], [3, 0]]
    for dtype in DTYPES:
        assert run_check(checks.selected_of, rows, 2, dtype) == expected


def test_float64_logits_are_compared_in_float64():
    # The first is larger by less than float32 can tell.
    rows = [[1.0 + 1e-12, 1.0, 0.0, 0.0], [1.0, 1.0 + 1e-12, 0.0, 0.0]]
    assert run_check(checks.selected_of, rows, 1, torch.float64) == [[0], [1]]


def test_live_tokens_write_into_their_own_rows_only():
    assert run_check(checks.check_neighbours) == (True, True)


@pytest.mark.parametrize("form", ["softmax", "sigmoid", "sqrtsoftplus"])
def test_extreme_logits_have_finite_weights_and_gradients(form):
    (weights,), (selected,), (gradient,) = run_check(checks.extreme_gradients, form)
    assert selected == [True] * 7 + [False]
    assert sum(weights) == pytest.approx(1, abs=1e-6)
    assert all(abs(value) < 10 for value in gradient)
    assert gradient[7] == 0


def test_the_exponential_is_exact_to_two_units_and_finite_where_it_should_be():
    # 64 values over all that float32 can hold; a plain exp2(x log2(e)) is wrong by up to 60 units.
    values = [-87.0 + 2.7345 * n for n in range(64)]
    found = run_check(checks.exponential, values)
    exact = torch.tensor(values).double().exp().tolist()  # of the float32 that the kernel got
    assert found == pytest.approx(exact, rel=2 * 2**-23)
    infinity, nan = float("inf"), float("nan")
    limits = run_check(
        checks.exponential, [-infinity, -1e30, infinity, 1e30, nan, 0.0, -200.0, 200.0]
    )
    assert limits[:4] == [0.0, 0.0, infinity, infinity] and limits[4] != limits[4]
    assert limits[5:] == [1.0, 0.0, infinity]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ids_TK": torch.zeros(5, 3, dtype=torch.uint8)}, ["expert ids", "[5, 2]", "[5, 3]"]),
        ({"ids_TK": torch.zeros(5, 2)}, ["expert ids", "torch.uint8", "torch.float32"]),
        ({"ids_TK": torch.zeros(2, 5, dtype=torch.uint8).t()}, ["contiguous", "strides (1, 5)"]),
        ({"is_live_T": torch.zeros(4, dtype=torch.bool)}, ["live tokens", "[5]", "[4]"]),
        ({"expert_bias_E": torch.zeros(8).double()}, ["expert bias", "torch.float64"]),
        ({"logits_TE": torch.zeros(5, 8).int()}, ["logits", "torch.int32"]),
    ],
)
def test_tensors_that_do_not_belong_together_are_refused(changes, words):
    message = run_check(checks.refusal, changes)
    assert all(word in message for word in words), message
