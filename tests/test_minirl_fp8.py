"""recipes.model.fp8: checkpoints in block FP8, to a server and back into a trainer."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from recipes.model import fp8
from recipes.model.checkpoint_files import CheckpointReader
from routing_replay.errors import CheckpointError

# e4m3 has 3 bits after the leading one: rounding is off by at most 1/16 of a normal number. Below
# 2^-6 numbers are 2^-9 apart; a block's scale is its largest magnitude / 448.
RELATIVE_ERROR, SMALLEST_STEP = 1 / 16, 2.0**-9


def matrix(rows, columns, seed=0):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    weight[:1] *= 100  # other blocks must not see it
    return weight


@pytest.mark.parametrize("shape", [(128, 128), (256, 384), (200, 130), (3, 5)])
def test_a_weight_comes_back_within_the_rounding_of_its_own_block(shape):
    weight = matrix(*shape)
    values, scales = fp8.quantize(weight)
    assert values.dtype == torch.float8_e4m3fn and values.shape == shape
    assert scales.shape == (-(-shape[0] // 128), -(-shape[1] // 128))
    error = (fp8.dequantize(values, scales) - weight).abs()
    scale = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)[: shape[0], : shape[1]]
    assert (error <= weight.abs() * RELATIVE_ERROR + scale * SMALLEST_STEP).all()
    assert error.max() > 0


def test_the_largest_of_a_block_is_exact_and_a_block_of_zeros_stays_zero():
    weight = torch.zeros(256, 128)
    weight[5, 7] = -3.25
    back = fp8.dequantize(*fp8.quantize(weight))
    assert torch.equal(back, weight)


@pytest.mark.parametrize(("rows", "columns"), [((130, 250), (0, 384)), ((0, 256), (100, 300))])
def test_a_part_has_the_scales_of_its_place(rows, columns):
    values, scales = fp8.quantize(matrix(256, 384))
    whole = fp8.dequantize(values, scales)
    part = slice(*rows), slice(*columns)
    got = fp8.dequantize(values[part], scales, rows[0], columns[0])
    assert torch.equal(got, whole[part])


@pytest.fixture
def converted(tmp_path):
    tensors = {
        "model.embed_tokens.weight": matrix(8, 128),
        "model.layers.0.self_attn.kv_a_proj_with_mqa.weight": matrix(72, 128, 1),
        "model.layers.0.mlp.experts.3.down_proj.weight": matrix(128, 256, 2).bfloat16(),
        "model.layers.0.mlp.gate.weight": matrix(4, 128, 3),
        "model.layers.0.mlp.gate.e_score_correction_bias": torch.randn(4),
    }
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    save_file(tensors, source / "model.safetensors")
    (source / "config.json").write_text('{"model_type": "deepseek_v3", "eos_token_id": null}')
    assert fp8.main([str(source), str(target)]) == 0
    return tensors, source, target


def test_a_converted_checkpoint_has_quantized_projections_and_nothing_else_changed(converted):
    tensors, _, target = converted
    saved = load_file(target / "model.safetensors")
    projections = [name for name in tensors if "_proj" in name]
    assert saved.keys() == tensors.keys() | {name + "_scale_inv" for name in projections}
    for name, tensor in tensors.items():
        is_projection = name in projections
        assert saved[name].dtype == (torch.float8_e4m3fn if is_projection else tensor.dtype)
        assert is_projection or torch.equal(saved[name], tensor)
    config = json.loads((target / "config.json").read_text())
    fp8.require_quantized(config, target)
    assert config["eos_token_id"] is None


def test_a_trainer_reads_slices_of_a_quantized_checkpoint_as_weights(converted):
    tensors, _, target = converted
    name = "model.layers.0.mlp.experts.3.down_proj.weight"
    with CheckpointReader(target) as reader:
        assert reader.names == tensors.keys()
        part = reader.read(name, (128, 256), 1, 64, 192)
    expected = fp8.dequantize(*fp8.quantize(tensors[name]))[:, 64:192]
    assert torch.equal(part, expected)


def test_a_checkpoint_that_lacks_a_scale_names_it(converted):
    target = converted[2]
    saved = load_file(target / "model.safetensors")
    name = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"
    del saved[name + "_scale_inv"]
    save_file(saved, target / "model.safetensors")
    with CheckpointReader(target) as reader, pytest.raises(CheckpointError, match="_scale_inv"):
        reader.read(name, (72, 128), 0, 0, 8)


def test_a_quantized_checkpoint_is_not_quantized_again(converted, tmp_path, capsys):
    assert fp8.main([str(converted[2]), str(tmp_path / "again")]) == 1
    assert "quantized already" in capsys.readouterr().err


@pytest.mark.parametrize("config", [{}, {"quantization_config": {"quant_method": "awq"}}])
def test_another_format_is_refused_with_the_command_that_converts(config):
    with pytest.raises(CheckpointError, match="not in block FP8.*recipes.model.fp8 SOURCE TARGET"):
        fp8.require_quantized(config, "folder")


def e4m3_numbers():
    """All finite numbers of float8 e4m3fn, from its definition: 4 exponent, 3 mantissa bits."""
    positive = [m / 8 * 2.0**-6 for m in range(8)]
    positive += [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8)]
    positive.remove(480.0)  # its bits are nan
    return torch.tensor(sorted({-x for x in positive} | set(positive)), dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_takes_the_nearest_e4m3_number_times_the_scale_of_the_row(dtype):
    weight = torch.randn(6, 40, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight[2] = 0
    rounded = fp8.round_to_grid(weight)
    assert rounded.dtype == dtype
    assert torch.equal(rounded[2], weight[2])
    grid = e4m3_numbers()
    for row in (0, 1, 3, 4, 5):
        exact = weight[row].double()
        scale = exact.abs().max() / 448
        distance = ((exact / scale)[:, None] - grid).abs().min(dim=1).values * scale
        # The nearest grid point, but for the rounding of float32 and of the result's own dtype.
        error = (rounded[row].double() - exact).abs()
        slack = exact.abs() * torch.finfo(dtype).eps + 1e-6 * scale
        assert (error <= distance + slack).all()
    assert not torch.equal(rounded, weight)


def test_the_grid_rounds_what_fp8_quantizes_and_nothing_else():
    names = ["model.layers.0.self_attn.kv_a_proj_with_mqa.weight", "model.layers.0.mlp.gate.weight"]
    weight = matrix(4, 4)
    projection, router = (dict(fp8.in_form(name, weight, "fp8-grid"))[name] for name in names)
    assert torch.equal(projection, fp8.round_to_grid(weight))
    assert not torch.equal(projection, weight)
    assert torch.equal(router, weight)
