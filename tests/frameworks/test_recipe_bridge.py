"""recipes.model.bridge: Megatron-Bridge's converter and ours move the same weights."""

import pytest
import torch
from megatron_worlds import megatron, run_world
from tiny_models import tiny_deepseek_v3, tiny_glm4_moe, tiny_qwen3_moe

from recipes.model.parallel import ParallelLayout
from routing_replay.errors import RoutingReplayError

LAYOUTS = {"ep2": ParallelLayout(expert=2), "pp2": ParallelLayout(pipeline=2)}


def compare(rank, folders):
    """By family and layout: parameters that differ, and exported tensors that differ."""
    import stand_ins

    stand_ins.prepare("modelopt", "nvidia_resiliency_ext")
    return {
        (family, name): failure_or(_compare, folder, layout)
        for family, folder in folders.items()
        for name, layout in LAYOUTS.items()
    }


def failure_or(function, *arguments):
    """What a configuration gives, or the refusal of all its ranks."""
    try:
        return function(*arguments)
    except RoutingReplayError as error:
        return str(error)


def _compare(folder, layout):
    from recipes.model import bridge, weights
    from recipes.model.model import build_model, transformer_config

    with megatron(layout):
        config = transformer_config(folder, layout)
        ours, theirs = build_model(config, layout), build_model(config, layout)
        weights.load_hf(ours, folder)
        bridge.load_hf(theirs, folder)
        states = [chunks[0].state_dict() for chunks in (ours, theirs)]
        loaded = [name for name in states[0] if not _equal(states[0][name], states[1][name])]
        exported = [
            dict(of_converter)
            for of_converter in (
                weights.named_hf_tensors(ours),
                bridge.named_hf_tensors(ours, folder),
            )
        ]
        names = sorted(exported[0].keys() ^ exported[1].keys())
        saved = [n for n in exported[0] if n not in names and not _equal(*(e[n] for e in exported))]
        return {"loaded": loaded, "names": names, "saved": saved, "count": len(exported[0])}


def _equal(a, b):
    return a is b or (torch.is_tensor(a) and torch.is_tensor(b) and torch.equal(a, b))


@pytest.fixture(scope="module")
def compared():
    folders = {
        "qwen3_moe": tiny_qwen3_moe(layers=2),
        "qwen3_moe tied": tiny_qwen3_moe(layers=2, tie_embeddings=True),
        "glm4_moe": tiny_glm4_moe(layers=2),
        "deepseek_v3": tiny_deepseek_v3(layers=2),
    }
    return run_world(compare, 2, folders, timeout_s=500)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("family", ["qwen3_moe", "qwen3_moe tied", "deepseek_v3"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_both_converters_load_and_save_the_same_tensors_bitwise(compared, family, layout):
    for rank in compared:
        of_rank = rank[family, layout]
        assert isinstance(of_rank, dict), of_rank
        assert of_rank["loaded"] == [] and of_rank["names"] == [] and of_rank["saved"] == []
        assert of_rank["count"] > 30


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_parameter_that_bridge_does_not_know_is_refused_on_every_rank(compared, layout):
    # Its GLM-4-MoE knows grouped experts only, those of Transformer Engine's layers.
    for rank in compared:
        assert "does not fill a parameter of the model" in rank["glm4_moe", layout]
