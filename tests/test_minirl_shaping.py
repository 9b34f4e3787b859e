"""recipes.minirl.policy.shaping: from rewards to advantages; what a saved batch may be used for."""

import dataclasses

import numpy as np
import pytest
import torch

from recipes.minirl.policy.shaping import with_advantages
from recipes.minirl.rollout.batch import Batch, Sample
from recipes.minirl.settings.command_line import parse
from routing_replay.errors import DataError
from routing_replay.routes.batch import RolloutBatch


def configuration(*flags):
    return parse(["--max-new-tokens", "8", *flags])


class LastStage:
    """What `with_advantages` asks of a policy, with log-probs that are given."""

    is_last_stage = True

    def __init__(self, config):
        self.config = config

    def dense(self, scores, batch):
        return scores


def a_batch():
    lengths, rewards = (8, 7, 6, 4), (1.0, 0.0, 0.0, 1.0)
    samples = [
        Sample(prompt_ids=(1,), response_ids=(2,) * n, logp_mu=(-1.0,) * n, reward=r)
        for n, r in zip(lengths, rewards, strict=True)
    ]
    return Batch.from_samples(samples, 4)


def test_overlong_responses_lose_reward_on_the_slope_only():
    config = configuration("--overlong-cache", "4")
    batch, metrics = with_advantages(LastStage(config), a_batch(), None, None)
    # Longest 8, slope 4: lengths 8, 7, 6, 4 lose 1, 3/4, 1/2, 0.
    rewards = torch.tensor([1.0 - 1.0, 0.0 - 0.75, 0.0 - 0.5, 1.0])
    torch.testing.assert_close(batch.advantages_S, rewards - rewards.mean())
    assert metrics["reward/overlong_penalty"].value() == pytest.approx(-2.25 / 4)


def test_differential_smoothing_lifts_rare_right_answers_and_sinks_common_wrong_ones():
    config = configuration("--smoothing-correct", "0.1", "--smoothing-wrong", "0.2")
    batch = a_batch()
    logp_N = torch.where(batch.mask_N, -0.5, 99.0)
    shaped, _ = with_advantages(LastStage(config), batch, logp_N, None)
    # log pi_old(y|x) = -0.5 * length: -4, -3.5, -3, -2. Group means are 0.5.
    expected = torch.tensor([0.5 + 0.4, -0.5 - 0.7, -0.5 - 0.6, 0.5 + 0.2])
    torch.testing.assert_close(shaped.advantages_S, expected)


def test_the_kl_in_the_reward_is_that_of_each_sequence_alone():
    """A prompt of two tokens and uneven responses, against a loop over the sequences."""
    config = configuration("--reward-kl-coefficient", "0.5", "--smoothing-correct", "0.1")
    lengths = (1, 9, 4, 2)
    samples = [
        Sample(prompt_ids=(1, 2), response_ids=(3,) * n, logp_mu=(-1.0,) * n, reward=float(n % 2))
        for n in lengths
    ]
    batch = Batch.from_samples(samples, 4)
    generator = torch.Generator().manual_seed(0)
    old_N, reference_N = -torch.rand(2, len(batch.mask_N), generator=generator)
    shaped, metrics = with_advantages(LastStage(config), batch, old_N, reference_N)
    penalties, logps, start = [], [], 0
    for n in lengths:
        response = slice(start + 1, start + 1 + n)  # position 0 predicts the prompt's second token
        penalties.append(-0.5 * float((old_N[response] - reference_N[response]).sum()))
        logps.append(float(old_N[response].sum()))
        start += n + 1
    assert metrics["reward/kl_penalty"].value() == pytest.approx(np.mean(penalties))
    rewards = batch.rewards_S.numpy() + penalties
    # A right answer gains 0.1 times its surprise.
    smoothing = -0.1 * np.array(logps) * batch.rewards_S.numpy()
    expected = rewards - rewards.mean() + smoothing
    np.testing.assert_allclose(shaped.advantages_S, expected, rtol=1e-5)


def test_earlier_pipeline_stages_need_no_advantages():
    policy = LastStage(configuration())
    policy.is_last_stage = False
    batch = a_batch()
    assert with_advantages(policy, batch, None, None) == (batch, {})


def test_a_masked_batch_is_refused_where_mu_must_be_of_the_whole_vocabulary(tmp_path):
    batch = a_batch()
    batch.save(tmp_path / "plain.safetensors")
    assert RolloutBatch.open(tmp_path / "plain.safetensors").lengths_S.tolist() == [9, 8, 7, 5]
    masked = {name: torch.zeros(1, dtype=torch.int32) for name in ("support_ids_C",)}
    dataclasses.replace(batch, **masked).save(tmp_path / "masked.safetensors")
    with pytest.raises(DataError, match="sampled under a sampling mask.*without --top-p"):
        RolloutBatch.open(tmp_path / "masked.safetensors")
