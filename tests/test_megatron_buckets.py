"""recipes.model.buckets: how tensors are arranged. What ranks gather: test_megatron_weights.py."""

import torch

from recipes.model.buckets import arranged, flattened
from recipes.model.weight_names import Piece
from recipes.model.weight_plan import Part


def plan_of(names, rows=4):
    """float32 tensors of `rows` x 2; those of layer n are on rank n."""

    def part_of(name):
        piece = Piece(name=name, shape=(rows, 2), axis=0, start=0, stop=rows)
        rank = int(name.split(".")[2])
        dtype = torch.float32
        return Part(rank=rank, parameter=0, index=0, piece=piece, dtype=dtype, copies=(rank,))

    return {name: [part_of(name)] for name in names}


def names_of(layer):
    parts = ["input_layernorm", "mlp.gate", "self_attn.kv_a_proj_with_mqa", "self_attn.q_a_proj"]
    return [f"model.layers.{layer}.{part}.weight" for part in parts]


def test_a_bucket_is_full_and_only_a_layers_attention_exceeds_its_size():
    plan = plan_of(names_of(0))  # 16 bytes each in bfloat16
    for size, expected in ((40, [2, 2]), (16, [1, 1, 2]), (64, [4])):
        buckets = arranged(plan, {0: 0}, size, torch.bfloat16)
        assert [len(bucket.parts) for bucket in buckets] == expected
        assert [bucket.size_bytes for bucket in buckets] == [16 * n for n in expected]


def test_stages_take_turns_and_each_has_its_own_source():
    plan = plan_of([*names_of(0), *names_of(1), *names_of(2)])
    buckets = arranged(plan, {0: 0, 1: 0, 2: 2}, 1, None)
    assert [bucket.source for bucket in buckets] == [0, 2, 0, 2, 0, 2, 0, 0, 0]
    assert [name for bucket in buckets for name in bucket.parts if "layers.2" in name] == names_of(
        2
    )


def test_every_tensor_starts_at_a_multiple_of_its_elements_and_comes_back():
    tensors = [
        ("bytes", torch.arange(3, dtype=torch.uint8)),
        ("half", torch.randn(5).bfloat16()),
        ("bias", torch.randn(2, 3)),
    ]
    ordered, flat = flattened(tensors)
    start = 0
    for name, tensor in ordered:
        stop = start + tensor.nbytes
        values = flat[start:stop].view(tensor.dtype).view(tensor.shape)
        assert torch.equal(values, dict(tensors)[name])
        start = stop
    assert start == len(flat) and [name for name, _ in ordered] == ["bias", "half", "bytes"]
