"""Every objective against its closed form, in its limits, and on inputs that could make nan."""

import math

import oracles_objectives as oracle
import pytest
import torch
from oracles_objectives import case_on_the_grid, gradient_of, inputs_of, simple_case

from routing_replay import objectives
from routing_replay.errors import ObjectiveError
from routing_replay.objectives import Denominators
from routing_replay.objectives.tokens import Tokens

ALL = objectives.names()

# Defaults, and parameters under which the methods with narrow regions keep part of the grid.
# DAPO's own bound 1.28 stands on the grid, where only rounding decides: it is tested apart.
SETTINGS = [
    *((name, {}) for name in ALL if name != "dapo"),
    ("dapo", {"eps_high": 0.3}),
    ("ppo", {"dual_clip": None}),
    ("decoupled_ppo", {"cap": 2.0}),
    ("reinforce_is", {"cap": 2.0}),
    ("cispo", {"eps_low": 0.5, "eps_high": 0.5}),
    ("sequence_is", {"cap": 3.0}),
    ("gspo", {"eps_low": 0.3, "eps_high": 0.5}),
    ("gspo_token", {"eps_low": 0.3, "eps_high": 0.5}),
    ("dr_gspo", {"eps_low": 0.3, "eps_high": 0.5}),
    ("dppo_topk", {"divergence": "kl", "delta": 0.05}),
    ("drpo", {"delta": 0.15}),
    ("kpop", {"phi": 0.05, "weighted": False}),
    ("m2po", {"threshold": 1.0}),
    ("clip_cov", {"fraction": 0.2, "cov_low": -1.0}),
    ("kl_cov", {"fraction": 0.2, "beta": 1.0}),
    ("grpo", {"aggregation": "seq-mean-token-sum-norm", "horizon": 11}),
]


@pytest.mark.parametrize(("name", "parameters"), SETTINGS)
def test_autograd_gives_the_closed_form_on_the_grid(name, parameters):
    case = case_on_the_grid()
    objective = objectives.get(name, **parameters)
    expected = torch.tensor(oracle.gradient(name, objective.parameters, case), dtype=torch.float64)
    gradient, outputs = gradient_of(name, inputs_of(case), **parameters)
    # Not vacuous: some tokens must keep a gradient (GSPO's published region keeps few of this
    # grid).
    assert (expected != 0).sum() > 5
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-14)
    has_signal_T = torch.tensor(case.advantage) != 0
    if name != "kl_cov":  # its penalty has a gradient where A = 0
        assert torch.equal((expected != 0) & has_signal_T, outputs.kept_T & has_signal_T)


def test_the_grid_covers_every_objective():
    assert {name for name, _ in SETTINGS} == set(ALL) == set(oracle.WEIGHTS)


@pytest.mark.parametrize("name", ALL)
def test_a_gradient_depends_on_mu_exactly_where_the_parameters_say_so(name):
    """Rollouts of older weights change mu alone: a method that does not see it corrects nothing."""
    case = case_on_the_grid()
    gradient, _ = gradient_of(name, inputs_of(case))
    older_T = torch.tensor(case.mu, dtype=torch.float64) - torch.tensor(case.extra["uniform"])
    changed, _ = gradient_of(name, inputs_of(case, logp_mu_T=older_T))
    parameters = objectives.get(name).parameters
    assert torch.equal(gradient, changed) is not parameters.needs_mu


@pytest.mark.parametrize("name", ALL)
def test_float32_is_as_good_as_float32_can_be(name):
    case = case_on_the_grid()
    parameters = {"eps_high": 0.3} if name == "dapo" else {}
    exact, _ = gradient_of(name, inputs_of(case), **parameters)
    single, _ = gradient_of(name, inputs_of(case, torch.float32), **parameters)
    # Rounding a log-prob of about -3 moves a ratio by 3 * 2^-24 relatively; a few of them add up.
    # SAPO loses the most: 1 - sigmoid(5) = 0.0067 costs 2^-24 / 0.0067 = 9e-6.
    near = torch.isclose(single.double(), exact, rtol=3e-5, atol=1e-9)
    # A token on the very border of a region may fall on the other side.
    assert (~near).sum() <= 2


