"""KL estimators and first-order identities, in expectation over a vocabulary that is enumerated."""

import math

import pytest
import torch
from oracles_objectives import gradient_of, inputs_of, simple_case

from routing_replay import objectives
from routing_replay.objectives.kl import estimate, kl_term, reward_penalty
from routing_replay.objectives.tokens import Tokens

VOCABULARY = 6


def policies(seed=0):
    """Logits of pi_theta with gradient, and log-probs of mu and ref; far enough apart to tell
    terms.
    """
    draw = torch.Generator().manual_seed(seed)
    theta, mu, ref = torch.randn(3, VOCABULARY, generator=draw, dtype=torch.float64)
    return theta.requires_grad_(), mu.log_softmax(0), ref.log_softmax(0)


def kl(p, q):
    return (p.exp() * (p - q)).sum()


def grad(value, theta):
    (estimate,) = torch.autograd.grad(value, theta)
    return estimate


def expected_gradient(theta, mu, ref, *, direction, ratio, estimator, reference="ref"):
    """sum over the vocabulary of mu(v) * grad term(v): every token stands for one outcome of
    sampling.
    """
    logp = theta.log_softmax(0)
    case = simple_case([0.0] * VOCABULARY, [0.0] * VOCABULARY, mu.tolist(), [0.0] * VOCABULARY)
    tokens = Tokens(inputs_of(case, logp_theta_T=logp, logp_ref_T=ref))
    p = objectives.get(
        "grpo",
        kl_coefficient=1.0,
        kl_direction=direction,
        kl_ratio=ratio,
        kl_estimator=estimator,
        kl_reference=reference,
    ).parameters
    return grad((mu.exp() * kl_term(tokens, p)).sum(), theta)


ROWS = [
    # direction, ratio, sampled by pi_theta itself, other policy, estimator -> gradient
    ("reverse", "none", True, "ref", {"k1": "0", "k2": "R", "k3": "F", "k3+": "R"}),
    ("reverse", "none", False, "ref", {"k1": "blind", "k2": "-", "k3": "-"}),
    ("reverse", "stopped", False, "ref", {"k1": "0", "k2": "R", "k3": "F", "k3+": "R"}),
    ("reverse", "graph", False, "ref", {"k1": "R", "k2": "-", "k3": "R"}),
    ("forward", "none", False, "mu", {"k1": "F", "k2": "-", "k3": "F"}),
    ("forward", "stopped", False, "ref", {"k1": "F", "k2": "-", "k3": "F"}),
    ("forward", "graph", False, "ref", {"k1": "F", "k2": "-", "k3": "F"}),
    # Towards mu itself, as a trust region: methods.md section 5.
    ("reverse", "stopped", False, "mu", {"k2": "R"}),
]


@pytest.mark.parametrize(
    ("direction", "ratio", "own", "other", "estimator", "gradient"),
    [(d, r, own, o, e, g) for d, r, own, o, by in ROWS for e, g in by.items()],
)
def test_the_table_of_gradients(direction, ratio, own, other, estimator, gradient):
    theta, mu, ref = policies()
    if own:
        mu = theta.detach().log_softmax(0)
    estimate = expected_gradient(
        theta, mu, ref, direction=direction, ratio=ratio, estimator=estimator, reference=other
    )
    logp, target = theta.log_softmax(0), ref if other == "ref" else mu
    exact = {
        "0": torch.zeros_like(estimate),
        "R": grad(kl(logp, target), theta),
        "F": grad(kl(target, theta.log_softmax(0)), theta),
    }
    if gradient == "-":
        for value in exact.values():
            assert (estimate - value).abs().max() > 1e-3
    elif gradient == "blind":
        # E_mu[grad log pi_theta] is not 0 off-policy, but the same for every other policy.
        again = expected_gradient(
            theta, mu, ref.flip(0), direction=direction, ratio=ratio, estimator=estimator
        )
        torch.testing.assert_close(estimate, again)
    else:
        torch.testing.assert_close(estimate, exact[gradient])


def test_ratio_in_the_graph_times_k3_is_stopped_ratio_times_k2_per_sample():
    # DeepSeek-V3.2's term: rho * k3 has the gradient rho * s * log(pi_theta / ref), not only on
    # average.
    theta = torch.tensor([-1.0, -2.0, -0.5], dtype=torch.float64)
    ref = torch.tensor([-1.5, -0.3, -0.5], dtype=torch.float64)
    mu = torch.tensor([-0.7, -2.2, -1.0], dtype=torch.float64)
    gradients = []
    for ratio, estimator in (("graph", "k3"), ("stopped", "k2")):
        case = simple_case(theta.tolist(), theta.tolist(), mu.tolist(), [0.0] * 3)
        estimate, _ = gradient_of(
            "dapo",
            inputs_of(case, logp_ref_T=ref),
            kl_coefficient=3.0,
            kl_ratio=ratio,
            kl_estimator=estimator,
        )
        gradients.append(estimate)
    torch.testing.assert_close(gradients[0], gradients[1])
    # -3 * (1/3) * rho * log(pi_theta / ref) for the first token: rho = e^-0.3, log-ratio 0.5.
    assert gradients[0][0].item() == pytest.approx(-math.exp(-0.3) * 0.5)


