"""Trajectories, against an engine whose routing of a token is a function of all tokens up to it."""

import zlib

import numpy as np
import pytest

from routing_replay.errors import RoutesError
from routing_replay.rollout import Conversation, GenerateRequest
from routing_replay.rollout.requests import Completion
from routing_replay.routes.origin import Origin, is_covered
from routing_replay.routes.payload import encode
from routing_replay.routes.routes import RouterLogits, Routes
from routing_replay.routes.spans import Sample, Span, Trajectory, num_known_rows

LAYERS, NUM_EXPERTS, TOP_K = (1, 2, 3), 64, 2


def true_row(tokens) -> np.ndarray:
    """ids [L, K] of the last token, from a checksum of the whole prefix."""
    seed = zlib.crc32(np.array(tokens, np.int64).tobytes())
    choice = np.random.default_rng(seed).permuted(
        np.tile(np.arange(NUM_EXPERTS, dtype=np.uint8), (len(LAYERS), 1)), axis=1
    )
    return choice[:, :TOP_K]


def true_rows(tokens) -> np.ndarray:
    return np.stack([true_row(tokens[: t + 1]) for t in range(len(tokens))])


def true_logprob(tokens) -> float:
    return -(zlib.crc32(np.array(tokens, np.int64).tobytes()) % 1000) / 100


def answer(prompt, output, start=0, version=0, **columns) -> Sample:
    """What the engine returns for a prompt after which it samples `output`."""
    tokens = [*prompt, *output]
    ids = true_rows(tokens[:-1])[start:]
    return Sample(
        prompt_ids=prompt,
        output_ids=output,
        mu_logprobs=np.array(
            [true_logprob(tokens[: len(prompt) + n + 1]) for n in range(len(output))], np.float32
        ),
        routes=Routes(
            expert_ids_TLK=ids,
            layers=LAYERS,
            num_experts=NUM_EXPERTS,
            weight_version_T=np.full(len(ids), version, np.int64),
            **columns,
        ),
        start=start,
    )


def whole(sample: Sample) -> list[Span]:
    return [Span(sample=sample, part="prompt"), Span(sample=sample)]


def assert_true(trajectory: Trajectory) -> None:
    """Every covered row is that of the trajectory's own prefix."""
    covered_T = trajectory.routes.covered_T
    truth = true_rows(trajectory.tokens_T[:-1].tolist())
    np.testing.assert_array_equal(trajectory.routes.expert_ids_TLK[covered_T], truth[covered_T])
    np.testing.assert_array_equal(covered_T, is_covered(trajectory.routes.origin_T))
    own_T = trajectory.is_own_context_T
    expected = [true_logprob(trajectory.tokens_T[: t + 1].tolist()) for t in np.flatnonzero(own_T)]
    np.testing.assert_allclose(trajectory.mu_logprobs_T[own_T], expected)
    assert not np.isfinite(trajectory.mu_logprobs_T[~trajectory.is_sampled_T]).any()


def test_one_answer_is_a_trajectory_with_all_its_rows():
    trajectory = Trajectory.from_spans(whole(answer([5, 6, 7], [8, 9])))
    assert_true(trajectory)
    assert trajectory.tokens_T.tolist() == [5, 6, 7, 8, 9]
    assert trajectory.routes.covered_T.tolist() == [True] * 4
    assert trajectory.is_sampled_T.tolist() == [False] * 3 + [True] * 2
    assert trajectory.num_uncovered() == {}


def test_the_next_turn_fills_the_last_answered_token_and_the_output_of_a_tool():
    first = answer([5, 6], [7, 8])
    second = answer([5, 6, 7, 8, 20, 21], [9, 10], start=3)
    tool = Span(token_ids=[20, 21])
    trajectory = Trajectory.from_spans([*whole(first), tool, Span(sample=second)])
    assert_true(trajectory)
    assert trajectory.routes.covered_T.all()
    assert trajectory.is_sampled_T.tolist() == [False] * 2 + [True] * 2 + [False] * 2 + [True] * 2


def test_tokens_that_no_later_request_saw_are_uncovered_and_counted():
    first = answer([5, 6], [7, 8])
    trajectory = Trajectory.from_spans([*whole(first), Span(token_ids=[20, 21, 22])])
    assert_true(trajectory)
    # Token 8 was never fed; of the tool's three tokens the last one has no row anyway.
    assert trajectory.routes.covered_T.tolist() == [True] * 3 + [False] * 3
    assert trajectory.num_uncovered() == {"not_fed": 1, "injected": 2}


def test_after_a_re_rendered_turn_rows_are_uncovered_and_never_shifted():
    """The template drops the thinking token 70 of the first answer from the second prompt."""
    first = answer([5, 6], [70, 7, 8])
    second = answer([5, 6, 7, 8, 20], [9, 10])
    spans = [*whole(first), Span(token_ids=[20]), Span(sample=second)]
    trajectory = Trajectory.from_spans(spans)
    assert_true(trajectory)
    assert trajectory.tokens_T.tolist() == [5, 6, 70, 7, 8, 20, 9, 10]
    assert trajectory.routes.covered_T.tolist() == [True] * 4 + [False] * 3
    assert trajectory.num_uncovered() == {"not_fed": 1, "injected": 1, "other_context": 1}
    assert trajectory.is_own_context_T.tolist() == [False] * 2 + [True] * 3 + [False] * 3


