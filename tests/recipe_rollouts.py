"""The recipe's rollout side on the tests' SGLang server: settings, prompts, a reward."""

import numpy as np
import pytest
from sglang_servers import MODEL

PROMPTS, GROUP, MINIBATCH, NEW_TOKENS = 4, 4, 8, 8
SIZES = ["--prompts-per-step", str(PROMPTS), "--samples-per-prompt", str(GROUP)]
SIZES += ["--minibatch-size", str(MINIBATCH), "--microbatch-size", "4", "--nproc", "1"]
SIZES += ["--max-new-tokens", str(NEW_TOKENS), "--topk-logprobs", "5"]
# The model is unsure: 100 of its 128 tokens hold nearly everything, and top-p is what cuts.
MASKED = ["--top-p", "0.6", "--top-k", "100"]


def configuration(*flags):
    from recipes.minirl.settings.command_line import parse

    return parse([*SIZES, *flags])


def prompts_of(answers):
    from recipes.minirl.data.prompts import Prompt

    rng = np.random.default_rng(3)
    texts = [" ".join(f"t{n}" for n in rng.integers(3, 128, 6)) for _ in answers]
    return [
        Prompt(prompt=text, answer=answer, verifier="parity")
        for text, answer in zip(texts, answers, strict=True)
    ]


def samples_of(rollout, answers, num_samples, for_training=True):
    """The samples of prompts with these answers, group after group."""
    from recipes.minirl.rollout.groups import StepFiles

    files = StepFiles() if for_training else None
    groups = rollout.sample(prompts_of(answers), num_samples, files)
    return [sample for group in groups for sample in group.samples]


def parity(response, answer):
    """1 for an even sum of the tokens' numbers; "always" accepts every response."""
    even = sum(int(word.removeprefix("t")) for word in response.split()) % 2 == 0
    return float(even or answer == "always")


@pytest.fixture(scope="module")
def rollout_of(sglang_server):
    """Makes the recipe's Rollout for some flags, on the shared server with its first weights."""
    from recipes.minirl.data.verifiers import VERIFIERS
    from recipes.minirl.rollout.sampling import Rollout

    sglang_server.restore()
    VERIFIERS["parity"] = parity
    checkpoint = sglang_server.checkpoints[0]
    yield lambda *flags: Rollout(
        configuration(*flags), [sglang_server.server.url], checkpoint, MODEL
    )
    del VERIFIERS["parity"]
