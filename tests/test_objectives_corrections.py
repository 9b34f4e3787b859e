"""Corrections and masks against loops; each multiplies the plain GRPO gradient token by token."""

import math

import pytest
import torch
from oracles_objectives import case_on_the_grid, gradient_of, inputs_of, simple_case

from routing_replay import objectives
from routing_replay.errors import ConfigError
from routing_replay.objectives.masks import second_moment_mask


def factors(expected_of_token, base="grpo", **parameters):
    """Compare the gradient to the plain one times the expected factors; return these."""
    case = case_on_the_grid()
    plain, _ = gradient_of(base, inputs_of(case), eps_low=1.0, eps_high=1e9)
    gradient, outputs = gradient_of(base, inputs_of(case), eps_low=1.0, eps_high=1e9, **parameters)
    has_signal = plain != 0
    expected = [
        expected_of_token(case, t) if has_signal[t] else 0.0 for t in range(len(case.theta))
    ]
    expected = torch.tensor(expected, dtype=torch.float64)
    # Not vacuous: the expectation neither keeps nor drops everything.
    assert len(expected[has_signal].unique()) > 1
    torch.testing.assert_close(gradient, plain * expected, rtol=1e-10, atol=1e-14)
    return outputs, expected[has_signal]


def product(case, t):
    return math.prod(case.m(u) for u in case.members(t))


def geometric(case, t):
    return product(case, t) ** (1 / len(case.members(t)))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("tis-token", lambda case, t: min(case.m(t), 2.0)),
        ("tis-sequence", lambda case, t: min(product(case, t), 2.0)),
        ("tis-geometric", lambda case, t: min(geometric(case, t), 2.0)),
        ("mis-token", lambda case, t: case.m(t) if case.m(t) <= 2.0 else 0.0),
        ("mis-sequence", lambda case, t: product(case, t) if product(case, t) <= 2.0 else 0.0),
    ],
)
def test_importance_corrections_are_those_of_the_loop(name, expected):
    factors(expected, correction=name, correction_cap=2.0)


def test_geometric_mask_keeps_sequences_within_its_bounds():
    low, high = 0.9, 1.05
    outputs, expected = factors(
        lambda case, t: float(low <= geometric(case, t) <= high),
        geometric_low=low,
        geometric_high=high,
    )
    dropped = outputs.metrics["objective/drop_fraction"].value()
    assert dropped == pytest.approx((expected == 0).double().mean().item())


def test_k3_mask_drops_sequences_whose_engines_differ_on_average():
    def expected(case, t):
        values = [case.m(u) - 1 - math.log(case.m(u)) for u in case.members(t)]
        return float(sum(values) / len(values) <= 0.02)

    factors(expected, sequence_k3_max=0.02)


def test_veto_drops_the_whole_sequence_of_one_bad_token():
    factors(lambda case, t: float(all(case.m(u) >= 0.11 for u in case.members(t))), veto_below=0.11)
    # m = 0.9e-4 is below 1e-4 and takes its neighbour, whose m is 1, along.
    mu = [-1.0, -10.0 - math.log(0.9e-4)]
    case = simple_case([-1.0, -10.0], [-1.0, -10.0], mu, [1.0, 1.0])
    gradient, _ = gradient_of("grpo", inputs_of(case), veto_below=1e-4)
    assert gradient.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("anchor", ["mu", "old"])
def test_off_policy_mask_drops_negative_sequences_only(anchor):
    def expected(case, t):
        ratio = case.w if anchor == "mu" else case.r
        mean = sum(-math.log(ratio(u)) for u in case.members(t)) / len(case.members(t))
        return 0.0 if mean > 0.05 and case.advantage[t] < 0 else 1.0

    factors(expected, off_policy_delta=0.05, off_policy_anchor=anchor)


def test_off_policy_mask_spares_the_kl_term():
    # DeepSeek-V3.2 equation 8: M multiplies the policy term only. Here A < 0 and pi_theta = mu / e.
    case = simple_case([-2.0], [-2.0], [-1.0], [-1.0])
    reference = torch.tensor([-1.5], dtype=torch.float64)
    inputs = inputs_of(case, logp_ref_T=reference)
    gradient, outputs = gradient_of(
        "grpo", inputs, off_policy_delta=0.5, kl_coefficient=1.0, kl_estimator="k2", kl_ratio="none"
    )
    # The gradient of k2 is log(pi_theta / ref) = -0.5; of the objective its negative.
    assert not outputs.kept_T.any()
    assert gradient.item() == pytest.approx(0.5)


def test_a_filter_of_the_caller_drops_the_policy_term_but_not_the_denominator():
    case = simple_case([-1.0, -1.0], [-1.0, -1.0], [-1.0, -1.0], [1.0, 1.0])
    gradient, _ = gradient_of("dapo", inputs_of(case, keep_T=torch.tensor([True, False])))
    # token-mean over two tokens, though one is dropped.
    assert gradient.tolist() == [0.5, 0.0]


@pytest.mark.parametrize(
    "name", ["minirl", "reinforce_is", "sequence_is", "dppo_tv", "drpo", "icepop", "decoupled_ppo"]
)
def test_a_method_that_weighs_by_m_refuses_a_second_weight(name):
    with pytest.raises(ConfigError, match="would count m twice"):
        objectives.get(name, correction="tis-token")
    objectives.get(name, geometric_low=0.999, veto_below=1e-4)


def test_tis_on_ppo_is_minirl_decoupled_without_dual_clip():
    # min(m, C) * r with PPO's region on r is MiniRL's decoupled form; only the aggregation is
    # another.
    case = case_on_the_grid()
    region = {"eps_low": 0.2, "eps_high": 0.27, "aggregation": "seq-mean-token-sum"}
    ours, _ = gradient_of("minirl_decoupled", inputs_of(case), cap=2.0, **region)
    theirs, _ = gradient_of(
        "grpo", inputs_of(case), correction="tis-token", correction_cap=2.0, **region
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-14)


def test_second_moment_mask_is_idempotent_and_per_step():
    case = case_on_the_grid()
    old, mu = torch.tensor(case.old), torch.tensor(case.mu)
    mask = torch.tensor(case.mask)
    kept = second_moment_mask(old, mu, mask, 0.04)
    assert 0 < kept.sum() < mask.sum()
    assert not (kept & ~mask).any()
    assert torch.equal(second_moment_mask(old, mu, kept, 0.04), kept)


def test_an_entropy_bonus_adds_the_entropy_gradient():
    case = simple_case([-1.0, -1.0], [-1.0, -1.0], [-1.0, -1.0], [0.0, 0.0])
    entropy = torch.tensor([0.5, 0.7], dtype=torch.float64, requires_grad=True)
    outputs = objectives.get("dapo", entropy_coefficient=0.1)(inputs_of(case, entropy_T=entropy))
    outputs.loss.backward()
    # loss = -0.1 * mean entropy
    assert entropy.grad.tolist() == pytest.approx([-0.05, -0.05])
    assert outputs.metrics["objective/entropy"].value() == pytest.approx(0.6)
