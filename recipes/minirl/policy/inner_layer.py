"""BuPO: the policy of an inner layer, softmax(H_l E_u^T), instead of the whole model's.

H_l is the hidden state after layer l, E_u the output layer; the final norm is left out, as in the
paper (2512.19673). Layers above l still run and get no gradient.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from recipes.model import cpu  # noqa: F401  (makes Megatron importable)
from routing_replay.errors import ConfigError

# isort: split
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_layer import TransformerLayer


@contextlib.contextmanager
def inner_logits(model_chunks: Sequence[torch.nn.Module], layer: int) -> Iterator[None]:
    """Within: the model's logits are those of layer `layer`.

    Args:
        model_chunks: One chunk with all layers, wrapped or not.
        layer: From 0.

    Raises:
        ConfigError: The model has no such layer.
    """
    layers = {
        module.layer_number - 1: module
        for chunk in model_chunks
        for module in chunk.modules()
        if isinstance(module, TransformerLayer)
    }
    blocks = [m for c in model_chunks for m in c.modules() if isinstance(m, TransformerBlock)]
    if layer not in layers or len(blocks) != 1:
        raise ConfigError(
            "the model has no such inner layer", expected=f"0..{max(layers)}", got=layer
        )
    hidden: list[torch.Tensor] = []

    def keep(module: torch.nn.Module, arguments: Any, output: Any) -> None:
        hidden[:] = [output[0] if isinstance(output, tuple) else output]

    def replace(module: torch.nn.Module, arguments: Any, output: Any) -> torch.Tensor:
        return hidden.pop()

    hooks = [
        layers[layer].register_forward_hook(keep),
        blocks[0].final_layernorm.register_forward_hook(replace),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
