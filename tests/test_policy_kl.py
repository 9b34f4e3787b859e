"""Policy-level distances, from definitions and from numbers derived by hand."""

import math

import pytest
import torch

from routing_replay.errors import ObjectiveError
from routing_replay.metrics.policy_kl import Sequences, policy_metrics, update_metrics
from routing_replay.metrics.typed import merge, to_floats

EVERY = torch.ones(4, dtype=torch.bool)


def metrics_of(ratios, mask=None, **names):
    """Metrics where p / q takes the given values."""
    q = torch.full((len(ratios),), -20.0, dtype=torch.float64)
    p = q + torch.tensor(ratios, dtype=torch.float64).log()
    mask = torch.ones(len(ratios), dtype=torch.bool) if mask is None else mask
    return policy_metrics(p, q, mask, **names)


def test_every_metric_of_four_tokens():
    # rho = 1, 2.5, 0.1, 1; logs: 0, 0.916291, -2.302585, 0.
    values = to_floats(metrics_of([1.0, 2.5, 0.1, 1.0]))
    logs = [0.0, math.log(2.5), math.log(0.1), 0.0]
    assert values["train_infer/kl_k1"] == pytest.approx(-sum(logs) / 4)
    assert values["train_infer/kl_k3"] == pytest.approx((4.6 - 4 - sum(logs)) / 4)
    assert values["train_infer/logp_abs_diff_mean"] == pytest.approx((0.916291 + 2.302585) / 4)
    assert values["train_infer/logp_abs_diff_max"] == pytest.approx(2.302585)
    # 2.5 and 1 / 0.1 = 10 exceed 2; only 10 exceeds 5.
    assert values["train_infer/extreme_tau2"] == 0.5
    assert values["train_infer/extreme_tau5"] == 0.25
    # squares 1 + 6.25 + 0.01 + 1 = 8.26
    assert values["train_infer/chi2"] == pytest.approx(8.26 / 4 - 1)
    assert values["train_infer/ess"] == pytest.approx(4.6 / 8.26)
    assert values["train_infer/nonfinite_tokens"] == 0


def test_a_ratio_of_exactly_tau_is_not_extreme():
    q = torch.full((4,), math.log(0.25), dtype=torch.float64)
    p = q + math.log(2)
    p = torch.where((p - q) > math.log(2), torch.nextafter(p, q), p)
    assert to_floats(policy_metrics(p, q, EVERY))["train_infer/extreme_tau2"] == 0


def test_samples_come_from_the_second_policy():
    # Over a vocabulary weighted by q both estimators give KL(q || p), and chi2 that of p from q.
    p = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    q = torch.tensor([0.3, 0.3, 0.4], dtype=torch.float64)
    counts = (q * 10).round().long()
    tokens = torch.arange(3).repeat_interleave(counts)
    values = to_floats(policy_metrics(p.log()[tokens], q.log()[tokens], torch.ones(10).bool()))
    exact = (q * (q / p).log()).sum().item()
    assert values["train_infer/kl_k1"] == pytest.approx(exact)
    assert values["train_infer/kl_k3"] == pytest.approx(exact)
    assert values["train_infer/chi2"] == pytest.approx(((p**2 / q).sum() - 1).item())


def test_close_policies_keep_their_digits():
    # d = 1e-6: k3 = d^2 / 2 = 5e-13, which rho - 1 - log rho in float32 would round to 0.
    q = torch.zeros(4, dtype=torch.float64)
    values = to_floats(policy_metrics(q + 1e-6, q, EVERY))
    assert values["train_infer/kl_k3"] == pytest.approx(5e-13, rel=1e-3)


def test_equal_policies_have_no_distance():
    values = to_floats(metrics_of([1.0] * 4))
    assert values.pop("train_infer/ess") == 1.0
    assert set(values.values()) == {0.0}


def test_masked_tokens_may_hold_anything_and_nonfinite_ones_are_counted():
    p = torch.tensor([-1.0, math.nan, -math.inf, -1.0])
    q = torch.tensor([-1.5, 3.0, -1.0, -math.inf])
    mask = torch.tensor([True, False, True, True])
    values = to_floats(policy_metrics(p, q, mask))
    assert values["train_infer/kl_k1"] == pytest.approx(-0.5)
    assert values["train_infer/nonfinite_tokens"] == 2
    assert all(math.isfinite(value) for value in values.values())


def test_absurd_distances_stay_finite():
    # e^2000 is far beyond float64.
    values = to_floats(policy_metrics(torch.tensor([-1.0]), torch.tensor([-2001.0]), EVERY[:1]))
    assert values["train_infer/kl_k1"] == -2000
    assert all(math.isfinite(value) for value in values.values())


def test_parts_merge_to_the_whole():
    ratios = [1.0, 2.5, 0.1, 1.2, 0.7]
    parts = merge(metrics_of(ratios[:2]), merge(metrics_of(ratios[2:]), metrics_of([])))
    assert to_floats(parts) == pytest.approx(to_floats(metrics_of(ratios)))


def test_names_carry_prefix_and_suffix():
    assert "train_infer/kl_k3_live" in metrics_of([1.0], suffix="_live")
    assert "staleness/kl_k3" in metrics_of([1.0], prefix="staleness")


def test_the_decomposition_adds_up():
    theta, old, mu = torch.randn(3, 50, dtype=torch.float64)
    everything = torch.ones(50).bool()
    values = to_floats(update_metrics(theta, old, mu, everything, suffix="_live"))
    values |= to_floats(policy_metrics(old, mu, everything, suffix="_live"))
    parts = values["train_infer/kl_k1_live"] + values["staleness/kl_k1_live"]
    assert values["off_policy/kl_k1_live"] == pytest.approx(parts)


def test_perplexity_ratio_is_the_mean_over_sequences():
    # Sequence 0: mean -log rho = (0.2 + 0.4) / 2; sequence 1: -0.1; sequence 2 empty; 3 masked.
    q = torch.zeros(5, dtype=torch.float64)
    p = torch.tensor([-0.2, -0.4, 0.1, 9.0, math.nan], dtype=torch.float64)
    mask = torch.tensor([True, True, True, False, False])
    sequences = Sequences(index_T=torch.tensor([0, 0, 1, 1, 3]), count=4)
    values = to_floats(policy_metrics(p, q, mask, sequences=sequences))
    assert values["train_infer/perplexity_ratio"] == pytest.approx(
        (math.exp(0.3) + math.exp(-0.1)) / 2
    )


def test_shapes_that_differ_are_refused():
    with pytest.raises(ObjectiveError, match="of different shapes"):
        policy_metrics(torch.zeros(3), torch.zeros(4), torch.ones(3).bool())


def test_gradients_do_not_leak_into_metrics():
    p = torch.zeros(4, requires_grad=True)
    for metric in policy_metrics(p, torch.zeros(4), EVERY).values():
        assert not metric.value().requires_grad
