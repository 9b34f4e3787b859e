"""recipes.model.weight_names: latent attention under the names of both specs."""

from types import SimpleNamespace

import pytest

from recipes.model.architectures import SUPPORTED
from recipes.model.weight_names import MODEL_TYPES, ShardPosition, is_whole, pieces

CONFIG = SimpleNamespace(
    architecture="deepseek_v3",
    multi_latent_attention=True,
    hidden_size=64,
    num_attention_heads=4,
    q_lora_rank=48,
    kv_lora_rank=32,
    qk_head_dim=24,
    qk_pos_emb_head_dim=16,
    v_head_dim=20,
    kv_channels=40,
)
SECOND_OF_TWO = ShardPosition(tensor_rank=1, tensor_size=2)


@pytest.mark.parametrize(
    ("name", "expected", "shape", "rows"),
    [
        # 4 heads of 24 + 16 query channels; of 24 key and 20 value channels.
        ("linear_q_up_proj.weight", "q_b_proj", (160, 48), (80, 160)),
        ("linear_kv_up_proj.weight", "kv_b_proj", (176, 32), (88, 176)),
        # Whole on every rank: the latents, and the keys' rotary part that all heads share.
        ("linear_q_down_proj.weight", "q_a_proj", (48, 64), (0, 48)),
        ("linear_kv_down_proj.weight", "kv_a_proj_with_mqa", (48, 64), (0, 48)),
        ("q_layernorm.weight", "q_a_layernorm", (48,), (0, 48)),
        ("kv_layernorm.weight", "kv_a_layernorm", (32,), (0, 32)),
        # Transformer Engine keeps the norms in the projections that follow them.
        ("linear_q_up_proj.layer_norm_weight", "q_a_layernorm", (48,), (0, 48)),
        ("linear_kv_up_proj.layer_norm_weight", "kv_a_layernorm", (32,), (0, 32)),
    ],
)
def test_a_parameter_is_the_shard_of_its_hugging_face_tensor(name, expected, shape, rows):
    name = f"decoder.layers.7.self_attention.{name}"
    (piece,) = pieces(name, CONFIG, SECOND_OF_TWO)
    assert piece.name == f"model.layers.7.self_attn.{expected}.weight"
    assert (piece.shape, piece.axis, (piece.start, piece.stop)) == (shape, 0, rows)
    assert is_whole(name) == (rows == (0, shape[0]))


def test_the_output_projection_has_the_values_channels():
    name = "decoder.layers.0.self_attention.linear_proj.weight"
    (piece,) = pieces(name, CONFIG, SECOND_OF_TWO)
    assert piece.shape == (64, 80)  # 4 heads of 20 value channels
    assert (piece.axis, piece.start, piece.stop) == (1, 40, 80)


def test_the_weight_names_of_every_supported_architecture_are_known():
    assert sorted(SUPPORTED) == list(MODEL_TYPES)
