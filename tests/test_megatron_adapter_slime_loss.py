"""Our objectives through the loss hook of slime and miles: their division makes them exact."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from recipes.model import cpu  # noqa: F401  (makes Megatron importable)
from routing_replay import objectives
from routing_replay.adapters import slime_loss
from routing_replay.errors import ConfigError
from routing_replay.objectives import Denominators, LossInputs

LENGTHS = (3, 5, 2, 4)  # tokens of the responses


@pytest.fixture(autouse=True)
def package(monkeypatch):
    """slime's two functions: log-probs of a microbatch come from its logits, one for each token."""

    def get_log_probs_and_entropy(logits, *, response_lengths, with_entropy, **unused):
        return None, {"log_probs": list(logits.flatten().split(response_lengths))}

    processors, slices = (ModuleType(name) for name in slime_loss.MODULES["slime"])
    processors.get_log_probs_and_entropy = get_log_probs_and_entropy
    slices.slice_log_prob_with_cp = lambda values, total, response: values
    for module in (processors, slices, ModuleType("slime.backends.megatron_utils.model")):
        monkeypatch.setitem(sys.modules, module.__name__, module)


def responses():
    g = torch.Generator().manual_seed(0)

    def column(scale):
        return [scale * torch.randn(n, generator=g) for n in LENGTHS]

    masks = [torch.ones(n, dtype=torch.int) for n in LENGTHS]
    masks[1][2] = 0
    return {
        "theta": column(0.3),
        "log_probs": column(0.3),
        "rollout_log_probs": column(0.3),
        "advantages": column(1.0),
        "loss_masks": masks,
    }


def arguments(**changes):
    values = {"calculate_per_token_loss": False, "rollout_max_response_len": 8}
    return SimpleNamespace(**values | changes)


def through_the_hook(args, data, microbatches):
    """The step's loss as slime adds it up: over microbatches, then over sequences or tokens."""
    total = torch.zeros(())
    for indices in microbatches:
        part = {name: [column[i] for i in indices] for name, column in data.items()}
        batch = part | {
            "unconcat_tokens": None,
            "total_lengths": [LENGTHS[i] + 4 for i in indices],
            "response_lengths": [LENGTHS[i] for i in indices],
        }
        logits = torch.cat(part["theta"])[None, :, None]
        loss, metrics = slime_loss.loss(args, batch, logits, lambda values: values.sum())
        assert set(metrics) == {"loss", "kept_fraction"}
        total = total + loss
    tokens = sum(int(mask.sum()) for mask in data["loss_masks"])
    return total / (tokens if args.calculate_per_token_loss else len(LENGTHS))


def by_ourselves(objective, data):
    sizes = torch.tensor(LENGTHS)
    joined = {name: torch.cat(column) for name, column in data.items()}
    mask_T = joined["loss_masks"].bool()
    return objective(
        LossInputs(
            logp_theta_T=joined["theta"],
            logp_old_T=joined["log_probs"],
            logp_mu_T=joined["rollout_log_probs"],
            advantages_T=joined["advantages"],
            mask_T=mask_T,
            sequence_T=torch.arange(len(LENGTHS)).repeat_interleave(sizes),
            num_sequences=len(LENGTHS),
            denominators=Denominators(
                num_sequences=len(LENGTHS), num_tokens=int(mask_T.sum()), max_length=8
            ),
        )
    ).loss


@pytest.mark.parametrize("microbatches", [[[0, 1, 2, 3]], [[3, 0], [1, 2]]])
@pytest.mark.parametrize(
    ("name", "parameters", "per_token"),
    [
        ("minirl", {}, False),
        ("grpo", {}, False),
        ("dr_grpo", {}, False),
        ("minirl", {"aggregation": "token-mean", "cap": 2.0}, True),
    ],
)
def test_the_steps_loss_is_the_objectives(microbatches, name, parameters, per_token):
    data = responses()
    args = arguments(
        calculate_per_token_loss=per_token,
        replay_objective=name,
        replay_objective_parameters=parameters,
    )
    expected = by_ourselves(objectives.get(name, **parameters), data)
    assert torch.allclose(through_the_hook(args, data, microbatches), expected, atol=1e-6)


def test_minirl_is_the_default():
    data = responses()
    expected = by_ourselves(objectives.get("minirl"), data)
    assert torch.allclose(through_the_hook(arguments(), data, [[0, 1, 2, 3]]), expected, atol=1e-6)


def test_an_aggregation_that_is_not_theirs_is_refused():
    args = arguments(calculate_per_token_loss=True)
    with pytest.raises(ConfigError, match="the aggregation of objective 'minirl' is not the job's"):
        through_the_hook(args, responses(), [[0]])
