"""recipes.minirl.rollout.versions: which weights sampled each token, as lags of a step tell it."""

from dataclasses import replace

import numpy as np
import pytest

from recipes.minirl.rollout.batch import Sample
from recipes.minirl.rollout.versions import num_old_context, token_versions, version_metrics
from routing_replay.rollout import Completion
from routing_replay.routes.routes import Routes


def routes_of(versions):
    return Routes(
        expert_ids_TLK=np.tile(np.arange(2, dtype=np.uint8), (len(versions), 1, 1)),
        layers=(0,),
        num_experts=4,
        weight_version_T=np.array(versions),
    )


def answer(num_tokens, versions=None, *, sent=3, end="5"):
    return Completion(
        output_ids=[7] * num_tokens,
        mu_logprobs=np.zeros(num_tokens, np.float32),
        routes=None if versions is None else routes_of(versions),
        finish_reason="length",
        weight_version=end,
        cached_tokens=0,
        num_retractions=0,
        sent_version=sent,
    )


@pytest.mark.parametrize(
    ("completion", "versions"),
    [
        # Four rows of the prompt's five tokens came from a cache; the fifth predicts.
        (answer(3, [1, 1, 1, 1, 4, 4, 5]), [4, 4, 5]),
        # A later turn asks for no rows before its last known one.
        (answer(3, [4, 4, 5]), [4, 4, 5]),
        # The server was told no version for a while.
        (answer(3, [4, -1, 5]), [4, 3, 5]),
        (answer(3), [3, 3, 3]),
        (answer(3, sent=-1), [5, 5, 5]),
        (answer(3, sent=-1, end="default"), [-1, -1, -1]),
        # Aborted before its first token.
        (answer(0, [2]), []),
    ],
)
def test_a_token_has_the_version_of_the_forward_that_predicted_it(completion, versions):
    assert token_versions(completion).tolist() == versions


def sample_of(rows, num_sampled, is_sampled=None):
    num_tokens = num_sampled if is_sampled is None else len(is_sampled)
    predicts = rows[len(rows) - num_tokens :]
    kept = [v for v, s in zip(predicts, is_sampled or [True] * num_tokens, strict=True) if s]
    return Sample(
        prompt_ids=(1,) * (len(rows) - num_tokens + 1),
        response_ids=(2,) * num_tokens,
        logp_mu=(-1.0,) * num_sampled,
        is_sampled=is_sampled,
        routes=routes_of(rows),
        versions=np.array(kept),
    )


def test_tokens_after_rows_of_older_weights_are_counted():
    assert num_old_context(sample_of([4, 4, 4, 4], 3)) == 0
    assert num_old_context(sample_of([4, 4, 5, 5], 3)) == 2
    # A prefix of older weights that a cache kept is context as well.
    assert num_old_context(sample_of([3, 4, 4, 4], 3)) == 3
    # What a tool returned was not sampled, and an unknown version tells nothing.
    assert num_old_context(sample_of([4, 4, 5, 5], 2, (True, False, True))) == 1
    assert num_old_context(sample_of([-1, 4, 4, 4], 3)) == 0
    assert num_old_context(replace(sample_of([4, 5, 5, 5], 3), routes=None)) == 0


def test_a_response_is_as_old_as_its_oldest_token():
    samples = [sample_of([4, 4, 5, 6], 3), sample_of([6, 6, 6, 6], 3), sample_of([5, 6, 6, 6], 3)]
    samples = [replace(one, num_old_context=num_old_context(one)) for one in samples]
    # Oldest tokens are of versions 4, 6 and 6: the prompt's first row predicts a prompt token.
    expected = {
        "rollout/version_lag": 2 / 3,
        "rollout/version_lag_max": 2,
        "rollout/mixed_version_fraction": 1 / 3,
    }
    assert version_metrics(samples, 6, False) == pytest.approx(expected)
    # Two tokens of the first response and all of the third follow older rows.
    expected["rollout/old_context_fraction"] = 5 / 9
    assert version_metrics(samples, 6, True) == pytest.approx(expected)


def test_responses_of_unknown_weights_have_no_lag():
    unknown = replace(sample_of([4, 4], 1), versions=np.array([-1]))
    assert version_metrics([unknown], 6, False)["rollout/version_lag"] == 0