@pytest.mark.parametrize("name", ALL)
def test_masked_tokens_may_hold_anything(name):
    case = case_on_the_grid()
    clean, clean_outputs = gradient_of(name, inputs_of(case))
    for bad in (math.nan, math.inf, -math.inf):
        for values in (case.theta, case.old, case.mu, case.advantage):
            values[:] = [v if kept else bad for v, kept in zip(values, case.mask, strict=True)]
        gradient, outputs = gradient_of(name, inputs_of(case))
        assert torch.equal(gradient, clean)
        assert outputs.loss.item() == clean_outputs.loss.item()
        assert outputs.metrics["objective/nonfinite_tokens"].value() == 0


@pytest.mark.parametrize("name", ALL)
def test_a_token_without_a_finite_input_contributes_zero_and_is_counted(name):
    token = 81
    for bad in ("theta", "old", "mu", "advantage"):
        for value in (-math.inf, math.nan):
            case = case_on_the_grid()
            assert case.mask[token]
            getattr(case, bad)[token] = value
            gradient, outputs = gradient_of(name, inputs_of(case))
            assert torch.isfinite(gradient).all()
            assert torch.isfinite(outputs.loss)
            assert gradient[token] == 0
            assert outputs.metrics["objective/nonfinite_tokens"].value() == 1


@pytest.mark.parametrize("name", ALL)
def test_an_all_masked_batch_gives_zero(name):
    case = case_on_the_grid()
    case.mask = [False] * len(case.mask)
    gradient, outputs = gradient_of(name, inputs_of(case))
    assert outputs.loss.item() == 0
    assert (gradient == 0).all()


@pytest.mark.parametrize("name", ALL)
def test_a_batch_of_empty_responses_gives_zero(name):
    case = simple_case([], [], [], [])
    case.num_sequences = 4
    gradient, outputs = gradient_of(name, inputs_of(case))
    assert outputs.loss.item() == 0
    assert gradient.shape == (0,)


@pytest.mark.parametrize("name", ALL)
def test_extreme_ratios_stay_finite(name):
    # A ratio of e^200 overflows float32 (e^88): it must be bounded before the exponential.
    case = simple_case([-0.1, -200.0, -1.0], [-200.0, -0.1, -1.0], [-1.0, -1.0, -200.0], [1.0] * 3)
    for advantage in (1.0, -1.0):
        case.advantage = [advantage] * 3
        gradient, outputs = gradient_of(name, inputs_of(case, torch.float32))
        assert torch.isfinite(gradient).all()
        assert torch.isfinite(outputs.loss)


# --- limits -------------------------------------------------------------------------------------


def test_on_policy_minirl_masks_nothing_and_weighs_by_the_truncated_discrepancy():
    # N = 1: pi_theta = pi_old, so r = 1 exactly and M = 1. Weights min(m, 5) for m = 0.5, 1, 4, 7.
    old = [-2.0] * 4
    mu = [-2.0 - math.log(m) for m in (0.5, 1.0, 4.0, 7.0)]
    case = simple_case(list(old), old, mu, [1.0, -1.0, 1.0, -1.0])
    gradient, outputs = gradient_of("minirl", inputs_of(case))
    expected = torch.tensor([0.5, -1.0, 4.0, -5.0], dtype=torch.float64)
    torch.testing.assert_close(gradient, expected)
    assert outputs.kept_T.all()
    assert outputs.metrics["objective/clip_fraction"].value() == 0
    decoupled, _ = gradient_of("minirl_decoupled", inputs_of(case))
    torch.testing.assert_close(decoupled, gradient)


@pytest.mark.parametrize(
    ("advantage", "r", "kept"),
    [(1, 1.28, False), (1, 0.1, True), (-1, 0.79, False), (-1, 5.0, True), (0, 9.0, True)],
)
def test_minirl_masks_as_the_paper_prints(advantage, r, kept):
    case = simple_case([-3 + math.log(r)], [-3.0], [-3.0], [float(advantage)])
    outputs = objectives.get("minirl")(inputs_of(case))
    assert outputs.kept_T.item() is kept


