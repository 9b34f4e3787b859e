"""Typed metrics: what merging and reading does to each kind."""

import math

import pytest
import torch

from routing_replay.errors import ConfigError
from routing_replay.metrics import LayerMean, LayerValues, Max, Mean, Sum, merge, to_floats
from routing_replay.metrics.typed import _Kind, _union


def layer_mean(layers, totals, counts, has_mean=True):
    totals, counts = (torch.tensor(values, dtype=torch.float64) for values in (totals, counts))
    return LayerMean(layers=layers, total_L=totals, count_L=counts, has_mean=has_mean)


def test_each_kind_merges_by_its_own_rule():
    one, three = torch.tensor(1.0), torch.tensor(3.0)
    first = {"mean": Mean(total=one, count=one), "sum": Sum(total=one), "max": Max(maximum=one)}
    second = {"mean": Mean(total=three, count=one), "sum": Sum(total=three)}
    second["max"] = Max(maximum=three)
    assert to_floats(merge(first, second)) == {"mean": 2.0, "sum": 4.0, "max": 3.0}
    assert to_floats(merge(first, {"more": Sum(total=three)}))["more"] == 3.0


def test_layers_of_two_pipeline_stages_merge_into_one_metric():
    # Layer 2 is on both sides: (1 + 5) / (1 + 2). The mean weighs by counts: (4 + 6) / (2 + 3).
    merged = merge(
        {"m": layer_mean((0, 2), [4.0, 1.0], [2.0, 1.0])}, {"m": layer_mean((2,), [5.0], [2.0])}
    )
    assert to_floats(merged) == {"m": LayerValues(mean=10 / 5, layers={0: 2.0, 2: 2.0})}


def test_a_layer_without_a_count_reads_as_nan_and_a_mean_that_says_nothing_is_left_out():
    values = to_floats({"m": layer_mean((0, 1), [1.0, 0.0], [4.0, 0.0], has_mean=False)})["m"]
    assert values.mean is None
    assert values.layers[0] == 0.25 and math.isnan(values.layers[1])


def test_a_name_of_two_kinds_is_refused_with_the_rank():
    ranks = [{"m": _Kind(type="Mean")}, {}, {"m": _Kind(type="Sum")}]
    with pytest.raises(ConfigError, match=r"'m' is of two kinds; expected Mean; got Sum .*rank 2"):
        _union(ranks)
