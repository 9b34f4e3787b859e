"""What an SGLang server of a run needs, and what it would refuse at its start."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import TYPE_CHECKING

from recipes.model import fp8
from routing_replay.errors import ConfigError

if TYPE_CHECKING:
    from recipes.model.model import ModelConfig

    from ..settings.config import RecipeConfig

GIB = 1 << 30
# SGLang's own choice on an 80 GB GPU is near it; it depends on the GPU and on the graphs.
ASSUMED_MEM_FRACTION = 0.85
BF16_BYTES = 2


@dataclass(frozen=True, kw_only=True)
class ServerLayout:
    """Sizes of one server, and how many there are.

    Args:
        tensor, pipeline, data, expert: Its parallel sizes.
        num_servers: Servers of the run.
        mem_fraction: Share of a GPU's memory for weights and the key-value cache.
    """

    tensor: int
    pipeline: int
    data: int
    expert: int
    num_servers: int
    mem_fraction: float

    @property
    def num_gpus(self) -> int:
        """GPUs of one server."""
        return self.tensor * self.pipeline * self.data


def server_layout(config: RecipeConfig) -> ServerLayout:
    """Read the sizes from the server's arguments.

    Raises:
        ConfigError: An argument that is no number, or that cannot work with weights that change.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--tp", "--tp-size", "--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--pp", "--pp-size", "--pipeline-parallel-size", type=int, default=1)
    parser.add_argument("--dp", "--dp-size", "--data-parallel-size", type=int, default=1)
    parser.add_argument("--ep", "--ep-size", "--expert-parallel-size", type=int, default=1)
    parser.add_argument("--mem-fraction-static", type=float, default=ASSUMED_MEM_FRACTION)
    parser.add_argument("--quantization")
    parser.add_argument("--enable-dp-attention", action="store_true")
    try:
        sizes, _ = parser.parse_known_args(config.rollout.server_arguments)
    except argparse.ArgumentError as error:
        raise ConfigError("a server argument cannot be read", got=error) from error
    _check_arguments(config, sizes)
    return ServerLayout(
        tensor=sizes.tp,
        pipeline=sizes.pp,
        data=sizes.dp,
        expert=sizes.ep,
        num_servers=len(config.rollout.rollout_url) or max(1, config.plan.plan_server_nodes),
        mem_fraction=sizes.mem_fraction_static,
    )


def _check_arguments(config: RecipeConfig, sizes: argparse.Namespace) -> None:
    is_fp8 = config.rollout.rollout_weights == "fp8"
    if sizes.quantization and not (is_fp8 and sizes.quantization == "fp8"):
        raise ConfigError(
            "a server that quantizes at its start cannot load the weights of a later step: "
            "SGLang 0.5.23 replaces its parameters by quantized ones without a loader",
            expected="server_arguments without --quantization",
            got=f"--quantization {sizes.quantization}",
            fix="Set rollout_weights: fp8, with which the servers load block FP8 checkpoints",
        )
    if sizes.enable_dp_attention and config.rollout_capture != "off":
        raise ConfigError(
            "data-parallel attention of the server would return other tokens' routes",
            expected="--dp without --enable-dp-attention",
            got="--enable-dp-attention",
        )
    if config.rollout.publish != "disk" and (sizes.pp > 1 or sizes.dp > 1):
        raise ConfigError(
            "SGLang takes weights in buckets on tensor-parallel ranks only",
            expected="server_arguments without --pp and --dp",
            got=f"--pp {sizes.pp} --dp {sizes.dp}",
            fix="Start more servers instead, or choose --publish disk",
        )
    for name in ("tp", "pp", "dp", "ep"):
        if getattr(sizes, name) < 1:
            raise ConfigError(f"the server's --{name} is out of range", expected=">= 1")


