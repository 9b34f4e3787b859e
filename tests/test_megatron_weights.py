"""Weights on real Megatron: logits and gradients are transformers' own, under every layout.

One world of four ranks computes everything (`weight_checks.run`); the tests read its results. A
layout of fewer ranks is data parallel beside itself.
"""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from megatron_batches import hf_loss
from megatron_worlds import RankError, run_world
from safetensors.torch import load_file, save_file
from tiny_models import (
    hf_logits,
    tiny_deepseek_v3,
    tiny_glm4_moe,
    tiny_qwen3_moe,
)

from recipes.model import fp8
from recipes.model.checkpoint_files import CheckpointReader
from routing_replay.errors import CheckpointError

# Two float32 forwards that sum in different orders: the largest error over all layouts was 2.5e-6
# at logits up to 3.7. A wrong layer, shard or order of heads is off by the size of a logit.
LOGIT_TOLERANCE = 2e-5
# Relative to each tensor's largest gradient: float32 forward and backward of four layers.
GRADIENT_TOLERANCE = 2e-4
VOCAB = 131  # odd, so that tensor parallelism has to pad it

QWEN_LAYOUTS = [
    "one",
    "tp2",
    "tp2-etp1",
    "pp2-first1",
    "pp2-vpp2",
    "ep2-alltoall",
    "ep2-allgather",
    "cp2",
    "tp2-ep2-etp2",
    "tp2-cp2",
    "cp2-ep4",
    "tp2-pp2-ep2",
    "full-recompute",
    "moe-recompute",
]
LATENT = [("deepseek", name) for name in ("one", "tp2-ep2", "tp2-cp2")]
ALL = [("qwen", name) for name in QWEN_LAYOUTS] + [("glm", "one"), ("glm", "tp2-ep2")] + LATENT


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    out = tmp_path_factory.mktemp("saved")
    folders = {
        "qwen": tiny_qwen3_moe(dense_layers=(1,), vocab=VOCAB),
        "glm": tiny_glm4_moe(),
        "deepseek": tiny_deepseek_v3(),
        "tied": tiny_qwen3_moe(layers=2, tie_embeddings=True, vocab=VOCAB, norm_topk=False),
    }
    reference = {family: _reference(folder) for family, folder in folders.items()}
    torch.save(reference, out / "reference.pt")
    folders["broken"] = _broken_checkpoints(folders["qwen"], out)
    arguments = folders, str(out / "reference.pt"), str(out)
    results = run_world("weight_checks:run", 4, *arguments, timeout_s=500)
    return results, reference, folders, out


@pytest.mark.parametrize("case", ALL, ids="-".join)
def test_megatron_logits_are_those_of_transformers(world, case):
    for kind in ("stacked", "packed"):
        errors = [r[case][kind] for r in world[0] if r[case][kind] is not None]
        assert errors, "no rank had the last stage"
        assert max(errors) < LOGIT_TOLERANCE


@pytest.mark.parametrize("case", ALL, ids="-".join)
def test_megatron_gradients_are_those_of_transformers(world, case):
    assert world[0][0][case]["gradient"] < GRADIENT_TOLERANCE


@pytest.mark.parametrize("case", ALL, ids="-".join)
def test_export_gives_back_every_tensor_of_the_file_once_and_bit_for_bit(world, case):
    assert all(result[case]["exact"] for result in world[0])


@pytest.mark.parametrize("case", ALL, ids="-".join)
def test_buckets_give_every_tensor_once_to_the_first_rank_of_its_stage(world, case):
    assert all(result[case]["buckets"] for result in world[0])


@pytest.mark.parametrize("case", ALL, ids="-".join)
def test_the_ranks_of_a_stage_write_equal_shares_of_its_tensors(world, case):
    assert all(result[case]["shares"] for result in world[0])


@pytest.mark.parametrize("form", ["checkpoint", "fp8", "fp8-grid"])
def test_files_of_all_ranks_are_bitwise_those_of_rank_0_alone(world, form):
    shares, first = (load_folder(world[3] / f"{way}-{form}") for way in ("shares", "first"))
    assert shares.keys() == first.keys()
    assert all(_bits(shares[name]) == _bits(first[name]) for name in first)
    assert "lm_head.weight" not in shares  # the embeddings are tied
    configs = [
        (world[3] / f"{way}-{form}" / "config.json").read_text() for way in ("shares", "first")
    ]
    assert configs[0] == configs[1]
    # Two stages of two owners of experts each.
    assert len(list((world[3] / f"shares-{form}").glob("*.safetensors"))) == 4
    assert len(list((world[3] / f"first-{form}").glob("*.safetensors"))) == 1


def test_rank_0_writes_everything_where_a_rank_sees_another_folder(world):
    out = world[3]
    written, expected = (
        load_folder(out / "disk-0" / "unshared"),
        load_folder(out / "first-checkpoint"),
    )
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], expected[name]) for name in expected)
    assert not (out / "disk-1").exists()


