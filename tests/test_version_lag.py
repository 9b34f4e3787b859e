"""Names of metrics by version lag."""

import torch

from routing_replay.metrics.agreement import LayerAgreement
from routing_replay.metrics.version_lag import COMPARISONS, lag_suffix, nearest_lag, with_lag


def test_every_comparison_of_routes_is_named_by_its_lag_and_nothing_else():
    agreement = LayerAgreement([0, 3], num_rows=4, has_gates=True, has_logits=True)
    compared = {name.removeprefix("routing_replay/") for name in agreement.reduced()}
    # The rate of soft replay is counted elsewhere.
    assert compared | {"replace_rate"} == set(COMPARISONS)
    metrics = dict.fromkeys(("routing_replay/overlap", "routing_replay/coverage"), torch.ones(1))
    assert list(with_lag(metrics, 1)) == ["routing_replay/overlap_lag_1", "routing_replay/coverage"]
    assert list(with_lag(metrics, 0)) == list(metrics)
    assert (lag_suffix(0), lag_suffix(3)) == ("", "_lag_3")


def test_the_lag_nearest_to_the_mean_is_taken_of_those_that_a_metric_has():
    names = ["kl", "kl_lag_2", "kl_lag_12", "kl_live_lag_1", "kl_lag_x"]
    assert [nearest_lag(names, "kl", lag) for lag in (0.0, 0.9, 1.1, 6.9, 7.1)] == [0, 0, 2, 2, 12]
    assert nearest_lag(names, "kl_live", 0.0) == 1
    assert nearest_lag(names, "overlap", 1.6) == 2
