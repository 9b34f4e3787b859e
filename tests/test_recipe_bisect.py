"""`tools.score_arms` and `routing-replay bisect` on rollouts of a real SGLang server.

The server computes in float32, and so does the trainer: nothing but the planted factor is apart.
"""

import shutil

import pytest
import torch
from megatron_worlds import megatron, run_world
from planted_engines import NUM_PROMPT, NUM_TOKENS, Rollout
from planted_gaps import sharpen, write_next_step
from sglang_servers import MODEL, random_prompt

from routing_replay.analysis.arms import ScoredArms
from routing_replay.analysis.bisection import bisect
from routing_replay.rollout import GenerateRequest
from routing_replay.routes.table import RouteTable

pytestmark = pytest.mark.slow

NUM_SEQUENCES = 48
SAMPLING = {"temperature": 1.0, "max_new_tokens": NUM_TOKENS - NUM_PROMPT, "ignore_eos": True}
# The rollout's sampling parameters, and the flags of the trainer.
ROLLOUTS = {"plain": {}, "top-p": {"top_p": 0.7}, "cool": {"temperature": 0.7}}
CASES = {
    "healthy": ("plain", ("--attentions", "math", "--dispatchers", "allgather")),
    "precision": ("plain", ("--dtype", "bfloat16", "--precisions", "float32")),
    "staleness": ("plain", ("AHEAD",)),
    "support": ("top-p", ()),
    "temperature": ("cool", ()),
    "temperature that is known": ("cool", ("--temperature", "0.7")),
}


def sample(server, **sampling):
    """A rollout, with the routes and combine weights that the server used."""
    asked = [
        GenerateRequest(
            input_ids=random_prompt(seed, NUM_PROMPT),
            sampling=SAMPLING | sampling,
            capture="weights",
        )
        for seed in range(NUM_SEQUENCES)
    ]
    completions = server.client.generate(asked)
    tokens = [
        [*one.input_ids, *completion.output_ids]
        for one, completion in zip(asked, completions, strict=True)
    ]
    mu_ST = torch.stack([torch.from_numpy(completion.mu_logprobs) for completion in completions])
    return Rollout(
        tokens_ST=torch.tensor(tokens),
        logp_mu_ST=torch.nn.functional.pad(mu_ST, (NUM_PROMPT - 1, 0)),
        table=RouteTable.from_routes([completion.routes for completion in completions]),
    )


@pytest.fixture(scope="module")
def bisections(sglang_server, tmp_path_factory):
    """What the tool says of each case; and of a batch of a model that nobody named."""
    folder = tmp_path_factory.mktemp("sglang")
    checkpoint = shutil.copytree(sglang_server.checkpoints[0], folder / "checkpoint")
    sharpen(checkpoint)
    sglang_server.client.update_weights(str(checkpoint), 0)
    rollouts = {name: sample(sglang_server, **changed) for name, changed in ROLLOUTS.items()}
    ahead = write_next_step(checkpoint, folder / "ahead", rollouts["plain"].tokens_ST)
    for case, (name, _) in CASES.items():
        rollouts[name].save(folder / case)
    rollouts["plain"].save(folder / "foreign")
    foreign = str(sglang_server.checkpoints[1])
    (refusal,) = run_world(score, 1, str(folder), str(checkpoint), str(ahead), foreign)
    found = {case: bisect(ScoredArms(folder / case), MODEL.layers) for case in CASES}
    return found, refusal


def score(rank, folder, checkpoint, ahead, foreign):
    from recipes.model.parallel import ParallelLayout
    from routing_replay.errors import ConfigError
    from tools import score_arms

    def arms(case, weights, *flags):
        argv = [f"{folder}/{case}", "--checkpoint", weights, *flags, "--microbatch-size", "48"]
        return score_arms.Arms(score_arms.make_parser().parse_args(argv))

    with megatron(ParallelLayout()):
        for case, (_, flags) in CASES.items():
            if "AHEAD" in flags:
                arms(case, ahead, "--rollout-checkpoint", checkpoint).run()
            else:
                arms(case, checkpoint, *flags).run()
        with pytest.raises(ConfigError) as caught:
            arms("foreign", foreign).run()
    return str(caught.value)


def test_two_engines_that_compute_the_same_have_nothing_to_name(bisections):
    healthy = bisections[0]["healthy"]
    assert healthy.named == [], healthy.text()
    assert 0 < healthy.live.value < 1e-5


@pytest.mark.parametrize(
    ("case", "named", "sentence"),
    [
        ("precision", {"precision float32"}, "train in float32"),
        ("staleness", {"staleness"}, "Send the weights before the rollout"),
        ("support", {"support"}, "Sample with top-p 1 and top-k off"),
        ("temperature", {"rest", "support"}, "give the trainer the rollout's temperature"),
        ("temperature that is known", set(), "Nothing stands out"),
    ],
)
def test_what_the_rollout_or_the_trainer_does_otherwise_is_named(bisections, case, named, sentence):
    result = bisections[0][case]
    # In bfloat16 the trainer's routers choose other experts, too.
    assert named <= set(result.named) <= named | ({"routes"} if case == "precision" else set())
    assert sentence in "\n".join(result.sentences())


def test_a_batch_of_a_server_with_other_weights_is_refused(bisections):
    assert "the checkpoint is not one of the model that sampled the batch" in bisections[1]