def test_the_first_token_that_differs_was_still_sampled_in_its_own_context():
    sample = answer([5, 6], [7, 8])
    other = Span(token_ids=[9])
    trajectory = Trajectory.from_spans([Span(sample=sample, part="prompt"), other])
    assert trajectory.is_sampled_T.tolist() == [False, False, False]
    shortened = Trajectory.from_spans([*whole(sample)[:1], Span(sample=sample, length=1), other])
    assert_true(shortened)
    assert shortened.is_own_context_T.tolist() == [False, False, True, False]
    assert shortened.routes.covered_T.tolist() == [True, True, True]


def test_branches_of_one_prefix_each_have_the_rows_of_their_own_tokens():
    root = answer([5, 6], [7])
    prompt = [5, 6, 7, 30]
    branches = [answer(prompt, [token, 9], start=2) for token in (40, 41, 42)]
    for branch in branches:
        spans = [*whole(root), Span(token_ids=[30]), Span(sample=branch)]
        trajectory = Trajectory.from_spans(spans, earlier=branches)
        assert_true(trajectory)
        assert trajectory.routes.covered_T.all()


def test_a_resumed_generation_keeps_the_weights_of_each_part():
    first = answer([5, 6], [7, 8], version=3)
    second = answer([5, 6, 7, 8], [9, 10], start=3, version=4)
    trajectory = Trajectory.from_spans([*whole(first), Span(sample=second)])
    assert_true(trajectory)
    # Token 8 was sampled under version 3 and first fed under version 4.
    assert trajectory.routes.weight_version_T.tolist() == [3, 3, 3, 4, 4]


def test_a_row_that_the_engine_lost_comes_from_another_request_or_keeps_its_cause():
    origin_T = np.array([Origin.PREFILL, Origin.EVICTED, Origin.DECODE], np.uint8)
    first = answer([5, 6], [7, 8], covered_T=is_covered(origin_T), origin_T=origin_T)
    alone = Trajectory.from_spans(whole(first))
    assert alone.num_uncovered() == {"evicted": 1}
    both = Trajectory.from_spans(whole(first), earlier=[answer([5, 6], [50])])
    assert_true(both)
    assert both.routes.covered_T.all()


def test_a_delta_without_its_earlier_turns_is_counted_as_not_captured():
    delta = answer([5, 6, 7], [8, 9], start=2)
    trajectory = Trajectory.from_spans(whole(delta))
    assert trajectory.num_uncovered() == {"not_captured": 2}
    filled = Trajectory.from_spans(whole(delta), earlier=[answer([5, 6], [7])])
    assert_true(filled)
    assert filled.routes.covered_T.all()


def test_logits_travel_with_their_rows():
    values = np.arange(4 * 3 * 64, dtype=np.float32).reshape(4, 3, 64)
    logits = RouterLogits(rows_N=np.array([0, 2]), values_NLE=values[:2])
    later = RouterLogits(rows_N=np.array([1]), values_NLE=values[2:3])
    first = answer([5, 6], [7, 8], router_logits=logits)
    second = answer([5, 6, 7, 8], [9, 10], start=3, router_logits=later)
    sampled = Trajectory.from_spans([*whole(first), Span(sample=second)]).routes.router_logits
    assert sampled.rows_N.tolist() == [0, 2, 4]
    np.testing.assert_array_equal(sampled.values_NLE, values[:3])


@pytest.mark.parametrize(
    ("spans", "wording"),
    [
        (lambda a, b: [Span(sample=a, length=1), Span(sample=a, offset=2)], "a gap of 2 tokens"),
        (
            lambda a, b: [Span(sample=a, part="prompt"), Span(sample=a, offset=1)],
            "a gap of 1 tokens",
        ),
        (
            lambda a, b: [Span(sample=a, part="prompt"), Span(sample=a, part="prompt", offset=1)],
            "an overlap of 1 tokens",
        ),
        (lambda a, b: [*whole(a), Span(sample=b)], "a gap of 1 tokens"),
        (lambda a, b: [*whole(a), Span(sample=b, part="prompt", offset=2)], "an overlap of 3"),
    ],
)
def test_a_gap_or_an_overlap_is_an_error_with_its_place(spans, wording):
    first = answer([5, 6], [7, 8, 9])
    second = answer([5, 6, 7, 8, 9, 20], [10, 11], start=4)
    with pytest.raises(RoutesError, match=f"the spans leave {wording}.*span [012]"):
        Trajectory.from_spans(spans(first, second))


