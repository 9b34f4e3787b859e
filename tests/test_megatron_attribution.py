"""tools/attribute_kl.py and score_arms.py on real Megatron: every layout finds the same."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from megatron_worlds import run_world
from test_recipe_policy import EXPERTS, LAYERS, TOP_K, make_step
from tiny_models import tiny_qwen3_moe

from routing_replay.analysis.arms import LADDER
from routing_replay.analysis.resampling import k3
from routing_replay.routes.batch import RolloutBatch

LAYOUTS = {
    "cp2": ["--context-parallel", "2"],
    "ep2": ["--expert-parallel", "2"],
    "pp2": ["--pipeline-parallel", "2"],
    "tp2": ["--tensor-parallel", "2"],
}


def attribute_under(rank, folder, checkpoint, older, layouts):
    """`as_dict` of the attribution under each layout, and of one that was stopped half-way."""
    from planted_faults import load_tool

    from recipes.model import parallel

    tool, found = load_tool(), {}
    families = ["--families", "without", "only", "first"]
    for name, flags in layouts.items():
        argv = [folder, "--checkpoint", checkpoint, "--rollout-checkpoint", older, *flags]
        argv += [*families, "--microbatch-size", "3", "--output", f"{folder}/{name}.json"]
        found[name] = tool.run(tool.make_parser().parse_args(argv)).as_dict()
        parallel.destroy(keep_world=True)
    return found


def score_arms(rank, folder, checkpoint, older):
    """Scores by arm, and how many of them a later call need not score."""
    from recipes.model import parallel
    from tools import score_arms as tool

    argv = [folder, "--checkpoint", checkpoint, "--rollout-checkpoint", older, "--layers"]
    argv += ["--again", "2", "--precisions", "bfloat16", "--microbatch-size", "3"]
    parsed = tool.make_parser().parse_args(argv)
    parallel.initialize(tool.layout_of(parsed), seed=1)
    first = tool.Arms(parsed)
    first.run()
    kept = tool.Arms(parsed).arms.names
    parallel.destroy(keep_world=True)
    return {name: first.arms[name] for name in first.arms.names}, len(kept)


def with_weights(table):
    """The table with drawn combine weights that add up to one."""
    weights = np.random.default_rng(3).random(table.expert_ids_LTK.shape).astype(np.float32)
    columns = table.columns | {"combine_weights_LTK": weights / weights.sum(-1, keepdims=True)}
    return type(table)(table.shape, columns, table.source)


@pytest.fixture(scope="module")
def attributions(tmp_path_factory):
    folder = tmp_path_factory.mktemp("attribution")
    batch, table = make_step()
    # The tool refuses batches of a truncated rollout.
    supports = ("support_ids_C", "support_offsets_N1")
    # Random weights are less sure than the step's log-probs, and more than 1 nat is another model.
    logp_mu_N = batch.logp_mu_N - 1.5
    batch = dataclasses.replace(batch, logp_mu_N=logp_mu_N, **dict.fromkeys(supports))
    batch.save(folder / "batch.safetensors")
    with_weights(table).save(folder / "routes.safetensors")
    shape = {"layers": LAYERS, "experts": EXPERTS, "top_k": TOP_K}
    checkpoints = [str(tiny_qwen3_moe(**shape, seed=seed)) for seed in (0, 1)]
    (alone,) = run_world(attribute_under, 1, str(folder), *checkpoints, {"single": []})
    (arms,) = run_world(score_arms, 1, str(folder), *checkpoints)
    ranks = run_world(attribute_under, 2, str(folder), *checkpoints, LAYOUTS)
    return alone["single"], ranks, folder, arms


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_finds_the_same_on_every_rank(attributions, layout):
    alone, ranks, *_ = attributions
    for rank in ranks:
        found = rank[layout]
        assert found["kl"].keys() == alone["kl"].keys()
        for name, estimate in alone["kl"].items():
            # Sums of some thousand float32 products in another order.
            assert found["kl"][name]["value"] == pytest.approx(estimate["value"], rel=1e-5), name
        assert [row["layer"] for row in found["layers"]] == list(range(LAYERS))


def test_the_parts_are_the_differences_of_the_passes_and_none_is_zero(attributions):
    alone, *_ = attributions
    kl = {name: estimate["value"] for name, estimate in alone["kl"].items()}
    parts = {part["name"]: part["kl"] for part in alone["parts"]}
    # The routes are random and the two checkpoints independent: every part is far from zero.
    assert parts["numerics"] == pytest.approx(kl["rollout"])
    assert parts["staleness"] == pytest.approx(kl["gates"] - kl["rollout"])
    assert parts["gates"] == pytest.approx(kl["all"] - kl["gates"])
    assert parts["routing"] == pytest.approx(kl["none"] - kl["all"])
    assert min(abs(value) for value in parts.values()) > 1e-4
    # L + 4 passes for the main table, L and L - 1 for the other two families.
    assert len(kl) == 4 + LAYERS + LAYERS + LAYERS - 1


def test_the_progress_lies_beside_the_output(attributions):
    _, _, folder, _ = attributions
    assert Path(folder, "single.progress.json").stat().st_size > 0


def test_arms_are_the_passes_of_the_attribution_and_are_scored_once(attributions):
    alone, _, folder, (arms, num_kept) = attributions
    kl = {name: estimate["value"] for name, estimate in alone["kl"].items()}
    batch = RolloutBatch.open(folder / "batch.safetensors")
    for arm, variant in zip(LADDER, ("none", "all", "gates", "rollout"), strict=True):
        values_N = k3(arms[arm].logp_N, batch.logp_mu_N)
        assert float(values_N[batch.mask_N].mean()) == pytest.approx(kl[variant], rel=1e-5), arm
    assert num_kept == len(arms)
    first = arms["checkpoint"]
    for name in ("again 1", "again 2"):
        # Other microbatches, the same sums in another order.
        np.testing.assert_allclose(arms[name].logp_N, first.logp_N, atol=1e-4)
        np.testing.assert_allclose(arms[name].live_mass_LR, first.live_mass_LR, atol=1e-5)
    assert abs(arms["precision bfloat16"].logp_N - first.logp_N).max() > 1e-3
    assert any(name.startswith("live in 0-") for name in arms)
