"""The loss of a step does not depend on how its tokens are split: microbatches, data and context
parallel ranks.
"""

import os
import tempfile

import pytest
import torch
import torch.distributed as dist
from oracles_objectives import case_on_the_grid, gradient_of, inputs_of
from torch_ranks import start_ranks

from routing_replay import objectives
from routing_replay.metrics import typed as metrics
from routing_replay.objectives.aggregation import AGGREGATIONS

# Clip-Cov, KL-Cov and M2PO choose tokens among all of the step: they are given the step's choice.
ALL = objectives.names()


def whole(name, **parameters):
    case = case_on_the_grid()
    inputs = inputs_of(case)
    extra = chosen(name, inputs, parameters)
    return gradient_of(name, inputs_of(case, **extra), **parameters)


def chosen(name, inputs, parameters) -> dict:
    """What a method chooses among all tokens of the step."""
    step = objectives.StepTokens(
        logp_theta_T=inputs.logp_theta_T.detach(),
        logp_old_T=inputs.logp_old_T,
        logp_mu_T=inputs.logp_mu_T,
        advantages_T=inputs.advantages_T,
        mask_T=inputs.mask_T,
        uniform_T=inputs.uniform_T,
    )
    return dict(objectives.get(name, **parameters).parameters.choose(step))


def part(name, parameters, token_T, *, sequences=None, context_group=None):
    """The inputs of some of the tokens, with sequences renumbered from 0 when a list of them is
    given.
    """
    case = case_on_the_grid()
    inputs = inputs_of(case)
    given = {name: value for name, value in vars(inputs).items() if value is not None}
    given |= chosen(name, inputs, parameters)
    for field, value in given.items():
        if field.endswith(("_T", "_TK")):
            given[field] = value.detach()[token_T]
    given["logp_theta_T"].requires_grad_()
    if sequences is not None:
        number = torch.full((case.num_sequences,), -1)
        number[sequences] = torch.arange(len(sequences))
        given["sequence_T"] = number[given["sequence_T"]]
        given["num_sequences"] = len(sequences)
    return objectives.LossInputs(**(given | {"context_group": context_group}))


def tokens_of(sequences):
    sequence_T = torch.tensor(case_on_the_grid().sequence)
    return torch.isin(sequence_T, torch.tensor(sequences)).nonzero().flatten()


# Fractions that choose some tokens of the grid; the published 2e-4 would choose none or one.
SOME = {"clip_cov": {"fraction": 0.2, "cov_low": -1.0}, "kl_cov": {"fraction": 0.2, "beta": 1.0}}
SOME["m2po"] = {"threshold": 0.2}


def splittable(name):
    return SOME.get(name, {})


def test_the_step_chooses_some_tokens_and_not_all():
    for name, parameters in SOME.items():
        inputs = inputs_of(case_on_the_grid())
        (choice_T,) = chosen(name, inputs, parameters).values()
        share = choice_T[inputs.mask_T].double().mean()
        assert 0.1 < share < 0.9, name


@pytest.mark.parametrize("name", ALL)
def test_microbatches_add_up_to_the_step(name):
    expected, outputs = whole(name, **splittable(name))
    assembled, loss = torch.zeros_like(expected), 0.0
    summed = {}
    # Uneven microbatches: one sequence, many, the empty one alone.
    for sequences in ([21], list(range(0, 9)), [22], list(range(9, 21))):
        token_T = tokens_of(sequences)
        inputs = part(name, splittable(name), token_T, sequences=sequences)
        gradient, of_part = gradient_of(name, inputs, **splittable(name))
        assembled[token_T] = gradient
        loss += of_part.loss.item()
        summed = metrics.merge(summed, of_part.metrics)
    torch.testing.assert_close(assembled, expected, rtol=1e-12, atol=1e-15)
    assert loss == pytest.approx(outputs.loss.item(), rel=1e-10)
    for metric, value in metrics.to_floats(outputs.metrics).items():
        assert metrics.to_floats(summed)[metric] == pytest.approx(value, rel=1e-9), metric


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_microbatches_add_up_under_every_aggregation(aggregation):
    expected, _ = whole("minirl", aggregation=aggregation)
    assembled = torch.zeros_like(expected)
    for sequences in ([3, 4, 5], [*range(3), *range(6, 23)]):
        token_T = tokens_of(sequences)
        inputs = part("minirl", {}, token_T, sequences=sequences)
        assembled[token_T], _ = gradient_of("minirl", inputs, aggregation=aggregation)
    torch.testing.assert_close(assembled, expected, rtol=1e-12, atol=1e-15)


def test_dropping_tokens_does_not_enlarge_the_others():
    # IcePop drops tokens by m; with everything else equal the kept ones keep their weight.
    expected, _ = whole("icepop", m_low=1e-6, m_high=1e6)
    assembled, outputs = whole("icepop")
    kept = outputs.kept_T & (expected != 0)
    assert 0 < kept.sum() < (expected != 0).sum()
    torch.testing.assert_close(assembled[kept], expected[kept])


# --- two ranks ----------------------------------------------------------------------------------

SEQUENCE_CORRECTIONS = [
    ("grpo", {"correction": "tis-sequence"}),
    ("grpo", {"correction": "mis-sequence"}),
    ("grpo", {"correction": "tis-geometric"}),
    ("grpo", {"geometric_low": 0.9, "geometric_high": 1.05}),
    ("grpo", {"veto_below": 0.11}),
    ("grpo", {"off_policy_delta": 0.05}),
    ("grpo", {"sequence_k3_max": 0.02}),
]
SPLIT = [(name, splittable(name)) for name in ALL] + SEQUENCE_CORRECTIONS
SPLIT += [("gspo", {"eps_low": 0.3, "eps_high": 0.5, "aggregation": how}) for how in AGGREGATIONS]


def _rank(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    num_tokens = len(case_on_the_grid().theta)
    # Context parallelism: sequences cut in alternating pairs of tokens, so that no rank has a whole
    # one.
    token_T = (torch.arange(num_tokens) // 2 % 2 == rank).nonzero().flatten()
    results = {}
    for number, (name, parameters) in enumerate(SPLIT):
        inputs = part(name, parameters, token_T, context_group=dist.group.WORLD)
        gradient, outputs = gradient_of(name, inputs, **parameters)
        loss = outputs.loss.detach().clone()
        dist.all_reduce(loss)
        reduced = metrics.to_floats(metrics.all_reduce(outputs.metrics))
        results[number] = (token_T, gradient, loss.item(), reduced)
    torch.save(results, os.path.join(folder, f"rank{rank}.pt"))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def of_two_ranks():
    with tempfile.TemporaryDirectory() as folder:
        start_ranks(_rank, (folder,), 2)
        return [torch.load(os.path.join(folder, f"rank{rank}.pt")) for rank in range(2)]


@pytest.mark.parametrize(
    "number", range(len(SPLIT)), ids=lambda n: f"{SPLIT[n][0]}-{'-'.join(map(str, SPLIT[n][1]))}"
)
def test_context_parallel_ranks_add_up_to_the_step(of_two_ranks, number):
    name, parameters = SPLIT[number]
    expected, outputs = whole(name, **parameters)
    assembled = torch.zeros_like(expected)
    for results in of_two_ranks:
        token_T, gradient, loss, reduced = results[number]
        assembled[token_T] = gradient
        assert loss == pytest.approx(outputs.loss.item(), rel=1e-10)
        for metric, value in metrics.to_floats(outputs.metrics).items():
            assert reduced[metric] == pytest.approx(value, rel=1e-9), metric
    torch.testing.assert_close(assembled, expected, rtol=1e-12, atol=1e-15)
