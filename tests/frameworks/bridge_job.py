"""A training job of Megatron-Bridge: a tiny Qwen3-MoE of its provider, its mock data, its pretrain.

One process runs one job: `run(rank, ...)` on the ranks of a world.
"""

from __future__ import annotations

import functools
import os
from functools import partial
from typing import Any

import loop_witness
import stand_ins
import torch
from loop_routes import EXPERTS, LAYERS, LENGTH, MICRO, TOP_K

STEPS = 2
VOCAB = 128
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


def run(rank: int, folder: str, sizes: dict[str, int], routes: str = "", own_loop: str = ""):
    """Train; return nothing: the witness writes its file.

    Args:
        rank: In the world.
        folder: Of the witness.
        sizes: Parallel sizes, by the provider's names.
        routes: A table: the callback replays it.
        own_loop: A table: replayed by hand.
    """
    os.environ["LOCAL_RANK"] = str(rank)
    prepare()
    from megatron.bridge.training import pretrain, train

    witness = loop_witness.Witness(folder)
    witness.watch_routers()
    own = loop_witness.OwnLoop(own_loop, train) if own_loop else None
    callbacks: list[Any] = []
    if routes:
        os.environ["ROUTING_REPLAY_ROUTES"] = routes
        os.environ["ROUTING_REPLAY_METRICS_DIR"] = folder
        from routing_replay.adapters.megatron_bridge import RoutingReplay

        callbacks = [RoutingReplay()]
    pretrain.pretrain(job_config(sizes, folder), step_function(witness, own), callbacks=callbacks)
    witness.save()


@functools.cache
def prepare() -> None:
    """Let Bridge's loop start on a machine without CUDA."""
    stand_ins.prepare("modelopt", "nvidia_resiliency_ext")
    from megatron.core.datasets import utils

    # The wheel has the compiled module, but no Makefile. Bridge imports the name.
    utils.compile_helpers = lambda: None
    from megatron.bridge.training import eval as evaluation
    from megatron.bridge.training import setup, train

    setup.initialize_megatron = partial(setup.initialize_megatron, allow_no_cuda=True)
    for module in (train, evaluation):  # asks modelopt, which is a stand-in
        module.get_tensor_shapes_adjust_fn_for_distillation = lambda *a, **k: None


def step_function(witness: Any, own: Any) -> Any:
    def step(iterator, model):
        batch = next(iterator)
        witness.begin(model, batch["tokens"])
        call = model if own is None else partial(own.forward, model)
        output = call(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
        return output, partial(witness.loss, model.training, batch["loss_mask"])

    return step


def layers(config: Any, vp_stage: int | None = None) -> Any:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

    from recipes.model.model import _use_local_modules

    block = get_gpt_decoder_block_spec(
        config, use_transformer_engine=False, normalization="RMSNorm", vp_stage=vp_stage
    )
    _use_local_modules(block, config)
    return block


def provider(sizes: dict[str, int]) -> Any:
    from megatron.bridge import AutoBridge

    from recipes.model.tiny import tiny_config

    hf = tiny_config(layers=LAYERS, experts=EXPERTS, top_k=TOP_K, vocab=VOCAB, head_dim=16)
    hf.architectures = ["Qwen3MoeForCausalLM"]
    provider = AutoBridge.from_hf_config(hf).to_megatron_provider(load_weights=False)
    fields = WITHOUT_GPU | sizes | {"seq_length": LENGTH, "expert_tensor_parallel_size": 1}
    fields |= {"transformer_layer_spec": layers, "moe_router_load_balancing_type": "none"}
    for name, value in fields.items():
        setattr(provider, name, value)
    return provider


def job_config(sizes: dict[str, int], folder: str) -> Any:
    from megatron.bridge.training import config as c

    return c.ConfigContainer(
        model=provider(sizes),
        train=c.TrainingConfig(train_iters=STEPS, global_batch_size=4, micro_batch_size=MICRO),
        validation=c.ValidationConfig(eval_interval=1, eval_iters=1),
        optimizer=c.OptimizerConfig(
            optimizer="adam", lr=1e-3, min_lr=1e-4, use_distributed_optimizer=False, bf16=False
        ),
        scheduler=c.SchedulerConfig(
            lr_decay_style="constant",
            lr_decay_iters=STEPS,
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
        dataset=c.MockGPTDatasetConfig(
            random_seed=7,
            reset_attention_mask=False,
            reset_position_ids=False,
            eod_mask_loss=False,
            seq_length=LENGTH,
            num_dataset_builder_threads=1,
            dataloader_type="single",
            num_workers=0,
            data_sharding=True,
            create_attention_mask=False,
        ),
        logger=c.LoggerConfig(log_interval=1, tensorboard_dir=f"{folder}/tensorboard"),
        tokenizer=c.TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=VOCAB - 1),
        checkpoint=c.CheckpointConfig(save=None),
        rng=c.RNGConfig(seed=7),
        dist=c.DistributedInitConfig(distributed_backend="gloo"),
    )
