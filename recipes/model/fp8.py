"""Checkpoints in block FP8, as DeepSeek-V3's own: e4m3 values and a float32 scale per block.

A quantized `X.weight` [R, C] is float8_e4m3fn. Beside it stands `X.weight_scale_inv`, float32
[R / 128, C / 128] rounded up: a weight is its value times its block's scale. SGLang loads such a
checkpoint, also into a running server. `python -m recipes.model.fp8 SOURCE TARGET` writes one.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch

from routing_replay.errors import CheckpointError, RoutingReplayError, reading

# Of weights for a server: as they are, in block FP8, or rounded to FP8's grid in their own dtype.
Form = Literal["checkpoint", "fp8", "fp8-grid"]
BLOCK = 128
# Largest finite value of float8_e4m3fn.
E4M3_MAX = 448.0
SCALE_SUFFIX = "_scale_inv"
# The key of config.json and its value.
CONFIG_KEY = "quantization_config"
CONFIG = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [BLOCK, BLOCK],
}


def is_quantized(name: str) -> bool:
    """Return whether a tensor is quantized: projections. Router, norms and vocabulary are not."""
    return name.endswith(("_proj.weight", "_proj_with_mqa.weight"))


def quantized(name: str, weight: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield what stands for a tensor in a block FP8 checkpoint: itself, or values and scales."""
    if not is_quantized(name):
        yield name, weight
        return
    values, scales = quantize(weight)
    yield name, values
    yield name + SCALE_SUFFIX, scales


def in_form(name: str, weight: torch.Tensor, form: Form) -> list[tuple[str, torch.Tensor]]:
    """Return what stands for a tensor in a checkpoint of a form."""
    match form:
        case "checkpoint":
            return [(name, weight)]
        case "fp8":
            return list(quantized(name, weight))
        case "fp8-grid":
            return [(name, round_to_grid(weight) if is_quantized(name) else weight)]


def round_to_grid(weight: torch.Tensor) -> torch.Tensor:
    """Return the nearest weight that is a float8 e4m3 number times its row's scale, in its dtype.

    An emulation: real FP8 inference also quantises activations and multiplies on other hardware.
    """
    values = weight.float()
    scale = values.abs().amax(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    scale = scale / E4M3_MAX
    grid = (values / scale).to(torch.float8_e4m3fn).float()
    return (grid * scale).to(weight.dtype)


def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the e4m3 values [R, C] and the scales of the blocks of a matrix."""
    rows, columns = weight.shape
    padding = (0, -columns % BLOCK, 0, -rows % BLOCK)
    padded = torch.nn.functional.pad(weight.float(), padding)
    blocks = padded.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))
    # A block of zeros needs a scale above 0 to divide by.
    largest = blocks.abs().amax((1, 3), keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    scales = largest / E4M3_MAX
    values = (blocks / scales).to(torch.float8_e4m3fn).reshape(padded.shape)
    return values[:rows, :columns].contiguous(), scales[:, 0, :, 0].contiguous()


def dequantize(
    values: torch.Tensor, scales: torch.Tensor, first_row: int = 0, first_column: int = 0
) -> torch.Tensor:
    """Return the float32 weights of a part of a quantized matrix.

    Args:
        values: e4m3, rows and columns from `first_row` and `first_column` on.
        scales: Of the whole matrix.
        first_row, first_column: Of the part.
    """
    rows = torch.arange(first_row, first_row + values.shape[0]) // BLOCK
    columns = torch.arange(first_column, first_column + values.shape[1]) // BLOCK
    return values.float() * scales[rows][:, columns]


def require_quantized(config: dict[str, Any], where: object) -> None:
    """Raise CheckpointError unless a config.json is of a checkpoint in this format."""
    got = config.get(CONFIG_KEY) or {}
    if got.get("quant_method") != "fp8" or got.get("weight_block_size") != [BLOCK, BLOCK]:
        raise CheckpointError(
            "the checkpoint is not in block FP8",
            expected=f"{CONFIG_KEY} with quant_method fp8 and weight_block_size {[BLOCK, BLOCK]}",
            got=got or "none",
            where=where,
            fix="Write one with python -m recipes.model.fp8 SOURCE TARGET",
        )


def convert(source: Path, target: Path) -> None:
    """Write a checkpoint's block FP8 version, file by file.

    Raises:
        CheckpointError: The source cannot be read or is quantized already.
    """
    from .checkpoint_files import CheckpointReader, CheckpointWriter, natural_order

    with reading(source / "config.json", "the checkpoint's config.json", CheckpointError):
        config = json.loads((source / "config.json").read_text())
    if CONFIG_KEY in config:
        raise CheckpointError("the checkpoint is quantized already", where=source)
    writer = CheckpointWriter(target, source=source, config_changes={CONFIG_KEY: CONFIG})
    writer.start()
    with CheckpointReader(source) as reader:
        for name in sorted(reader.names, key=natural_order):
            for pair in quantized(name, reader.read_whole(name)):
                writer.add(*pair)
    writer.finish(writer.close())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m recipes.model.fp8", description=__doc__)
    parser.add_argument("source", type=Path, help="a checkpoint's folder")
    parser.add_argument("target", type=Path, help="the folder to write")
    arguments = parser.parse_args(argv)
    try:
        convert(arguments.source, arguments.target)
    except RoutingReplayError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