def test_spans_and_samples_that_do_not_fit_are_refused():
    sample = answer([5, 6], [7, 8])
    with pytest.raises(RoutesError, match="a span leaves its output"):
        Span(sample=sample, offset=1, length=2)
    with pytest.raises(RoutesError, match="a span has a sample or tokens of its own"):
        Span()
    with pytest.raises(RoutesError, match="the part is unknown"):
        Span(sample=sample, part="middle")
    with pytest.raises(RoutesError, match="the routes of a sample do not fit its tokens"):
        Sample(prompt_ids=[5], output_ids=[6], routes=sample.routes)
    with pytest.raises(RoutesError, match="the log-probs of a sample do not fit its tokens"):
        Sample(prompt_ids=[5], output_ids=[6], mu_logprobs=np.zeros(2, np.float32))
    with pytest.raises(RoutesError, match="no sample of the trajectory has routes"):
        Trajectory.from_spans([Span(token_ids=[1, 2])])


class Agent:
    """A random history of requests, as agents make them, and the trajectories in it."""

    def __init__(self, seed: int):
        self.random = np.random.default_rng(seed)
        self.conversation = Conversation()
        self.version = 0

    def tokens(self, low: int, high: int) -> list[int]:
        # Few different tokens: prefixes meet by chance.
        return self.random.integers(3, size=self.random.integers(low, high)).tolist()

    def turn(self, spans: list[Span]) -> list[Span]:
        """Ask for the next answer, perhaps with a prompt that was rendered in another way."""
        prompt = [token for span in spans for token in span.tokens()]
        if self.random.random() < 0.3:
            prompt = [t for t in prompt if t != 2 or self.random.random() < 0.8] or [1]
        request = self.conversation.request(prompt, {})
        self.version += int(self.random.random() < 0.3)
        returned = answer(prompt, self.tokens(1, 5), request.start, self.version)
        completion = Completion(
            output_ids=list(returned.output_ids),
            mu_logprobs=returned.mu_logprobs,
            routes=returned.routes,
            finish_reason="stop",
            weight_version="0",
            cached_tokens=0,
            num_retractions=0,
        )
        return [*spans, Span(sample=self.conversation.add(request, completion))]


@pytest.mark.parametrize("seed", range(20))
def test_a_random_agent_never_gets_a_row_of_another_context(seed):
    agent = Agent(seed)
    trunk = agent.turn([Span(token_ids=agent.tokens(2, 6))])
    num_covered = 0
    for _ in range(8):
        if agent.random.random() < 0.3:
            trunk = trunk[: max(2, len(trunk) - 2)]  # a branch from an earlier turn
        if agent.random.random() < 0.6:
            trunk = [*trunk, Span(token_ids=agent.tokens(1, 4))]
        trunk = agent.turn(trunk)
        trajectory = agent.conversation.trajectory(trunk)
        assert_true(trajectory)
        num_covered += int(trajectory.routes.covered_T.sum())
    assert num_covered > 20


def test_a_conversation_asks_only_for_rows_that_it_does_not_hold():
    conversation = Conversation()
    first = conversation.request([5, 6], {})
    assert first.start == 0
    conversation.samples.append(answer([5, 6], [7, 8]))
    # Rows 0 to 2 are known; token 8 was never fed.
    assert conversation.request([5, 6, 7, 8, 9], {}).start == 3
    assert conversation.request([5, 6, 50], {}).start == 2
    assert conversation.request([4], {}).start == 0
    assert isinstance(conversation.request([5], {"temperature": 1.0}), GenerateRequest)


def bytes_of_turns(num_turns, is_delta=True):
    """What travels in a conversation: each turn adds 9 sampled tokens and 16 of a tool.

    Returns:
        Bytes of all payloads, rows in them, and tokens of the conversation.
    """
    rng, conversation, tokens = np.random.default_rng(0), Conversation(), []
    num_bytes = num_rows = 0
    for _ in range(num_turns):
        tokens += rng.integers(0, 1000, 16).tolist()
        start = conversation.request(tokens, {}).start if is_delta else 0
        sample = answer(list(tokens), rng.integers(0, 1000, 9).tolist(), start)
        conversation.samples.append(sample)
        num_bytes += len(encode(sample.routes, start=start))
        num_rows += sample.routes.num_rows
        tokens += sample.output_ids
    return num_bytes, num_rows, len(tokens)


def test_the_bytes_of_a_conversation_grow_with_its_tokens_and_not_with_their_square():
    (few, rows, num_tokens), (many, _, _) = bytes_of_turns(8), bytes_of_turns(32)
    # The last token was never fed; every other row travels once.
    assert rows == num_tokens - 1
    assert many / few == pytest.approx(4, rel=0.02)
    few, many = bytes_of_turns(8, is_delta=False)[0], bytes_of_turns(32, is_delta=False)[0]
    # 32 * 33 / 2 turns instead of 8 * 9 / 2; each payload's header is the same.
    assert 10 < many / few < 528 / 36


def test_known_rows_end_at_the_first_one_that_is_not_covered():
    sample = answer([5, 6, 7], [8], covered_T=np.array([True, False, True]))
    assert num_known_rows([sample], [5, 6, 7, 8]) == 1
    assert num_known_rows([], [5, 6]) == 0
