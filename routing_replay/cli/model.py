"""The flags that describe a model, and the shape that they or a checkpoint's config.json give."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from ..config import read_yaml
from ..errors import ConfigError, reading
from ..routes.shape import MoEShape

EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts")


def add_model(verb: argparse.ArgumentParser, purpose: str) -> None:
    """Add --model, or --experts, --top-k and --layers."""
    group = verb.add_argument_group("model", purpose)
    group.add_argument("--model", metavar="DIR", help="a Hugging Face checkpoint or its config")
    group.add_argument("--experts", type=int, metavar="E")
    group.add_argument("--top-k", type=int, metavar="K")
    group.add_argument("--layers", metavar="0-47", help="routed layers, as 0-3,5,7")


def read_shape(parsed: argparse.Namespace) -> MoEShape | None:
    """Return the shape that the flags describe; None without any of them."""
    if parsed.model:
        return read_model(parsed.model)
    flags = (parsed.experts, parsed.top_k, parsed.layers)
    if flags == (None, None, None):
        return None
    if None in flags:
        raise ConfigError(
            "the model is described in part", expected="all of --experts, --top-k and --layers"
        )
    layers = parse_layers(parsed.layers)
    return MoEShape(layers=layers, num_experts=parsed.experts, top_k=parsed.top_k)


def parse_layers(text: str) -> tuple[int, ...]:
    """Return "0-2,5" as (0, 1, 2, 5)."""
    layers: list[int] = []
    try:
        for part in text.split(","):
            first, _, last = part.partition("-")
            layers += range(int(first), int(last or first) + 1)
    except ValueError as error:
        raise ConfigError(
            "the list of layers cannot be read", expected="as 0-3,5,7", got=repr(text)
        ) from error
    return tuple(sorted(set(layers)))


def read_model(path: str | os.PathLike[str]) -> MoEShape:
    """Return layers, experts and top-k from a Hugging Face checkpoint's config.json.

    Raises:
        ConfigError: No such file, or not the configuration of a Mixture-of-Experts model.
    """
    path = Path(path)
    path = path / "config.json" if path.is_dir() else path
    settings = read_settings(path)
    settings = settings.get("text_config") or settings
    num_experts = next((settings[key] for key in EXPERT_KEYS if settings.get(key)), None)
    top_k = settings.get("num_experts_per_tok") or settings.get("moe_topk")
    num_layers = settings.get("num_hidden_layers")
    if not (num_experts and top_k and num_layers):
        raise ConfigError(
            "the file is not the configuration of a Mixture-of-Experts model",
            expected=f"num_hidden_layers, num_experts_per_tok and one of {', '.join(EXPERT_KEYS)}",
            got=", ".join(sorted(settings)[:8]),
            where=path,
        )
    layers = tuple(layer for layer in range(num_layers) if _is_routed(settings, layer))
    return MoEShape(layers=layers, num_experts=int(num_experts), top_k=int(top_k))


def read_settings(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the mapping in a JSON or YAML file.

    Raises:
        ConfigError: Unreadable, or not a mapping.
    """
    if Path(path).suffix in (".yaml", ".yml"):
        return read_yaml(path)
    with reading(path, "the configuration", ConfigError):
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ConfigError("the configuration is no JSON object", got=type(content), where=path)
    return content


def _is_routed(settings: dict[str, Any], layer: int) -> bool:
    """By the conventions of Qwen (steps, named dense layers) and DeepSeek (dense layers first)."""
    step = settings.get("decoder_sparse_step") or settings.get("moe_layer_freq") or 1
    if isinstance(step, list):
        return bool(step[layer])
    if layer in (settings.get("mlp_only_layers") or ()):
        return False
    first_dense = settings.get("first_k_dense_replace") or 0
    offset = 1 if "decoder_sparse_step" in settings else 0
    return bool(layer >= first_dense and (layer + offset) % step == 0)