def test_a_ratio_on_the_border_is_kept():
    # eps = 0.5 and 1.0 with log-probs of 1 and 2 binary units: exp and log round to the exact
    # border.
    theta, old = math.log(0.5), math.log(0.25)
    inputs = inputs_of(simple_case([theta], [old], [old], [1.0]))
    border = torch.tensor(theta, dtype=torch.float64).sub(old).exp().item() - 1
    assert objectives.get("grpo", eps_high=border)(inputs).kept_T.item()
    assert not objectives.get("grpo", eps_high=border - 1e-12)(inputs).kept_T.item()


@pytest.mark.parametrize("name", sorted(set(ALL) - {"clip_cov", "kl_cov", "sequence_is"}))
def test_with_equal_policies_every_method_is_reinforce(name):
    # All ratios 1: the gradient is A * grad log pi, whatever the region (SAPO's slope is 1 there).
    case = case_on_the_grid()
    case.theta, case.mu = list(case.old), list(case.old)
    case.extra["shift"] = [1.0] * len(case.old)
    case.extra["topk_theta"] = case.extra["topk_mu"]
    gradient, _ = gradient_of(name, inputs_of(case))
    p = objectives.get(name).parameters
    expected = [
        a * oracle.scale(p.aggregation, case, t, p.horizon) if case.mask[t] else 0.0
        for t, a in enumerate(case.advantage)
    ]
    torch.testing.assert_close(gradient, torch.tensor(expected, dtype=torch.float64))


def test_log_w_is_log_m_plus_log_r_token_by_token():
    tokens = Tokens(inputs_of(case_on_the_grid()))
    torch.testing.assert_close(tokens.log_w_T, tokens.log_m_T + tokens.log_r_T, rtol=0, atol=1e-14)


# --- numbers that papers print ------------------------------------------------------------------


def test_dapo_clips_above_1_28_and_below_0_8():
    p = objectives.get("dapo").parameters
    assert (1 - p.eps_low, 1 + p.eps_high) == (0.8, 1.28)
    ratios = [1.27, 1.29, 0.81, 0.79]
    advantages = [1.0, 1.0, -1.0, -1.0]
    theta = [-3 + math.log(r) for r in ratios]
    outputs = objectives.get("dapo")(
        inputs_of(simple_case(theta, [-3.0] * 4, [-3.0] * 4, advantages))
    )
    assert outputs.kept_T.tolist() == [True, False, True, False]


def test_gspo_ratio_is_the_root_of_the_ratio_of_sequence_probabilities():
    # pi_theta(y) = 0.5 * 0.2, pi_old(y) = 0.4 * 0.24: s = (0.1 / 0.096)^(1/2) = 1.020621
    theta, old = [math.log(0.5), math.log(0.2)], [math.log(0.4), math.log(0.24)]
    inputs = inputs_of(simple_case(theta, old, old, [1.0, 1.0]))
    outputs = objectives.get("gspo", eps_high=0.1)(inputs)
    assert outputs.loss.item() == pytest.approx(-1.0206207, abs=1e-7)
    # Its published range is (1 - 3e-4, 1 + 4e-4): clipped, value 1.0004.
    assert objectives.get("gspo")(inputs).loss.item() == pytest.approx(-1.0004, abs=1e-12)


def test_drpo_at_its_published_delta_never_corrects():
    # |pi - mu| <= 1, so 1 - 1/12.5 = 0.92 <= lambda <= 1.08; the extremes are a probability of 0 or
    # 1.
    logps = [math.log(p) for p in (1e-9, 0.01, 0.3, 0.9, 1 - 1e-9)]
    pairs = [(t, m) for t in logps for m in logps]
    for a in (1.0, -1.0):
        theta, mu = [t for t, _ in pairs], [m for _, m in pairs]
        # Far-apart probabilities exceed the bound on log-ratios (20): 1e-9 is e^-20.7.
        inside = [abs(t - m) < 20 for t, m in pairs]
        case = simple_case(theta, mu, mu, [a] * len(pairs))
        gradient, _ = gradient_of("drpo", inputs_of(case), horizon=1)
        factor = (
            gradient * a / torch.tensor([math.exp(t - m) for t, m in pairs], dtype=torch.float64)
        )
        factor = factor[torch.tensor(inside)]
        assert factor.min() >= 0.92 - 1e-12
        assert factor.max() <= 1.08 + 1e-12
        assert factor.max() > 1.06
        assert factor.min() < 0.94
        # With delta = 0.15 the factor is negative where |pi - mu| > 0.15 and the update goes
        # outwards.
        sharp, _ = gradient_of("drpo", inputs_of(case), horizon=1, delta=0.15)
        assert ((sharp * a)[torch.tensor(inside)] < 0).any()


