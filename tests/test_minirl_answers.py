"""The recipe's answers: what was sampled is found again, bit for bit, or sampled again."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace

import numpy as np
import pytest

from recipes.minirl.rollout.answers import StepAnswers, remove_covered
from recipes.minirl.settings.command_line import parse
from routing_replay.errors import DataError
from routing_replay.rollout import Completion, GenerateRequest
from routing_replay.routes.origin import Origin, is_covered
from routing_replay.routes.routes import RouterLogits, Routes
from routing_replay.routes.shape import MoEShape

MODEL = MoEShape(layers=(1, 2, 5), num_experts=300, top_k=2)
NUM_NEW = 4


def request_of(prompt, **options):
    return GenerateRequest(
        input_ids=prompt,
        sampling={"temperature": 0.7, "max_new_tokens": NUM_NEW},
        capture="logits",
        **options,
    )


def completion_to(request, seed):
    """A response with every column that one can have."""
    rng = np.random.default_rng(seed)
    num_rows = len(request.input_ids) + NUM_NEW - 1 - request.start
    origin_T = rng.choice([Origin.PREFILL, Origin.DECODE], num_rows).astype(np.uint8)
    origin_T[0] = Origin.EVICTED
    ids_TLK = np.stack(
        [rng.permutation(300)[: 3 * 2].reshape(3, 2) for _ in range(num_rows)]
    ).astype(np.uint16)
    routes = Routes(
        expert_ids_TLK=ids_TLK,
        layers=MODEL.layers,
        num_experts=300,
        covered_T=is_covered(origin_T),
        combine_weights_TLK=rng.random((num_rows, 3, 2)).astype(np.float32),
        gate_probs_TLK=(rng.random((num_rows, 3, 2)) / 2).astype(np.float16),
        router_logits=RouterLogits(
            rows_N=np.array([1, 3]), values_NLE=rng.random((2, 3, 300)).astype(np.float32)
        ),
        origin_T=origin_T,
        weight_version_T=rng.integers(-1, 3, num_rows),
    )
    return Completion(
        output_ids=rng.integers(0, 99, NUM_NEW).tolist(),
        mu_logprobs=-rng.random(NUM_NEW).astype(np.float32),
        routes=routes,
        finish_reason="length",
        weight_version="7",
        cached_tokens=3,
        num_retractions=1,
        sent_version=6,
        sampling_mask=[[1, 2], [3], [4], [5, 6, 7]],
        mask_logprobs=-rng.random(NUM_NEW).astype(np.float32),
        top_ids=rng.integers(0, 99, (NUM_NEW, 2)),
        top_logprobs=-rng.random((NUM_NEW, 2)).astype(np.float32),
        url="http://a",
    )


def assert_equal(one, other):
    """All fields, and all columns of the routes."""
    for f in fields(one):
        a, b = getattr(one, f.name), getattr(other, f.name)
        if isinstance(a, Routes | RouterLogits):
            assert_equal(a, b)
        elif isinstance(a, np.ndarray):
            np.testing.assert_array_equal(a, b)
            assert a.dtype == b.dtype, f.name
        else:
            assert a == b, f.name


def opened(folder, *flags, step=3):
    return StepAnswers.of(folder, step, parse(list(flags)), MODEL).group(0)


OPTIONS = {"wants_sampling_mask": True, "num_top_logprobs": 2}
REQUESTS = [
    request_of([1, 2, 3], **OPTIONS),
    request_of([1, 2, 3], **OPTIONS),
    request_of([4, 5, 6], start=2, **OPTIONS),
]


@pytest.fixture
def stored(tmp_path):
    """A folder in which the last two of three responses were stored; and these."""
    answers = opened(tmp_path)
    completions = {number: completion_to(REQUESTS[number], number) for number in (2, 1)}
    for number, completion in completions.items():
        answers.add(number, REQUESTS[number], completion)
    return tmp_path, completions


def found(answers):
    return [answers.find(*numbered) for numbered in enumerate(REQUESTS)]


def test_a_response_is_found_by_its_request_and_member_with_every_column_it_had(stored):
    folder, completions = stored
    first, second, third = found(opened(folder))
    assert first is None  # the identical request is another member's
    assert_equal(second, completions[1])
    assert_equal(third, completions[2])


def test_a_response_is_found_whatever_priority_its_request_had(stored):
    answers = opened(stored[0])
    assert answers.find(1, replace(REQUESTS[1], priority=-4)) is not None


def test_another_group_of_the_same_prompt_is_not_given_the_responses_of_the_first(stored):
    step = StepAnswers.of(stored[0], 3, parse([]), MODEL)
    assert [c is None for c in found(step.group(0))] == [True, False, False]
    assert found(step.group(1)) == [None] * 3


def test_responses_of_other_sampling_training_or_steps_are_not_found(stored):
    folder, _ = stored
    assert found(opened(folder, "--learning-rate", "1e-9")) == [None] * 3
    assert found(opened(folder, step=4)) == [None] * 3
    # How long the run is, and where it is, does not matter.
    assert found(opened(folder, "--steps", "99", "--run-dir", "x"))[1] is not None


def test_what_a_crash_cut_off_or_a_disk_damaged_is_sampled_again(stored):
    folder, completions = stored
    path = opened(folder).path
    lines = path.read_bytes().splitlines(keepends=True)
    record = json.loads(lines[0])
    payload = record["routes"]
    record["routes"] = payload[:60] + "AAAA" + payload[64:]
    path.write_bytes(json.dumps(record).encode() + b"\n" + lines[1][:-20])
    answers = opened(folder)
    assert found(answers) == [None] * 3
    # What comes after a line that was cut short stands in a line of its own.
    answers.add(1, REQUESTS[1], completions[1])
    assert_equal(found(opened(folder))[1], completions[1])


def test_many_threads_store_whole_lines(tmp_path):
    answers = opened(tmp_path)
    completions = [completion_to(REQUESTS[0], n) for n in range(40)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(answers.add, range(40), [REQUESTS[0]] * 40, completions))
    again = opened(tmp_path)
    for member, completion in enumerate(completions):
        assert_equal(again.find(member, REQUESTS[0]), completion)


def test_a_full_disk_is_an_error_that_says_how_to_go_on(tmp_path):
    answers = opened(tmp_path)
    answers.path.symlink_to("/dev/full")
    message = r"responses of a step cannot be written; got No space left.*--resume"
    with pytest.raises(DataError, match=message):
        answers.add(0, REQUESTS[0], completion_to(REQUESTS[0], 0))


def test_a_checkpoint_removes_the_responses_that_it_covers(tmp_path):
    for step in (3, 4, 5):
        answers = opened(tmp_path, step=step)
        answers.add(0, REQUESTS[0], completion_to(REQUESTS[0], 0))
    remove_covered(tmp_path, 4)
    assert [path.name for path in (tmp_path / "answers").iterdir()] == ["step_000005"]
