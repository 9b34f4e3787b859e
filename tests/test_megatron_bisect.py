"""Each factor that `routing-replay bisect` knows, planted between real engines, and named.

See planted_gaps.py for the engines and the cases. One world of two ranks scores all of them through
`tools.score_arms`.
"""

import dataclasses

import pytest
import torch
from megatron_worlds import run_world, selected
from planted_gaps import (
    FAULTY_LAYER,
    HEALTHY_SEQUENCES,
    LAYERS,
    NUM_HEALTHY,
    score_cases,
    write_next_step,
    write_sharp_model,
)
from safetensors.torch import save_file

from routing_replay.analysis.arms import KINDS, ScoredArms, Scores
from routing_replay.analysis.bisection import bisect
from routing_replay.cli import main
from routing_replay.routes.batch import BATCH_COLUMNS


@pytest.fixture(scope="module")
def folder(request, tmp_path_factory):
    """A scored batch for each case of the tests that run."""
    folder = tmp_path_factory.mktemp("gaps")
    checkpoint = write_sharp_model(folder / "checkpoint")
    tokens_ST = torch.randint(128, (64, 28), generator=torch.Generator().manual_seed(5))
    ahead = write_next_step(checkpoint, folder / "ahead", tokens_ST)
    cases = selected(request, "case")
    run_world(score_cases, 2, str(folder), str(checkpoint), str(ahead), cases, timeout_s=600)
    return folder


@pytest.fixture
def result(folder, case):
    return bisect(ScoredArms(folder / case), LAYERS)


R3 = "Train with R3"
# In bfloat16 the routers' inputs differ as well: live routing costs about a fifth of the gap, and a
# fifth is where naming begins.
SETTINGS = ("precision", "order", "layout", "kernels")
NAMED = {
    "routes": {"routes": R3},
    "routes of all layers": {"routes": R3, "rest": "precision and kernels of the engines"},
    "weights": {"weights": "Capture weights and replay them"},
    "staleness": {"staleness": "The trained checkpoint is not the one that sampled"},
    "top-p 0.9": {"support": "Sample with top-p 1"},
    "top-p 0.7": {"support": "Sample with top-p 1"},
    "precision": {"precision float32": "train in float32"},
    "order": {"order allgather": "use the dispatcher allgather"},
    "layout": {"layout tp1": "compare the layers' sums under tp1"},
    "kernels": {"kernels math": "The layers' kernels make the gap: use math"},
    "temperature": {
        "rest": "more than numerics give: another temperature",
        "support": "give the trainer the rollout's temperature",
    },
    "temperature that is known": {},
    "experts in another order": {"rest": "experts loaded in another order"},
}


@pytest.mark.parametrize("case", NAMED)
def test_a_planted_factor_is_named_with_what_to_change(result, case):
    print(case, result.text(), sep="\n")  # for whoever reads the failure
    extra = set(result.named) - NAMED[case].keys()
    assert NAMED[case].keys() <= set(result.named)
    assert extra <= ({"routes"} if case in SETTINGS else set())
    text = "\n".join(result.sentences())
    assert all(sentence in text for sentence in NAMED[case].values())


@pytest.mark.parametrize("case", SETTINGS)
def test_the_arm_of_a_planted_setting_explains_the_rest(result, case):
    """The trainer's other arms are there, and none of them explains as much."""
    factors = {f.label: f.k3.value for f in result.factors}
    settings = {label: k3 for label, k3 in factors.items() if label.split()[0] in KINDS}
    assert len(settings) >= 3
    assert max(settings, key=settings.get).startswith(case)
    assert max(settings.values()) > 0.8 * factors["rest"]


@pytest.mark.parametrize(
    ("case", "layers"), [("routes", (FAULTY_LAYER,)), ("routes of all layers", ())]
)
def test_the_halving_finds_the_layer_whose_router_was_broken(result, layers):
    assert result.layers == layers
    sentence = f"Most of what live routing costs comes from layer {FAULTY_LAYER}."
    assert (sentence in result.sentences()) == bool(layers)


@pytest.mark.parametrize("case", ["healthy"])
def test_nothing_is_named_on_twenty_healthy_batches(folder, case, tmp_path):
    whole = ScoredArms(folder / case)
    # The engines do differ: quiet does not mean blind.
    assert {"precision bfloat16", "order allgather", "layout tp2", "kernels math"} < {*whole.names}
    assert 1e-7 < bisect(whole, LAYERS).live.value < 1e-4
    for number in range(NUM_HEALTHY):
        part = slice(number * HEALTHY_SEQUENCES, (number + 1) * HEALTHY_SEQUENCES)
        result = bisect(part_of(whole, part, tmp_path / str(number)), LAYERS)
        assert result.named == [], result.text()
        assert result.layers == (), result.text()


def part_of(arms, part, folder):
    """The arms of some sequences."""
    folder.mkdir()
    where = {"N": arms.batch.positions(part.start, part.stop), "S": part}
    columns = {name: getattr(arms.batch, name)[where[name[-1]]].clone() for name in BATCH_COLUMNS}
    save_file(columns, folder / "batch.safetensors")
    of_part = ScoredArms(folder)
    for name in arms.names:
        scores = dataclasses.replace(arms[name], live_mass_LR=None)
        logp_N, entropy_N = scores.logp_N[where["N"]], scores.entropy_N[where["N"]]
        of_part.add(name, Scores(logp_N=logp_N, entropy_N=entropy_N))
    return of_part


@pytest.mark.parametrize(
    ("case", "status", "certificate"),
    [
        ("staleness", 1, "replay changed something"),
        ("temperature that is known", 0, "replay was a no-op"),
    ],
)
def test_the_command_prints_what_the_call_returns(
    folder, result, case, status, certificate, capsys
):
    assert main(["bisect", str(folder / case)]) == status
    output = capsys.readouterr().out
    assert result.text() in output
    # The live routes were recorded with the arms: the certificate compares them.
    assert f"certificate: {certificate}" in output
