"""A user's own layers for `--spec`: local ones that take sequence and context parallelism."""


def layer_spec(config, vp_stage=None):
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

    from recipes.model.model import _use_local_modules

    config = getattr(config, "transformer", config)  # 0.19 passes the configuration of the GPT
    block = get_gpt_decoder_block_spec(
        config, use_transformer_engine=False, normalization="RMSNorm", vp_stage=vp_stage
    )
    _use_local_modules(block, config)
    return block
