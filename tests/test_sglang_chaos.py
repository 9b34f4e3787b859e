"""A client whose servers fail at random points: it gets what it would have got without.

Two proxies before the shared server damage answers, freeze, die and come back with old weights;
`python -m tools.chaos` does the same with real processes and a whole training run.
"""

import random
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
from sglang_checks import assert_true
from sglang_servers import MODEL, random_prompt, request

from recipes.minirl.rollout.answers import StepAnswers
from recipes.minirl.settings.command_line import parse
from routing_replay.rollout import ClientOptions, RolloutClient
from tools.chaos.proxy import FAULTS, Proxy

NUM_REQUESTS, NUM_NEW = 24, 40
OPTIONS = ClientOptions(
    request_timeout_s=60,
    retry_wait_s=0.05,
    num_retries=8,
    health_every_s=1,
    health_timeout_s=3,
    recovery_timeout_s=60,
)
# Greedy: what was sampled does not depend on who sampled it, and with whom.
SAMPLING = {"temperature": 0.0, "max_new_tokens": NUM_NEW, "ignore_eos": True}


class Killed(Exception):
    """Stands for the end of the process in the middle of a batch."""


@pytest.fixture(scope="module")
def asked():
    return [
        replace(request(random_prompt(200 + n, 10 + n % 7)), sampling=SAMPLING)
        for n in range(NUM_REQUESTS)
    ]


def events(proxies, rng, until):
    """Freeze, kill and restart one server after another, and abort what they do."""
    while not until.wait(rng.uniform(0.2, 0.8)):
        proxy = rng.choice(proxies)
        match rng.choice(("freeze", "kill", "abort")):
            case "freeze":
                proxy.freeze()
                time.sleep(rng.choice((0.3, 8.0)))
                proxy.release()
            case "kill":
                proxy.end()
                time.sleep(0.3)
                proxy.restart()
            case "abort":
                RolloutClient([proxy._target]).abort()


class Life:
    """One process that samples a batch: what it found, and what it stored before it died.

    Args:
        folder: Of the stored answers.
        client: With the current weights.
        dies_after: Answers until it is killed; None: it lives.
    """

    def __init__(self, folder, client, dies_after):
        self.client, self.dies_after, self.num_stored = client, dies_after, 0
        self.answers = StepAnswers.of(folder, 1, parse([]), MODEL).group(0)

    def sample(self, asked):
        """The completions, or None for a life that ended before."""
        self.asked = asked
        found = [self.answers.find(*numbered) for numbered in enumerate(asked)]
        self.missing = [n for n, completion in enumerate(found) if completion is None]
        try:
            sampled = self.client.generate_each([asked[n] for n in self.missing], self.store)
        except Killed:
            return None
        assert len(sampled) == len(self.missing)
        return dict(enumerate(found)) | dict(zip(self.missing, sampled, strict=True))

    def store(self, place, completion):
        if self.num_stored == self.dies_after:
            raise Killed
        self.num_stored += 1
        number = self.missing[place]
        self.answers.add(number, self.asked[number], completion)
        return completion


@pytest.mark.timeout(300)
def test_a_batch_among_failing_servers_is_the_undisturbed_one_and_nothing_is_sampled_twice(
    server, references, asked, tmp_path
):
    weights = str(server.checkpoints[0]), 1
    server.client.update_weights(*weights)
    undisturbed = server.client.generate(asked)
    server.client.flush_cache()
    rng, is_over = random.Random(4), threading.Event()
    faulty = {n: rng.choice(FAULTS) for n in rng.sample(range(60), 14)}
    lives, num_sent = [], []
    with Proxy(server.server.url, faulty.get) as one, Proxy(server.server.url, faulty.get) as two:
        chaos = threading.Thread(target=events, args=([one, two], rng, is_over))
        chaos.start()
        try:
            for dies_after in (5, 9, None):
                num_sent.append((len(one.prompts), len(two.prompts)))
                client = RolloutClient([one.url, two.url], MODEL, OPTIONS)
                client.update_weights(*weights)
                lives.append(Life(tmp_path, client, dies_after))
                completions = lives[-1].sample(asked)
        finally:
            is_over.set()
            chaos.join()
        sent = [one.prompts[i:] + two.prompts[j:] for i, j in num_sent]
    # A life that was killed may have had further answers in its hands.
    assert len(lives[0].missing) == NUM_REQUESTS
    assert len(lives[1].missing) <= NUM_REQUESTS - 5
    assert len(lives[2].missing) <= NUM_REQUESTS - 14
    for life, prompts in zip(lives, sent, strict=True):
        stored = [tuple(asked[n].input_ids) for n in range(NUM_REQUESTS) if n not in life.missing]
        assert not [p for p in prompts for known in stored if p[: len(known)] == known]
    assert sum(life.client.counts.get("faults", 0) for life in lives) >= 5
    for number, (request_, expected) in enumerate(zip(asked, undisturbed, strict=True)):
        got = completions[number]
        assert (got.finish_reason, got.output_ids) == ("length", expected.output_ids)
        np.testing.assert_allclose(got.mu_logprobs, expected.mu_logprobs, rtol=0, atol=1e-4)
        assert_true(request_, got, references[0])
        assert set(got.routes.weight_version_T.tolist()) == {1}
