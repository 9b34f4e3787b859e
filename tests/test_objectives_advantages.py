"""Advantages and reward shaping, with every expected number derived by hand."""

import math

import pytest
import torch

from routing_replay import objectives
from routing_replay.errors import ConfigError, ObjectiveError
from routing_replay.objectives.advantages import (
    batch_norm,
    group_mean,
    group_mean_std,
    leave_one_out,
)

REWARDS = torch.tensor([1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 2.0], dtype=torch.float64)
# Interleaved and with gaps: groups 5 (1, 1, 0), 9 (0, 0, 0) and 7 (2, alone).
GROUPS = torch.tensor([5, 9, 5, 5, 9, 9, 7])


def test_group_mean_subtracts_the_mean_of_each_group():
    result = group_mean(REWARDS, GROUPS)
    assert result.tolist() == pytest.approx([1 / 3, 0, 1 / 3, -2 / 3, 0, 0, 0])


def test_group_mean_std_divides_by_the_sample_deviation():
    # Group 5: squares 1/9 + 1/9 + 4/9 = 2/3, over n - 1 = 2: std = sqrt(1/3).
    std = math.sqrt(1 / 3) + 1e-6
    result = group_mean_std(REWARDS, GROUPS)
    assert result.tolist() == pytest.approx([1 / 3 / std, 0, 1 / 3 / std, -2 / 3 / std, 0, 0, 0])


def test_leave_one_out_compares_with_the_others():
    # First of group 5: 1 - (1 + 0) / 2 = 0.5; the wrong one: 0 - (1 + 1) / 2 = -1.
    result = leave_one_out(REWARDS, GROUPS)
    assert result.tolist() == pytest.approx([0.5, 0, 0.5, -1, 0, 0, 0])


def test_batch_norm_ignores_groups():
    # Mean 4/7; squares sum to 6 - 16/7 = 26/7, over 6.
    std = math.sqrt(26 / 42) + 1e-6
    result = batch_norm(REWARDS, GROUPS)
    assert result.tolist() == pytest.approx([(r - 4 / 7) / std for r in REWARDS.tolist()])


@pytest.mark.parametrize("name", ["group-mean", "group-mean-std", "leave-one-out", "batch-norm"])
def test_equal_rewards_give_exactly_zero(name):
    # 0.1 summed three times and divided by three is not 0.1 in binary: no std may blow that up.
    rewards = torch.full((3,), 0.1, dtype=torch.float64)
    result = objectives.advantages(name, rewards, torch.zeros(3, dtype=torch.int64))
    assert result.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("name", ["group-mean", "group-mean-std", "leave-one-out", "batch-norm"])
def test_an_empty_batch_has_no_advantages(name):
    result = objectives.advantages(name, torch.zeros(0), torch.zeros(0, dtype=torch.int64))
    assert result.shape == (0,)


def test_advantages_refuse_what_cannot_be():
    groups = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ObjectiveError, match=r"a reward is not finite \[sequences \[1\]\]"):
        group_mean(torch.tensor([1.0, math.nan]), groups)
    with pytest.raises(ObjectiveError, match="rewards and groups do not match"):
        group_mean(torch.zeros(3), groups)
    with pytest.raises(ConfigError, match="unknown advantage; expected one of group-mean, .*'gae'"):
        objectives.advantages("gae", torch.zeros(2), groups)


def test_dynamic_sampling_keeps_groups_that_are_neither_all_right_nor_all_wrong():
    rewards = torch.tensor([1.0, 1.0, 0.0, 0.0, 1.0, 0.0])
    groups = torch.tensor([0, 0, 1, 1, 2, 2])
    result = objectives.informative_groups(rewards, groups)
    assert result.tolist() == [False, False, False, False, True, True]


def test_overlong_penalty_has_the_printed_breakpoints():
    # DAPO: maximum 20,480, cache 4,096; the slope starts at 16,384 and its middle is 18,432.
    lengths = torch.tensor([0, 16384, 17408, 18432, 20480, 20481, 32768])
    result = objectives.overlong_penalty(lengths, 20480, 4096)
    assert result.tolist() == [0.0, 0.0, -0.25, -0.5, -1.0, -1.0, -1.0]
    with pytest.raises(ObjectiveError, match="has no slope"):
        objectives.overlong_penalty(lengths, 4096, 0)


def test_differential_smoothing_rewards_rare_right_answers():
    result = objectives.differential_smoothing(
        torch.tensor([1.0, -1.0], dtype=torch.float64),
        torch.tensor([-10.0, -10.0], dtype=torch.float64),
        torch.tensor([True, False]),
        gamma_correct=0.01,
        gamma_wrong=0.02,
    )
    # 1 + 0.01 * 10 and -1 - 0.02 * 10
    assert result.tolist() == pytest.approx([1.1, -1.2], abs=1e-12)
