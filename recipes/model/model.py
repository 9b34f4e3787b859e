"""A stock GPTModel, in chunks, from the config of a Hugging Face Mixture-of-Experts checkpoint."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any, Literal

import torch

from routing_replay.errors import CheckpointError, ConfigError, reading, unknown_name

from . import cpu  # noqa: F401  (makes Megatron importable)

# isort: split
from megatron.core import parallel_state, tensor_parallel
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_mtp_block_spec,
)
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

# isort: split
from .architectures import LATENT, Fields, HFConfig, fields_of
from .local_modules import AllGatherAttention, DuplicatedLinear, RMSNorm
from .parallel import ParallelLayout
from .weight_names import require_supported

Recompute = Literal["none", "full", "block", "moe"]
Spec = Literal["auto", "local", "te"]
_RECOMPUTE: dict[str, Fields] = {
    "none": {},
    "full": {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
    "block": {
        "recompute_granularity": "full",
        "recompute_method": "block",
        "recompute_num_layers": 1,
    },
    "moe": {"recompute_granularity": "selective", "recompute_modules": ["moe"]},
}


@dataclass
class ModelConfig(TransformerConfig):
    """Megatron's TransformerConfig, with what its GPTModel takes beside it.

    Args:
        architecture: Hugging Face's `model_type`.
        layer_spec: Whose modules the layers are made of: "te" or "local".
        vocab_size: Rows of the checkpoint's embedding; `padded_vocab_size` is the model's.
        padded_vocab_size: A multiple of the tensor parallel size.
        max_sequence_length: Positions that the model was made for.
        tie_embeddings: Whether the output layer is the embedding.
        rotary_base: RoPE's theta.
        rotary_percent: Fraction of a head that is rotated.
    """

    architecture: str = ""
    layer_spec: str = "local"
    vocab_size: int = 0
    padded_vocab_size: int = 0
    max_sequence_length: int = 0
    tie_embeddings: bool = False
    rotary_base: float = 10000.0
    rotary_percent: float = 1.0


@dataclass
class LatentModelConfig(MLATransformerConfig, ModelConfig):
    """The ModelConfig of a model with multi-head latent attention (DeepSeek-V3)."""


def transformer_config(
    hf_config: HFConfig | str | os.PathLike[str],
    layout: ParallelLayout,
    *,
    dtype: torch.dtype = torch.float32,
    recompute: Recompute = "none",
    dispatcher: Literal["allgather", "alltoall"] = "alltoall",
    spec: Spec = "auto",
    **overrides: Any,
) -> ModelConfig:
    """Return Megatron's configuration of a Hugging Face MoE checkpoint.

    The router stays Megatron's TopKRouter: `norm_topk_prob` becomes the softmax over the selected
    logits (equal to normalizing the selected probabilities), its absence the softmax before top-k.

    Args:
        hf_config: A checkpoint's folder or its transformers config; `architectures.SUPPORTED`.
        layout: Parallel sizes; they must divide heads, groups, experts and layers.
        dtype: Type of parameters and activations: float32 or bfloat16.
        recompute: Activations to recompute: none, every layer ("full"), the first layer of each
            chunk ("block"), or the inside of the MoE layers ("moe").
        dispatcher: How tokens travel to experts on other ranks.
        spec: "te" takes Transformer Engine's modules and its fusions; "local" takes Megatron's own
            modules with our norm and attention; "auto" takes "te" on CUDA and "local" elsewhere.
        **overrides: Any field of TransformerConfig; they come last.

    Raises:
        CheckpointError: An architecture or a feature of it that is not supported.
        ConfigError: A layout or an option that does not fit the model or the machine.
    """
    if isinstance(hf_config, str | os.PathLike):
        hf_config = _read_hf_config(hf_config)
    require_supported(hf_config.model_type)
    if recompute not in _RECOMPUTE:
        raise unknown_name("recompute", recompute, _RECOMPUTE)
    layer_spec = resolve_spec(spec, has_te=HAVE_TE, has_cuda=torch.cuda.is_available())
    fields = fields_of(hf_config)
    _check_divisible(fields, layout)
    fields |= _layout_fields(layout, dtype, fields["vocab_size"]) | _RECOMPUTE[recompute]
    fields |= _fusion_fields(layer_spec)
    fields["moe_token_dispatcher_type"] = dispatcher
    if hf_config.model_type not in LATENT:
        return ModelConfig(**(fields | overrides))
    impl = "transformer_engine" if layer_spec == "te" else "local"
    return LatentModelConfig(**(fields | {"transformer_impl": impl} | overrides))


def resolve_spec(spec: Spec, *, has_te: bool, has_cuda: bool) -> str:
    """Return the layer spec to build, "te" or "local".

    Raises:
        ConfigError: Transformer Engine is missing where it is needed. On CUDA the local spec runs
            experts one after another and attention with an explicit mask, so it is never a silent
            choice there.
    """
    if spec not in ("auto", "local", "te"):
        raise unknown_name("layer spec", spec, ("auto", "local", "te"))
    if spec == "local" or (spec == "auto" and not has_cuda):
        return "local"
    if not has_cuda:
        raise ConfigError(
            "the Transformer Engine spec cannot run here",
            expected="a CUDA device",
            fix='Use spec "local" or "auto"',
        )
    if not has_te:
        raise ConfigError(
            "Transformer Engine is not installed, and without it training on GPUs is very slow",
            expected="pip install routing_replay[te]",
            fix='Install it, or accept the slow modules with spec "local" (layer_spec: local)',
        )
    return "te"


def build_model(config: ModelConfig, layout: ParallelLayout) -> list[GPTModel]:
    """Return this rank's model chunks: one, or one per virtual pipeline stage.

    Args:
        config: From `transformer_config`, with the same layout.
        layout: The layout that `parallel.initialize` was given.
    """
    if layout.virtual_pipeline == 1:
        return [_build_chunk(config, None)]
    return [_build_chunk(config, stage) for stage in range(layout.virtual_pipeline)]


def _build_chunk(config: ModelConfig, vp_stage: int | None) -> GPTModel:
    use_te = config.layer_spec == "te"
    block = get_gpt_decoder_block_spec(
        config, use_transformer_engine=use_te, normalization="RMSNorm", vp_stage=vp_stage
    )
    if not use_te:
        _use_local_modules(block, config)
    stage = {"ignore_virtual": vp_stage is None, "vp_stage": vp_stage}
    chunk = GPTModel(
        config=config,
        transformer_layer_spec=block,
        vocab_size=config.padded_vocab_size,
        max_sequence_length=config.max_sequence_length,
        pre_process=parallel_state.is_pipeline_first_stage(**stage),
        post_process=parallel_state.is_pipeline_last_stage(**stage),
        share_embeddings_and_output_weights=config.tie_embeddings,
        position_embedding_type="rope",
        rotary_percent=config.rotary_percent,
        rotary_base=config.rotary_base,
        vp_stage=vp_stage,
        mtp_block_spec=_mtp_spec(config, block, vp_stage),
    ).to(torch.cuda.current_device())
    if not use_te:
        _duplicate_down_projections(chunk)
    for parameter in chunk.parameters():
        tensor_parallel.set_defaults_if_not_set_tensor_model_parallel_attributes(parameter)
    if chunk.post_process and config.padded_vocab_size > config.vocab_size:
        chunk.output_layer.register_forward_hook(_hide_padded_logits)
    return chunk


def _mtp_spec(config: ModelConfig, block: TransformerBlockSubmodules, vp_stage: int | None) -> Any:
    """Multi-token-prediction layers on the stage that holds them, if the config asks for any."""
    use_te = config.layer_spec == "te"
    if not config.mtp_num_layers:
        return None
    spec = get_gpt_mtp_block_spec(config, block, use_transformer_engine=use_te, vp_stage=vp_stage)
    if spec is not None and not use_te:
        for layer in spec.layer_specs:
            modules = layer.submodules
            modules.enorm = modules.hnorm = modules.layer_norm = RMSNorm
    return spec


def _use_local_modules(block: TransformerBlockSubmodules, config: ModelConfig) -> None:
    block.layer_norm = RMSNorm
    for layer in block.layer_specs:
        modules = layer.submodules
        modules.input_layernorm = modules.pre_mlp_layernorm = RMSNorm
        attention = modules.self_attention.submodules
        attention.core_attention = AllGatherAttention
        if config.multi_latent_attention:
            attention.q_layernorm = attention.kv_layernorm = RMSNorm
        elif attention.q_layernorm is not IdentityOp:
            attention.q_layernorm = attention.k_layernorm = RMSNorm


def _duplicate_down_projections(chunk: GPTModel) -> None:
    """Give every tensor-parallel rank the whole down projections, as Transformer Engine's spec.

    The local spec splits them. The gradient of the keys' rotary part, which all heads share, would
    then lack the other ranks' heads: the backward of Megatron's gather only splits.
    """
    for module in chunk.modules():
        if isinstance(module, MLASelfAttention):
            for name in ("linear_q_down_proj", "linear_kv_down_proj"):
                setattr(module, name, DuplicatedLinear(getattr(module, name)))


def _hide_padded_logits(
    layer: tensor_parallel.ColumnParallelLinear,
    inputs: tuple[torch.Tensor, ...],
    outputs: tuple[torch.Tensor, Any],
) -> tuple[torch.Tensor, Any]:
    # The embedding is padded so that tensor parallelism divides it. A padded row is no token: with
    # its logit left at 0 the softmax would differ from the checkpoint's.
    logits, bias = outputs
    rows = layer.output_size_per_partition
    first = 0 if layer.gather_output else parallel_state.get_tensor_model_parallel_rank() * rows
    tokens = first + torch.arange(logits.shape[-1], device=logits.device)
    padded = tokens >= layer.config.vocab_size
    return logits.masked_fill(padded, torch.finfo(logits.dtype).min), bias


def _read_hf_config(folder: str | os.PathLike[str]) -> HFConfig:
    from transformers import AutoConfig

    # transformers raises KeyError and ValueError for architectures that it does not know.
    with reading(folder, "the checkpoint's config.json", CheckpointError, also=(KeyError,)):
        return AutoConfig.from_pretrained(folder)


def _check_divisible(fields: Fields, layout: ParallelLayout) -> None:
    pairs = [
        ("num_attention_heads", "tensor", layout.tensor),
        ("num_query_groups", "tensor", layout.tensor),
        ("ffn_hidden_size", "tensor", layout.tensor),
        ("num_moe_experts", "expert", layout.expert),
        ("moe_ffn_hidden_size", "expert_tensor", layout.expert_tensor),
    ]
    for field, name, size in pairs:
        if fields[field] % size:
            raise ConfigError(
                f"the layout's {name} does not divide the model's {field}",
                expected=f"a divisor of {fields[field]}",
                got=size,
            )
    layout.stage_layers(fields["num_layers"])


def _fusion_fields(layer_spec: str) -> Fields:
    has_te = layer_spec == "te"
    return {
        "layer_spec": layer_spec,
        "moe_grouped_gemm": has_te,
        # The unfused unpermute adds bfloat16 values with atomics, in no fixed order: two passes
        # over the same routes would differ. Transformer Engine's gathers and adds in float32.
        "moe_permute_fusion": has_te,
        "apply_rope_fusion": has_te,
        "bias_activation_fusion": has_te,
        # These need APEX, or a compiler for nothing where dropout is 0.
        "gradient_accumulation_fusion": False,
        "masked_softmax_fusion": False,
        "bias_dropout_fusion": False,
    }


def _layout_fields(layout: ParallelLayout, dtype: torch.dtype, vocab_size: int) -> Fields:
    return {
        "tensor_model_parallel_size": layout.tensor,
        "pipeline_model_parallel_size": layout.pipeline,
        "virtual_pipeline_model_parallel_size": (
            layout.virtual_pipeline if layout.virtual_pipeline > 1 else None
        ),
        "num_layers_in_first_pipeline_stage": layout.first_stage_layers,
        "num_layers_in_last_pipeline_stage": layout.last_stage_layers,
        "context_parallel_size": layout.context,
        "expert_model_parallel_size": layout.expert,
        "expert_tensor_parallel_size": layout.expert_tensor,
        "sequence_parallel": layout.sequence,
        # Megatron's own training arguments demand it too: of two interleaved stages each is the
        # other's predecessor and successor, and batched messages swap activations and gradients.
        "overlap_p2p_comm": layout.virtual_pipeline > 1,
        "batch_p2p_comm": layout.virtual_pipeline == 1,
        "padded_vocab_size": math.ceil(vocab_size / layout.tensor) * layout.tensor,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "attention_softmax_in_fp32": True,
    }
