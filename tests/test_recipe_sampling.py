"""The recipe's sampling on a real SGLang server: masks, likely tokens, dynamic sampling."""

import numpy as np
import pytest
import torch
from recipe_rollouts import GROUP, MASKED, NEW_TOKENS, PROMPTS, prompts_of, rollout_of, samples_of

from routing_replay.errors import ConfigError

__all__ = ["rollout_of"]  # a fixture


def test_a_mask_holds_every_sampled_token_and_most_of_the_probability(rollout_of):
    samples = samples_of(rollout_of(*MASKED), [""] * 2, 4)
    for sample in samples:
        assert all(y in ids for y, ids in zip(sample.response_ids, sample.support, strict=True))
        assert all(1 <= len(ids) < 100 for ids in sample.support)
        # The smallest set with 0.6: its last token takes it beyond that.
        assert 0.6 < sample.support_mass < 0.75


def test_likely_tokens_are_log_probs_within_the_mask(rollout_of):
    rollout = rollout_of(*MASKED, "--objective", "dppo_topk")
    (sample,) = samples_of(rollout, [""], 1)
    assert sample.top_ids.shape == sample.top_logp_mu.shape == (NEW_TOKENS, 5)
    rows = zip(sample.response_ids, sample.logp_mu, sample.support, strict=True)
    for t, (token, logp, ids) in enumerate(rows):
        is_inside = np.isin(sample.top_ids[t], ids)
        assert (np.isfinite(sample.top_logp_mu[t]) == is_inside).all()
        assert np.exp(sample.top_logp_mu[t]).sum() < 1 + 1e-5
        if token in sample.top_ids[t]:
            (place,) = np.flatnonzero(sample.top_ids[t] == token)
            assert sample.top_logp_mu[t, place] == pytest.approx(logp, abs=1e-5)


def test_evaluation_asks_for_no_routes_and_no_mask(rollout_of):
    (sample,) = samples_of(rollout_of(*MASKED), [""], 1, for_training=False)
    assert sample.routes is None
    assert sample.support is None
    assert len(sample.response_ids) == NEW_TOKENS


def test_a_mask_larger_than_the_server_allows_is_an_error_at_the_start(rollout_of):
    with pytest.raises(Exception, match="top_k") as caught:
        rollout_of("--top-p", "0.9", "--top-k", "5000")
    assert type(caught.value).__module__ == "routing_replay.errors"


def test_more_likely_tokens_than_there_are_is_an_error_at_the_start(rollout_of):
    with pytest.raises(ConfigError, match="'topk_logprobs' asks for more.*at most 128; got 200"):
        rollout_of("--objective", "dppo_topk", "--topk-logprobs", "200")


def groups_of(rollout, draw, rounds):
    """A batch of groups, as a step samples it."""
    from recipes.minirl.rollout.groups import StepFiles
    from recipes.minirl.rollout.sampling import sample_groups

    def sample(prompts, first):
        return rollout.sample(prompts, GROUP, StepFiles(), first)

    return sample_groups(sample, draw, PROMPTS, rounds)


def test_dynamic_sampling_replaces_groups_of_equal_rewards(rollout_of):
    rollout = rollout_of()
    answers = ["always", "", "always", ""] + [""] * 20
    stream = prompts_of(answers)
    drawn = []

    def draw(offset, count):
        drawn.append((offset, count))
        return stream[offset : offset + count]

    groups = groups_of(rollout, draw, rounds=4)
    rewards_GS = torch.tensor([s.reward for s in groups.samples]).view(PROMPTS, GROUP)
    assert ((rewards_GS > 0).any(1) & (rewards_GS < 1).any(1)).all()
    # The first round misses the two that every response solves, and perhaps more.
    assert drawn[0] == (0, PROMPTS)
    assert drawn[1][0] == PROMPTS
    assert drawn[1][1] >= 2
    assert groups.num_rounds == len(drawn) <= 5
    assert groups.num_prompts == sum(count for _, count in drawn)
    # In the order of sampling: prompts' tokens identify them.
    encoded = [rollout.encode(p) for p in stream]
    places = [encoded.index(s.prompt_ids.tolist()) for s in groups.samples[::GROUP]]
    assert places == sorted(places)
    assert not {0, 2} & set(places)


def test_dynamic_sampling_gives_up_after_its_rounds_with_a_full_batch(rollout_of):
    stream = prompts_of(["always"] * 12)
    groups = groups_of(rollout_of(), lambda o, c: stream[o : o + c], rounds=2)
    assert (groups.num_rounds, groups.num_prompts) == (3, 12)
    assert len(groups.samples) == PROMPTS * GROUP
    assert all(sample.reward == 1 for sample in groups.samples)


def test_without_dynamic_sampling_a_batch_is_its_prompts_in_order(rollout_of):
    rollout = rollout_of()
    stream = prompts_of(["always", "", "always", ""])
    groups = groups_of(rollout, lambda o, c: stream[o : o + c], rounds=0)
    assert (groups.num_rounds, groups.num_prompts) == (1, PROMPTS)
    expected = [rollout.encode(p) for p in stream for _ in range(GROUP)]
    assert [s.prompt_ids.tolist() for s in groups.samples] == expected
