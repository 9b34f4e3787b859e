"""tools/attribute_kl.py on real Megatron: every layout attributes the same KL to each layer."""

import dataclasses
from pathlib import Path

import pytest
from megatron_worlds import run_world
from test_recipe_policy import EXPERTS, LAYERS, TOP_K, make_step
from tiny_models import tiny_qwen3_moe

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


@pytest.fixture(scope="module")
def attributions(tmp_path_factory):
    folder = tmp_path_factory.mktemp("attribution")
    batch, table = make_step(4)  # a length that every layout divides
    # The tool refuses batches of a truncated rollout.
    supports = ("support_ids_N", "support_starts_ST", "support_counts_ST")
    batch = dataclasses.replace(batch, **dict.fromkeys(supports))
    batch.save(folder / "batch.safetensors")
    table.save(folder / "routes.safetensors")
    shape = {"layers": LAYERS, "experts": EXPERTS, "top_k": TOP_K}
    checkpoints = [str(tiny_qwen3_moe(**shape, seed=seed)) for seed in (0, 1)]
    (alone,) = run_world(attribute_under, 1, str(folder), *checkpoints, {"single": []})
    ranks = run_world(attribute_under, 2, str(folder), *checkpoints, LAYOUTS)
    return alone["single"], ranks, folder


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_finds_the_same_on_every_rank(attributions, layout):
    alone, ranks, _ = attributions
    for rank in ranks:
        found = rank[layout]
        assert found["kl"].keys() == alone["kl"].keys()
        for name, estimate in alone["kl"].items():
            # Sums of some thousand float32 products in another order.
            assert found["kl"][name]["value"] == pytest.approx(estimate["value"], rel=1e-5), name
        assert [row["layer"] for row in found["layers"]] == list(range(LAYERS))


def test_the_parts_are_the_differences_of_the_passes_and_none_is_zero(attributions):
    alone, _, _ = attributions
    kl = {name: estimate["value"] for name, estimate in alone["kl"].items()}
    parts = {part["name"]: part["kl"] for part in alone["parts"]}
    # The routes are random and the two checkpoints independent: every part is far from zero.
    assert parts["numerics"] == pytest.approx(kl["rollout"])
    assert parts["staleness"] == pytest.approx(kl["all"] - kl["rollout"])
    assert parts["routing"] == pytest.approx(kl["none"] - kl["all"])
    assert min(abs(value) for value in parts.values()) > 1e-4
    # L + 3 passes for the main table, L and L - 1 for the other two families.
    assert len(kl) == 3 + LAYERS + LAYERS + LAYERS - 1


def test_the_progress_lies_beside_the_output(attributions):
    _, _, folder = attributions
    assert Path(folder, "single.progress.json").stat().st_size > 0
