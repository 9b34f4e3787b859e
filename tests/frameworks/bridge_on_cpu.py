"""What a job of Megatron-Bridge needs on a machine without CUDA, for its tests and its example.

Call `prepare()` before Megatron is imported; a job on GPUs needs nothing of it.
"""

from __future__ import annotations

import functools
from functools import partial
from typing import Any

import stand_ins
import torch

# Functions that need a GPU or a package that Bridge imports for it.
WITHOUT_GPU = {
    "moe_grouped_gemm": False,
    "moe_permute_fusion": False,
    "gradient_accumulation_fusion": False,
    "masked_softmax_fusion": False,
    "bias_activation_fusion": False,
    "bias_dropout_fusion": False,
    "apply_rope_fusion": False,
    "persist_layer_norm": False,
    "cross_entropy_loss_fusion": False,
    "transformer_impl": "local",
    "use_cpu_initialization": True,
    "bf16": False,
    "params_dtype": torch.float32,
    "pipeline_dtype": torch.float32,
    "autocast_dtype": torch.float32,
    "attention_softmax_in_fp32": True,
}


@functools.cache
def prepare() -> None:
    """Let Bridge's loop start on a machine without CUDA."""
    stand_ins.prepare("modelopt", "nvidia_resiliency_ext")
    from megatron.core.datasets import utils

    # The wheel has the compiled module, but no Makefile. Bridge imports the name.
    utils.compile_helpers = lambda: None
    from megatron.bridge.peft import utils as peft
    from megatron.bridge.training import eval as evaluation
    from megatron.bridge.training import setup, train
    from megatron.core.models.gpt import gpt_layer_specs

    setup.initialize_megatron = partial(setup.initialize_megatron, allow_no_cuda=True)
    for module in (train, evaluation):  # asks modelopt, which is a stand-in
        module.get_tensor_shapes_adjust_fn_for_distillation = lambda *a, **k: None
    # Bridge takes Transformer Engine, which is a stand-in, for installed.
    peft.HAVE_TE = False
    mtp_spec = gpt_layer_specs.get_gpt_mtp_block_spec
    gpt_layer_specs.get_gpt_mtp_block_spec = lambda *a, **k: mtp_spec(
        *a, **k | {"use_transformer_engine": False}
    )


def layers(config: Any, vp_stage: int | None = None) -> Any:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

    from recipes.model.model import _use_local_modules

    block = get_gpt_decoder_block_spec(
        config, use_transformer_engine=False, normalization="RMSNorm", vp_stage=vp_stage
    )
    _use_local_modules(block, config)
    return block


def provider(hf: Any, **fields: Any) -> Any:
    """Return Bridge's provider of a Hugging Face configuration; `fields` are the provider's."""
    from megatron.bridge import AutoBridge

    hf.architectures = ["Qwen3MoeForCausalLM"]
    provider = AutoBridge.from_hf_config(hf).to_megatron_provider(load_weights=False)
    fields = {"moe_router_load_balancing_type": "none", "expert_tensor_parallel_size": 1} | fields
    for name, value in (WITHOUT_GPU | {"transformer_layer_spec": layers} | fields).items():
        setattr(provider, name, value)
    return provider


def job_config(model: Any, dataset: Any, folder: str, *, steps: int, micro_batch_size: int) -> Any:
    """Return the configuration of a job of `steps` steps, four samples each."""
    from megatron.bridge.training import config as c

    return c.ConfigContainer(
        model=model,
        train=c.TrainingConfig(
            train_iters=steps, global_batch_size=4, micro_batch_size=micro_batch_size
        ),
        validation=c.ValidationConfig(eval_interval=1, eval_iters=1),
        optimizer=c.OptimizerConfig(
            optimizer="adam", lr=1e-3, min_lr=1e-4, use_distributed_optimizer=False, bf16=False
        ),
        scheduler=c.SchedulerConfig(
            lr_decay_style="constant",
            lr_decay_iters=steps,
            start_weight_decay=0.01,
            end_weight_decay=0.01,
            weight_decay_incr_style="constant",
            lr_warmup_iters=0,
        ),
        ddp=c.DistributedDataParallelConfig(
            use_distributed_optimizer=False,
            overlap_grad_reduce=False,
            overlap_param_gather=False,
        ),
        dataset=dataset,
        logger=c.LoggerConfig(log_interval=1, tensorboard_dir=f"{folder}/tensorboard"),
        tokenizer=c.TokenizerConfig(
            tokenizer_type="NullTokenizer", vocab_size=model.vocab_size - 1
        ),
        checkpoint=c.CheckpointConfig(save=None),
        rng=c.RNGConfig(seed=7),
        dist=c.DistributedInitConfig(distributed_backend="gloo"),
    )
