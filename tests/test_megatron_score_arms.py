"""`tools.score_arms` when it is killed, resumed, misused, or run on kernels that do not repeat."""

import pytest
from megatron_worlds import RankError, run_world
from planted_gaps import LAYERS, write_sharp_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from scored_again import (
    NOISY_LAYER,
    NUM_KEPT,
    NUM_PASSES,
    resume_and_refuse,
    score_until_killed,
)

from routing_replay.analysis.arms import LADDER, ScoredArms
from routing_replay.analysis.bisection import bisect
from routing_replay.analysis.noise import noise_floor
from routing_replay.analysis.resampling import k3
from routing_replay.cli import main

SCORED = {"live", "routes", "weights", "again 1", "precision bfloat16", "kernels math"}


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scored")
    checkpoint = write_sharp_model(folder / "checkpoint", top_k=2)
    others = {
        "another-model": {"seed": 2},
        "fewer-tokens": {"vocab": 64},
        "fewer-experts": {"experts": 6},
    }
    paths = {
        name: str(write_sharp_model(folder / name, **({"top_k": 2} | s)))
        for name, s in others.items()
    }
    batch = str(folder / "batch")
    with pytest.raises(RankError, match="ended without a result"):
        run_world(score_until_killed, 1, batch, str(checkpoint))
    (results,) = run_world(resume_and_refuse, 1, batch, str(checkpoint), paths)
    return folder, *results


def test_a_killed_run_resumes_and_scores_nothing_twice(outcome):
    folder, kept, after, *_ = outcome
    assert NUM_KEPT <= len(kept) < len(SCORED)
    assert after.keys() == SCORED
    assert {name: after[name] for name in kept} == kept
    result = bisect(ScoredArms(folder / "batch"), LAYERS)
    assert result.named == [] and result.live.value < 1e-10


@pytest.mark.parametrize(
    ("checkpoint", "message", "num_scored"),
    [
        # The ladder is scored before anyone can know, and no setting after it.
        ("another-model", "the checkpoint is not one of the model that sampled the batch", 3),
        ("fewer-tokens", "the batch holds tokens that the checkpoint does not know", 0),
        ("fewer-experts", "num_experts", 0),
        ("overwritten", "an arm was scored with another checkpoint", len(SCORED)),
    ],
)
def test_a_checkpoint_that_is_not_the_rollouts_is_refused(outcome, checkpoint, message, num_scored):
    *_, refusals, _ = outcome
    said, scored = refusals[checkpoint]
    assert message in said
    assert len(scored) == num_scored
    assert num_scored != 3 or set(scored) == {*LADDER[:3]}


def test_arms_of_another_version_of_the_code_are_not_mixed_in(outcome, capsys):
    folder = outcome[0]
    path = folder / "batch" / "arms" / "routes.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert "torch" in metadata["fingerprint"] and "Megatron" in metadata["fingerprint"]
    changed = metadata | {
        "fingerprint": metadata["fingerprint"].replace("Megatron 0", "Megatron 9")
    }
    save_file(load_file(path), path, changed)
    try:
        assert main(["bisect", str(folder / "batch")]) == 1
        assert "scored with another version of the code" in capsys.readouterr().err
    finally:
        save_file(load_file(path), path, metadata)


def test_the_noise_of_kernels_is_measured_and_placed_behind_its_layer(outcome):
    floor = noise_floor(ScoredArms(outcome[0] / "batch-noisy"), LAYERS)
    quiet = noise_floor(ScoredArms(outcome[0] / "batch"), LAYERS)
    assert (floor.num_passes, quiet.num_passes) == (NUM_PASSES, 2)
    # Another order of the sequences alone changes the last bits.
    assert quiet.k3.high < 1e-10 and floor.k3.low > 1e-6
    assert floor.equal_share == 0
    behind = [layer for layer in LAYERS if layer > NOISY_LAYER]
    before = max(floor.layers[layer] for layer in LAYERS if layer <= NOISY_LAYER)
    assert min(floor.layers[layer] for layer in behind) > 100 * before


def test_the_gap_of_a_pass_is_half_the_floor_and_of_the_mean_an_eighth_of_it(outcome):
    """The rollout has no noise here: one pass has its variance once, a pair of passes twice."""
    arms = ScoredArms(outcome[0] / "batch-noisy")
    floor, names = noise_floor(arms, LAYERS), ["weights", *arms.of_kind("again")]
    mask_N, mu_N = arms.batch.mask_N, arms.batch.logp_mu_N
    passes = [arms[name].logp_N.double() for name in names]
    single = sum(float(k3(logp_N, mu_N)[mask_N].mean()) for logp_N in passes) / len(passes)
    mean = float(k3(sum(passes) / len(passes), mu_N)[mask_N].mean())
    assert single == pytest.approx(floor.k3.value / 2, rel=0.2)
    assert mean == pytest.approx(single / NUM_PASSES, rel=0.3)


def test_the_recipes_mean_of_passes_has_an_eighth_of_their_error(outcome):
    single, mean = outcome[-1]
    assert single > 1e-8
    # 8 trials of some 25 tokens.
    assert mean == pytest.approx(single / NUM_PASSES, rel=0.4)