def test_transformers_reads_the_files_of_all_ranks_without_a_missing_or_further_tensor(world):
    from transformers import AutoModelForCausalLM

    folder = world[3] / "shares-checkpoint"
    _, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info


def test_a_rank_that_dies_in_a_save_leaves_the_earlier_checkpoint_and_no_complete_one(tmp_path):
    folder = tiny_qwen3_moe()
    with pytest.raises(RankError, match="ended without a result"):
        run_world("weight_checks:die_in_save", 2, folder, str(tmp_path))
    kept, original = (load_folder(path) for path in (tmp_path / "kept", folder))
    assert kept.keys() == original.keys()
    assert all(torch.equal(kept[name], original[name]) for name in kept)
    with pytest.raises(CheckpointError, match="has no weights"):
        CheckpointReader(tmp_path / ".kept.partial")
    assert any((tmp_path / ".kept.partial").iterdir())


@pytest.mark.parametrize("case", ALL, ids="-".join)
def test_transformers_computes_megatrons_logits_from_a_saved_checkpoint(world, case):
    results, reference, _, out = world
    ours = next(r[case]["after step"] for r in results if r[case]["after step"] is not None)
    batch = reference[case[0]]["batches"]["packed"]
    theirs = _sequence_logits(out / "-".join(case), batch)
    before = reference[case[0]]["logits"]["packed"]
    for a, b, earlier in zip(ours, theirs, before, strict=True):
        assert (a - b).abs().max() < LOGIT_TOLERANCE
        assert (a - earlier).abs().max() > 100 * LOGIT_TOLERANCE  # the weights did move


@pytest.mark.parametrize("grouped", [True, False], ids=["grouped", "sequential"])
def test_names_of_transformer_engine_modules_mean_the_same_weights(world, grouped):
    results = [result["te", grouped] for result in world[0]]
    assert all(result["exact"] for result in results)
    assert results[0]["stacked"] < LOGIT_TOLERANCE
    assert results[0]["gradient"] < GRADIENT_TOLERANCE
    names = set(results[0]["names"])
    # Names that Megatron 0.19's Transformer Engine spec gives a hybrid MoE model; layer 1 is dense.
    assert "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight" in names
    assert "decoder.layers.1.mlp.linear_fc1.layer_norm_weight" in names
    assert "decoder.layers.0.pre_mlp_layernorm.weight" in names
    expert = "linear_fc1.weight3" if grouped else "local_experts.3.linear_fc1.weight"
    assert f"decoder.layers.0.mlp.experts.{expert}" in names


def test_tied_embeddings_are_filled_on_both_ends_and_saved_once(world):
    results = [result["tied"] for result in world[0]]
    assert all(result["exact"] and result["buckets"] for result in results)
    assert max(r["stacked"] for r in results if r["stacked"] is not None) < LOGIT_TOLERANCE


def test_bfloat16_parameters_are_saved_in_the_dtype_asked_for(world):
    results, _, folders, out = world
    assert results[0]["bf16"] == {torch.bfloat16}
    original = load_file(folders["qwen"] / "model.safetensors")
    for name, dtype, said in (
        ("bf16", torch.bfloat16, "bfloat16"),
        ("bf16-as-fp32", torch.float32, "float32"),
    ):
        saved = load_folder(out / name)
        rounded = {key: value.to(torch.bfloat16).to(dtype) for key, value in original.items()}
        assert saved.keys() == rounded.keys()
        assert all(torch.equal(saved[key], rounded[key]) for key in saved)
        assert json.loads((out / name / "config.json").read_text())["dtype"] == said


def test_weights_go_out_in_block_fp8_and_come_back_rounded(world):
    out = world[3]
    source, quantized = (load_folder(out / name) for name in ("bf16", "fp8"))
    projections = {name for name in source if name.endswith("_proj.weight")}
    assert quantized.keys() == source.keys() | {name + "_scale_inv" for name in projections}
    back = load_folder(out / "bf16-of-fp8")
    for name, weight in source.items():
        expected = weight
        if name in projections:
            expected = fp8.dequantize(*fp8.quantize(weight)).bfloat16()
        assert torch.equal(back[name], expected), name
    configs = [json.loads((out / n / "config.json").read_text()) for n in ("fp8", "bf16-of-fp8")]
    assert ["quantization_config" in config for config in configs] == [True, False]