def test_k1_and_k3_are_unbiased_and_k2_is_not():
    theta, mu, _ = policies()
    q, p = mu, theta.detach().log_softmax(0)
    exact = kl(q, p)
    of = {name: (q.exp() * estimate(q - p, name)).sum() for name in ("k1", "k2", "k3", "k3+")}
    for name in ("k1", "k3", "k3+"):
        torch.testing.assert_close(of[name], exact)
    assert (of["k2"] - exact).abs() > 1e-2
    assert (estimate(q - p, "k3") >= 0).all()


def test_a_reference_without_a_finite_log_prob_adds_no_kl():
    case = simple_case([-1.0, -1.0], [-1.0, -1.0], [-1.0, -1.0], [0.0, 0.0])
    for bad in (-math.inf, math.nan):
        ref = torch.tensor([bad, -2.0], dtype=torch.float64)
        for estimator in ("k1", "k2", "k3", "k3+"):
            estimate, outputs = gradient_of(
                "dapo",
                inputs_of(case, logp_ref_T=ref),
                kl_coefficient=1.0,
                kl_ratio="stopped",
                kl_estimator=estimator,
            )
            assert estimate[0] == 0
            assert torch.isfinite(outputs.loss)


def test_reward_penalty_is_the_sum_over_the_sequence():
    old = torch.tensor([-1.0, -2.0, -1.0, -9.0])
    ref = torch.tensor([-1.5, -1.0, -1.2, math.nan])
    mask = torch.tensor([True, True, True, False])
    # Sequence 0: 0.5 - 1.0 = -0.5; sequence 1: 0.2; sequence 2 is empty. Times -0.1.
    penalty = reward_penalty(old, ref, mask, torch.tensor([0, 0, 1, 1]), 3, coefficient=0.1)
    assert penalty.tolist() == pytest.approx([0.05, -0.02, 0.0])


# --- the first-order theory that MiniRL rests on ------------------------------------------------


def test_the_mean_of_w_minus_one_is_zero_and_negative_under_truncation():
    theta, mu, _ = policies()
    w = (theta.detach().log_softmax(0) - mu).exp()
    assert (mu.exp() * (w - 1)).sum().abs() < 1e-12
    # Without a Keep Sampling Mask mu lives on S only: E[w - 1] = pi_theta(S) - 1 < 0 (w by mu^S).
    support = mu > mu.median()
    truncated = torch.where(support, mu, -torch.inf).log_softmax(0)
    inside = theta.detach().log_softmax(0)[support]
    mean = (truncated[support].exp() * ((inside - truncated[support]).exp() - 1)).sum()
    assert mean == pytest.approx(inside.exp().sum().item() - 1)
    assert mean < -0.1


def test_reinforce_with_w_is_the_gradient_of_the_expected_reward():
    theta, mu, _ = policies()
    rewards = torch.arange(VOCABULARY, dtype=torch.float64)
    logp = theta.log_softmax(0)
    case = simple_case([0.0] * VOCABULARY, [0.0] * VOCABULARY, mu.tolist(), rewards.tolist())
    # Each outcome counts with its probability: scaled into the advantage, summed by
    # seq-mean-token-sum.
    advantages = mu.exp() * rewards
    inputs = inputs_of(case, logp_theta_T=logp, advantages_T=advantages)
    estimate = grad(-objectives.get("reinforce_is")(inputs).loss, theta)
    exact = grad((theta.log_softmax(0).exp() * rewards).sum(), theta)
    torch.testing.assert_close(estimate, exact)


def test_first_order_errors_of_the_sum_and_of_the_geometric_mean():
    # Product of (1 + d_t) against g1 = 1 + sum d: error about sum_{i<j} d_i d_j; against
    # s1 = T * geometric mean - (T - 1): error about (1 - 1/T) / 2 * (sum d)^2.
    for size in (1e-2, 1e-3):
        deltas = size * torch.tensor([1.0, -0.5, 2.0, 0.7, -1.1], dtype=torch.float64)
        length, total = len(deltas), deltas.sum()
        product = (1 + deltas).prod()
        pairs = (total**2 - (deltas**2).sum()) / 2
        geometric = length * product ** (1 / length) - (length - 1)
        assert abs(product - (1 + total) - pairs) < 10 * size**3
        assert abs(product - geometric - (1 - 1 / length) / 2 * total**2) < 10 * size**3
