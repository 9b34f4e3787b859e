"""Responses of several answers, with an engine whose routing is a function of the prefix."""

import asyncio
import contextlib
from types import SimpleNamespace

import numpy as np
import pytest
from test_spans import answer, true_rows

from recipes.minirl.data.prompts import Prompt
from recipes.minirl.rollout.batch import Batch, Sample
from recipes.minirl.rollout.groups import StepFiles
from recipes.minirl.rollout.scores import joined
from recipes.minirl.rollout.turns import TOOLS, Response, Tool, calculate
from routing_replay.errors import DataError
from routing_replay.rollout import Completion, GenerateRequest, Session, SharedSession

# One letter is a token: "a" is 0.
TOKENIZER = SimpleNamespace(
    decode=lambda ids, skip_special_tokens: "".join(chr(97 + i) for i in ids),
    encode=lambda text, add_special_tokens: [ord(letter) - 97 for letter in text],
)
DOUBLE = Tool(stop="z", run=lambda text: text[:2] * 2)


def add(response, text):
    """The engine's answer to the response's next request."""
    request = response.request(GenerateRequest(input_ids=()))
    returned = answer(list(request.input_ids), TOKENIZER.encode(text, False), request.start)
    completion = Completion(
        output_ids=list(returned.output_ids),
        mu_logprobs=returned.mu_logprobs,
        routes=returned.routes,
        finish_reason="stop",
        weight_version="0",
        cached_tokens=0,
        num_retractions=0,
    )
    response.add(request, completion, TOKENIZER)
    return request


def text_of(response):
    return TOKENIZER.decode([*response.prompt_ids, *response.columns()["response_ids"]], True)


def test_calls_of_a_tool_are_part_of_the_sequence_and_only_answers_are_sampled():
    response = Response(prompt_ids=[0, 1], max_new_tokens=12, tool=DOUBLE, tool_calls=2)
    assert add(response, "cdz").sampling == {"max_new_tokens": 12, "stop": ["z"]}
    # The tool's output and the answer's last token are new to the engine, rows 0 to 3 are known.
    second = add(response, "efz")
    assert (second.start, second.sampling["max_new_tokens"]) == (4, 9)
    assert not response.is_done
    add(response, "z")  # a third call is not allowed: it is the end
    assert response.is_done
    assert text_of(response) == "ab" + "cdz" + "cdcd" + "efz" + "efef" + "z"
    columns = response.columns()
    assert columns["is_sampled"].tolist() == [c == "s" for c in "sss....sss....s"]
    assert columns["routes"].covered_T.all()
    expected_TLK = true_rows([0, 1, *columns["response_ids"]][:-1])
    np.testing.assert_array_equal(columns["routes"].expert_ids_TLK, expected_TLK)
    # The reward is read from what follows the tool's last output.
    assert TOKENIZER.decode(response.last_ids, True) == "z"


def test_a_response_that_is_cut_at_its_last_token_is_done():
    response = Response(prompt_ids=[0], max_new_tokens=2, tool=DOUBLE, tool_calls=9)
    add(response, "cz")
    assert response.is_done  # no token is left to answer with


class Engine:
    """Answers each request with the texts that are left, as the recipe's client does."""

    def __init__(self, *texts):
        self.texts, self.requests = list(texts), []

    @contextlib.asynccontextmanager
    async def session(self):
        yield Session(self, asyncio.get_running_loop().create_future())

    async def complete(self, request):
        self.requests.append(request)
        return self.answer(request, *self.texts.pop(0))

    def answer(self, request, text, reason):
        returned = answer(list(request.input_ids), TOKENIZER.encode(text, False), request.start)
        return Completion(
            output_ids=list(returned.output_ids),
            mu_logprobs=returned.mu_logprobs,
            routes=returned.routes,
            finish_reason=reason,
            weight_version="0",
            cached_tokens=0,
            num_retractions=0,
        )


@pytest.fixture
def rollout_of(monkeypatch):
    """The recipe's Rollout over an engine; what its constructor asks of a server is left out."""
    from recipes.minirl.rollout.sampling import Rollout
    from recipes.minirl.settings.command_line import parse

    monkeypatch.setitem(TOOLS, "calculator", DOUBLE)

    def make(engine, *flags):
        rollout = Rollout.__new__(Rollout)
        rollout.config, rollout.tokenizer = parse(list(flags)), TOKENIZER
        rollout._session = SharedSession(engine.session)
        monkeypatch.setattr(rollout, "encode", lambda prompt: [0, 1])
        return rollout

    return make


def test_the_rollout_takes_turns_until_every_response_is_done(rollout_of):
    engine = Engine(("cdz", "stop"), ("e", "stop"), ("cd", "stop"))
    rollout = rollout_of(engine, "--tool", "calculator", "--max-new-tokens", "8")
    prompt = Prompt(prompt="ab", answer="cd")
    (group,) = rollout.sample([prompt], 2, StepFiles())
    first, second = group.samples
    # The first calls the tool, the second answers at once; then the first answers.
    assert [len(request.input_ids) for request in engine.requests] == [2, 2, 2 + 3 + 4]
    assert TOKENIZER.decode(first.response_ids, True) == "cdz" + "cdcd" + "cd"
    assert first.is_sampled.tolist() == [True] * 3 + [False] * 4 + [True] * 2
    assert len(first.logp_mu) == 5
    assert (first.reward, second.reward) == (1.0, 0.0)
    assert second.is_sampled is None and second.routes.num_rows == 2
    assert first.routes.num_rows == 10 and first.routes.covered_T.all()


def test_an_answer_that_is_not_whole_is_an_error(rollout_of):
    """The client returns whole answers: it continues what someone else aborts."""
    rollout = rollout_of(Engine(("cd", "abort")))
    with pytest.raises(DataError, match="a response is not finished.*got abort"):
        rollout.sample([Prompt(prompt="ab", answer="cd")], 1, StepFiles())


def test_scores_of_answers_are_joined():
    one = {"logp_mu": np.array([-1.0, -2.0]), "top_ids": np.ones((2, 3)), "top_logp_mu": None}
    one |= {"support": [[1], [2]], "support_mass": 0.5}
    two = {"logp_mu": np.array([-3.0]), "top_ids": np.zeros((1, 3)), "top_logp_mu": None}
    two |= {"support": [[3]], "support_mass": 0.8}
    whole = joined([one, two])
    assert whole["logp_mu"].tolist() == [-1.0, -2.0, -3.0]
    assert whole["top_ids"].shape == (3, 3)
    assert whole["support"] == [[1], [2], [3]]
    assert whole["support_mass"] == pytest.approx((2 * 0.5 + 0.8) / 3)


def test_a_batch_masks_what_the_tool_returned():
    sample = Sample(
        prompt_ids=(1, 2),
        response_ids=(3, 4, 5, 6),
        logp_mu=(-1.0, -2.0, -3.0),
        is_sampled=(True, False, True, True),
    )
    batch = Batch.from_samples([sample], group_size=1)
    # Position t predicts token t + 1: the sampled tokens 3, 5 and 6.
    assert batch.mask_N.tolist() == [False, True, False, True, True]
    assert batch.logp_mu_N.tolist() == [0, -1, 0, -2, -3]
    assert batch.lengths_S.tolist() == [6]


@pytest.mark.parametrize(
    ("text", "result"),
    [("37+48=", "085"), ("0850+046+56=", "102"), ("12-34=", "-22"), ("=", "-"), ("3+=", "-")],
)
def test_the_calculator_takes_the_last_two_numbers(text, result):
    assert calculate(text) == result