def check_server(config: RecipeConfig, model: ModelConfig, server: ServerLayout) -> None:
    """Raise ConfigError for sizes that SGLang or the machine refuses."""
    tensor, expert = server.tensor, server.expert
    groups = model.num_query_groups
    _require_divides("--tp", tensor, "num_attention_heads", model.num_attention_heads)
    if groups % tensor and tensor % groups:
        raise _refusal("--tp", tensor, f"a divisor or a multiple of num_key_value_heads {groups}")
    if tensor % expert:
        raise _refusal("--ep", expert, f"a divisor of --tp {tensor}")
    _require_divides("--ep", expert, "num_experts", model.num_moe_experts)
    width = model.moe_ffn_hidden_size
    _require_divides("--tp / --ep", tensor // expert, "moe_intermediate_size", width)
    if config.rollout.rollout_weights == "fp8":
        _check_blocks(model, server)
    if not config.plan.plan_gpu_gb:
        return
    own = [gpu for gpu in config.rollout.rollout_gpus.split(",") if gpu.strip()]
    num_gpus = len(own) or config.plan.plan_gpus_per_node
    if server.num_gpus > num_gpus:
        raise ConfigError(
            "the server needs more GPUs than it has",
            expected=f"--tp * --pp * --dp of at most {num_gpus} (--rollout-gpus or "
            "--plan-gpus-per-node)",
            got=f"{tensor} * {server.pipeline} * {server.data}",
        )


def _check_blocks(model: ModelConfig, server: ServerLayout) -> None:
    """Refuse matrices that a block FP8 server would cut inside of a block, as SGLang does."""
    tensor = server.tensor
    widths = {"moe_intermediate_size": (model.moe_ffn_hidden_size, tensor // server.expert)}
    if model.moe_shared_expert_intermediate_size:
        widths["shared experts' size"] = (model.moe_shared_expert_intermediate_size, tensor)
    if isinstance(model.moe_layer_freq, list) and not all(model.moe_layer_freq):
        widths["intermediate_size"] = (model.ffn_hidden_size, tensor)
    for name, (width, size) in widths.items():
        if width % (size * fp8.BLOCK):
            raise ConfigError(
                f"the server would split the model's {name} inside of an FP8 block",
                expected=f"a multiple of {fp8.BLOCK} on each GPU",
                got=f"{width} / {size}",
                fix="Lower --tp, or raise --ep, which splits experts by their number",
            )


def weight_bytes(config: RecipeConfig, model: ModelConfig, num_parameters: int) -> int:
    """Return the bytes of the weights as the servers have them."""
    if config.rollout.rollout_weights != "fp8":
        return num_parameters * BF16_BYTES
    # One byte each, and a scale per block, which is nothing; the vocabulary keeps two.
    vocabulary = model.vocab_size * model.hidden_size * (1 if model.tie_embeddings else 2)
    return num_parameters + vocabulary


def cache_tokens(
    config: RecipeConfig, model: ModelConfig, server: ServerLayout, num_parameters: int
) -> tuple[float, int]:
    """Return the GiB of weights on a server's GPU, and the tokens that its cache can hold.

    Args:
        config: With the memory of a GPU.
        model: For the sizes of keys and values.
        server: From `server_layout`.
        num_parameters: Of the whole model.

    Raises:
        ConfigError: Not even one longest sequence fits beside the weights.
    """
    total = weight_bytes(config, model, num_parameters)
    weights = total / (server.tensor * server.pipeline)
    per_token = model.num_layers / server.pipeline * _cached_values(model, server) * BF16_BYTES
    room = config.plan.plan_gpu_gb * 1e9 * server.mem_fraction - weights
    tokens = int(room // per_token)
    longest = config.plan.plan_prompt_tokens + config.rollout.max_new_tokens
    if tokens < longest:
        raise ConfigError(
            "the server's GPUs cannot hold the weights and one longest sequence",
            expected=f"room for {longest} tokens",
            got=f"{weights / GIB:.1f} GiB of weights and room for {max(0, tokens)} tokens of "
            f"{config.plan.plan_gpu_gb:g} GB",
            fix="Raise --tp in server_arguments, or lower --dp for it",
        )
    return weights / GIB, tokens


def _cached_values(model: ModelConfig, server: ServerLayout) -> int:
    """Return how many values a GPU caches for a token and layer."""
    if model.multi_latent_attention:
        # Every tensor rank keeps the latent, which all heads share.
        return int(model.kv_lora_rank + model.qk_pos_emb_head_dim)
    # With fewer key-value heads than ranks each rank keeps a whole head.
    return 2 * max(1, model.num_query_groups // server.tensor) * int(model.kv_channels)


def _require_divides(flag: str, size: int, name: str, total: int) -> None:
    if total % size:
        raise _refusal(flag, size, f"a divisor of the model's {name} {total}")


def _refusal(flag: str, size: int, expected: str) -> ConfigError:
    return ConfigError(f"the server's {flag} does not fit the model", expected=expected, got=size)
