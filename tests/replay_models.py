"""The matrix's models beside the plain GPTModel: HybridModel, of attention, MLP and MoE layers.

HybridModel's own layer specs are Transformer Engine's. These are the same layers from
megatron-core's local ones, so that a CPU can run them. Mamba layers need mamba-ssm's CUDA kernels:
none here.
"""

import importlib
from unittest import mock

import torch


def hybrid_chunks(config, layout, pattern):
    """This rank's chunks of a hybrid model.

    Args:
        config: From `transformer_config`.
        layout: Parallel sizes.
        pattern: Megatron's: `*` attention, `-` MLP, `E` MoE, `|` between pipeline stages.
    """
    from megatron.core import parallel_state as ps

    block, model_class, spec_name, pattern_name = _by_version()
    if pattern_name == "hybrid_override_pattern":
        pattern = pattern.replace("|", "")  # it cuts stages of equal size by itself
    stages = range(layout.virtual_pipeline) if layout.virtual_pipeline > 1 else [None]
    chunks = []
    for vp_stage in stages:
        where = {"ignore_virtual": vp_stage is None, "vp_stage": vp_stage}
        arguments = {spec_name: _stack_spec(block, config), pattern_name: pattern}
        if vp_stage is not None:
            arguments["vp_stage"] = vp_stage
        # The stack's last norm is Transformer Engine's by name, whatever the spec says.
        with mock.patch.object(block, "TENorm", _norm()):
            chunk = model_class(
                config=config,
                vocab_size=config.padded_vocab_size,
                max_sequence_length=config.max_sequence_length,
                pre_process=ps.is_pipeline_first_stage(**where),
                post_process=ps.is_pipeline_last_stage(**where),
                position_embedding_type="rope",
                **arguments,
            )
        chunks.append(chunk.to(torch.cuda.current_device()))
    return chunks


def _by_version():
    """Module of the stack, class of the model, and the names of two of its arguments."""
    core = "megatron.core"
    try:  # from 0.18 on
        block = importlib.import_module(f"{core}.models.hybrid.hybrid_block")
        model = importlib.import_module(f"{core}.models.hybrid.hybrid_model").HybridModel
        return block, model, "hybrid_stack_spec", "hybrid_layer_pattern"
    except ImportError:
        block = importlib.import_module(f"{core}.ssm.mamba_block")
        module = importlib.import_module(f"{core}.models.mamba.mamba_model")
    has_stages = "hybrid_layer_pattern" in module.MambaModel.__init__.__annotations__  # 0.17
    pattern_name = "hybrid_layer_pattern" if has_stages else "hybrid_override_pattern"
    return block, module.MambaModel, "mamba_stack_spec", pattern_name


def _stack_spec(block, config):
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.ssm.mlp_layer import MLPLayer
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_layer import TransformerLayer
    from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules as Parts

    from recipes.model.local_modules import AllGatherAttention

    routed = get_gpt_layer_local_spec(num_experts=config.num_moe_experts).submodules
    dense = get_gpt_layer_local_spec().submodules
    attention, bda, norm = routed.self_attention, routed.self_attn_bda, _norm()
    attention.submodules.core_attention = AllGatherAttention
    layers = {
        "attention_layer": (
            TransformerLayer,
            Parts(input_layernorm=norm, self_attention=attention, self_attn_bda=bda),
        ),
        "mlp_layer": (MLPLayer, Parts(pre_mlp_layernorm=norm, mlp=dense.mlp, mlp_bda=bda)),
        "moe_layer": (TransformerLayer, Parts(pre_mlp_layernorm=norm, mlp=routed.mlp, mlp_bda=bda)),
    }
    stack = getattr(block, "HybridStack", None) or block.MambaStack
    parts = getattr(block, "HybridStackSubmodules", None) or block.MambaStackSubmodules
    specs = {name: ModuleSpec(module=m, submodules=p) for name, (m, p) in layers.items()}
    return ModuleSpec(module=stack, submodules=parts(**specs))


def _norm():
    from recipes.model.local_modules import RMSNorm

    return RMSNorm