def test_icepop_keeps_m_from_one_half_to_five():
    old = [-4.0] * 4
    mu = [-4.0 - math.log(m) for m in (0.49, 0.51, 4.9, 5.1)]
    outputs = objectives.get("icepop")(inputs_of(simple_case(old, old, mu, [1.0] * 4)))
    assert outputs.kept_T.tolist() == [False, True, True, False]


def test_dual_clip_bounds_what_a_bad_token_can_cost():
    # A = -1, r = 6: without dual clip the term is -6; with c = 3 it is -3 and has no gradient.
    case = simple_case([-3 + math.log(6)], [-3.0], [-3.0], [-1.0])
    gradient, outputs = gradient_of("ppo", inputs_of(case))
    assert outputs.loss.item() == pytest.approx(3.0)
    assert gradient.item() == 0
    gradient, outputs = gradient_of("ppo", inputs_of(case), dual_clip=None)
    assert outputs.loss.item() == pytest.approx(6.0)
    assert gradient.item() == pytest.approx(-6.0)


def test_m2po_with_keep_of_the_whole_step_ignores_its_own_mask():
    case = case_on_the_grid()
    everything = torch.ones(len(case.theta), dtype=torch.bool)
    gradient, _ = gradient_of("m2po", inputs_of(case, keep_T=everything))
    free, _ = gradient_of("m2po", inputs_of(case), threshold=1e9)
    torch.testing.assert_close(gradient, free)


# --- clear errors -------------------------------------------------------------------------------


def test_objectives_name_the_input_that_they_miss():
    with pytest.raises(ObjectiveError, match="needs router_shift_T"):
        objectives.get("rspo")(inputs_of(case_on_the_grid(), router_shift_T=None))
    with pytest.raises(ObjectiveError, match="needs topk_logp_mu_TK"):
        objectives.get("dppo_topk")(inputs_of(case_on_the_grid(), topk_logp_mu_TK=None))
    with pytest.raises(ObjectiveError, match="needs logp_ref_T"):
        objectives.get("grpo", kl_coefficient=0.1)(inputs_of(case_on_the_grid()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logp_old_T": torch.zeros(3)}, "logp_old_T has another shape"),
        ({"logp_theta_T": torch.zeros(3, 4)}, r"logp_theta_T of shape \[T\]"),
        ({"mask_T": torch.ones(1)}, "mask_T is not a mask"),
        ({"sequence_T": torch.zeros(1)}, "sequence_T is not an index"),
        ({"sequence_T": torch.tensor([1])}, "expected 0..0; got 1..1"),
        ({"logp_mu_T": torch.zeros(1).requires_grad_()}, "logp_mu_T carries a gradient"),
        ({"lengths_S": torch.zeros(2)}, "lengths_S has another shape"),
    ],
)
def test_inputs_that_cannot_be_right_are_refused(changes, message):
    case = simple_case([-1.0], [-1.0], [-1.0], [1.0])
    with pytest.raises(ObjectiveError, match=message):
        inputs_of(case, torch.float32, **changes)


def test_denominators_must_be_counts():
    with pytest.raises(ObjectiveError, match="num_tokens is negative"):
        Denominators(num_sequences=1, num_tokens=-1)
    with pytest.raises(ObjectiveError, match="max_length is too small"):
        Denominators(num_sequences=1, num_tokens=1, max_length=0)