def test_a_saved_checkpoint_has_shards_index_config_and_tokenizer(world):
    folder = world[3] / "qwen-tp2"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = {path.name for path in folder.iterdir()}
    # 200,000 bytes per file (`weight_checks`); three MoE layers of 8 * 3 * 8 KiB alone are 590 KB.
    assert len(set(index["weight_map"].values())) > 2
    assert set(index["weight_map"].values()) == {f for f in files if f.endswith(".safetensors")}
    assert {"config.json", "tokenizer_config.json", "generation_config.json"} <= files
    assert not [path for path in world[3].iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (
            "architecture",
            r"architecture is not supported; expected deepseek_v3 or glm4_moe or qwen3_moe",
        ),
        ("missing", r"lacks tensors of the model.*model\.layers\.2\.mlp\.experts\.5\.up_proj"),
        (
            "extra",
            r"has tensors that the model does not.*model\.layers\.0\.self_attn\.q_proj\.bias",
        ),
        ("shape", r"wrong shape: model\.layers\.3\.mlp\.gate\.weight; expected \(8, 64\); got"),
        ("truncated", r"cannot be read"),
        ("shard", r"cannot be read.*model-00002-of-00002\.safetensors"),
        ("no weights", r"has no weights; expected model\.safetensors or"),
    ],
)
def test_a_wrong_checkpoint_is_one_clear_error_on_every_rank(world, kind, message):
    errors = [result["errors"][kind] for result in world[0]]
    assert all(error is not None and re.search(message, error) for error in errors), errors


def test_a_full_disk_is_an_error_and_the_earlier_checkpoint_stays_whole(world):
    results, _, folders, out = world
    for result in results:
        assert re.search(
            r"could not be written.*what was there before is untouched", result["full disk"]
        )
    kept, original = (load_folder(folder) for folder in (out / "kept", folders["qwen"]))
    assert kept.keys() == original.keys()
    assert all(torch.equal(kept[name], original[name]) for name in kept)
    assert not (out / ".kept.partial").exists()


def load_folder(folder):
    """All tensors of a checkpoint, each from the file that the index names."""
    with CheckpointReader(folder) as reader:
        return {name: reader.read_whole(name) for name in reader._file_of}


def _bits(tensor):
    return (
        tensor.dtype,
        tuple(tensor.shape),
        tensor.contiguous().view(torch.uint8).numpy().tobytes(),
    )


def _reference(folder):
    """Batches, and what transformers computes from them."""
    from transformers import AutoModelForCausalLM

    generator = torch.Generator().manual_seed(0)
    # Packed lengths are multiples of 4: two chunks for each of two context-parallel ranks.
    lengths = {"stacked": [[16, 16], [16, 16]], "packed": [[8, 24], [20, 12]]}
    batches = {
        kind: [
            [torch.randint(0, 128, (n,), generator=generator) for n in ns] for ns in microbatches
        ]
        for kind, microbatches in lengths.items()
    }
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    hf_loss(model, batches["packed"]).backward()
    return {
        "batches": batches,
        "logits": {kind: _sequence_logits(folder, batch) for kind, batch in batches.items()},
        "gradients": dict(_per_expert_gradients(model)),
    }


def _sequence_logits(folder, batch):
    return hf_logits(folder, [ids for sequences in batch for ids in sequences])


def _per_expert_gradients(model):
    """Gradients under the names of the files: in memory transformers 5 fuses the experts."""
    for name, parameter in model.named_parameters():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            yield name, parameter.grad
            continue
        prefix, _, kind = name.rpartition(".")
        for expert, gradient in enumerate(parameter.grad):
            if kind == "down_proj":
                yield f"{prefix}.{expert}.down_proj.weight", gradient
            else:
                gate, up = gradient.chunk(2)
                yield f"{prefix}.{expert}.gate_proj.weight", gate
                yield f"{prefix}.{expert}.up_proj.weight", up


def _broken_checkpoints(source, out):
    """One folder for each way in which a checkpoint can be wrong."""
    folders = {}
    for kind in ("architecture", "missing", "extra", "shape", "truncated", "shard", "no weights"):
        folders[kind] = Path(shutil.copytree(source, out / f"broken-{kind}"))
    config = json.loads((folders["architecture"] / "config.json").read_text())
    changed = config | {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    (folders["architecture"] / "config.json").write_text(json.dumps(changed))
    tensors = load_file(source / "model.safetensors")
    gate = "model.layers.3.mlp.gate.weight"
    contents = {
        "missing": {k: v for k, v in tensors.items() if "layers.2.mlp.experts.5.up_proj" not in k},
        "extra": tensors | {"model.layers.0.self_attn.q_proj.bias": torch.zeros(256)},
        "shape": tensors | {gate: tensors[gate][:4].clone()},
    }
    for kind, content in contents.items():
        save_file(content, folders[kind] / "model.safetensors", metadata={"format": "pt"})
    weights = folders["truncated"] / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    (folders["no weights"] / "model.safetensors").unlink()
    files = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    (folders["shard"] / "model.safetensors").rename(folders["shard"] / files[0])
    index = {"weight_map": {name: files[name > "model.layers.2"] for name in tensors}}
    (folders["shard"] / "model.safetensors.index.json").write_text(json.dumps(index))
    return folders
