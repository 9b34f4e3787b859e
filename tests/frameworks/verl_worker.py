"""verl's real TrainingWorker around its Megatron engine, on CPUs, with a tiny Qwen3-MoE."""

from __future__ import annotations

import contextlib
import os
from typing import Any

import stand_ins
import tiny_batch
import torch

stand_ins.prepare()

# isort: split
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec  # noqa: E402
from verl.plugin.platform import PlatformRegistry  # noqa: E402
from verl.plugin.platform.platform_cuda import PlatformCUDA  # noqa: E402


@PlatformRegistry.register(platform="cpu")
class PlatformCPU(PlatformCUDA):
    """verl's description of a machine without a device."""

    device_name = "cpu"
    vendor_name = "none"

    def is_available(self):
        return True

    def current_device(self):
        return "cpu"

    def communication_backend_name(self):
        return "gloo"


from verl.trainer.config import CheckpointConfig  # noqa: E402
from verl.utils import tensordict_utils  # noqa: E402
from verl.workers.config import (  # noqa: E402
    HFModelConfig,
    McoreEngineConfig,
    McoreOptimizerConfig,
    TrainingWorkerConfig,
)
from verl.workers.config.engine import EngineRouterReplayConfig  # noqa: E402
from verl.workers.engine import EngineRegistry  # noqa: E402
from verl.workers.engine.megatron import MegatronEngineWithLMHead  # noqa: E402
from verl.workers.engine_workers import TrainingWorker  # noqa: E402

from recipes.model.local_modules import AllGatherAttention  # noqa: E402
from recipes.model.model import _use_local_modules  # noqa: E402
from recipes.model.parallel import ParallelLayout  # noqa: E402

EngineRegistry.register("language_model", "megatron", device="cpu")(
    type("StockEngine", (MegatronEngineWithLMHead,), {})
)


class CausalAttention(AllGatherAttention):
    """Without verl's mask of a padded batch: padding at the end cannot reach what is before it."""

    def forward(self, query, key, value, attention_mask, *args, **named):
        return super().forward(query, key, value, None, *args, **named)


def _layers(config: Any, vp_stage: int | None = None) -> Any:
    block = get_gpt_decoder_block_spec(
        config, use_transformer_engine=False, normalization="RMSNorm", vp_stage=vp_stage
    )
    _use_local_modules(block, config)
    for layer in block.layer_specs:
        layer.submodules.self_attention.submodules.core_attention = CausalAttention
    return block


# Off: what only CUDA has.
TRANSFORMER = {
    "transformer_layer_spec": _layers,
    "transformer_impl": "local",
    "use_cpu_initialization": True,
    "attention_softmax_in_fp32": True,
    "moe_router_dtype": "fp32",
} | dict.fromkeys(
    [
        "apply_rope_fusion",
        "bias_activation_fusion",
        "bias_dropout_fusion",
        "cross_entropy_loss_fusion",
        "gradient_accumulation_fusion",
        "masked_softmax_fusion",
        "moe_grouped_gemm",
        "moe_permute_fusion",
        "persist_layer_norm",
    ],
    False,
)


def worker(
    checkpoint: str, layout: ParallelLayout, *, stock: bool = False, **settings: Any
) -> TrainingWorker:
    """A worker whose model is loaded; by verl's own engine if `stock`."""
    engine = {
        "tensor_model_parallel_size": layout.tensor,
        "pipeline_model_parallel_size": layout.pipeline,
        "context_parallel_size": layout.context,
        "expert_model_parallel_size": layout.expert,
        "expert_tensor_parallel_size": 1,
        "override_transformer_config": TRANSFORMER,
        "use_distributed_optimizer": False,
        "use_dynamic_bsz": True,
        "max_token_len_per_gpu": 64,
        "infer_max_token_len_per_gpu": 64,
    }
    model = HFModelConfig(path=checkpoint, override_config={"attn_implementation": "eager"})
    padding = settings.pop("use_remove_padding", True)
    object.__setattr__(model, "use_remove_padding", padding)
    config = TrainingWorkerConfig(
        model_type="language_model",
        model_config=model,
        engine_config=McoreEngineConfig(**(engine | settings)),
        optimizer_config=McoreOptimizerConfig(lr=1e-3, lr_decay_steps=9, total_training_steps=9),
        checkpoint_config=CheckpointConfig(),
    )
    # The registry falls back to the engine of no vendor.
    with environment(VERL_ENGINE_VENDOR="unknown" if stock else "none"):
        made = TrainingWorker(config)
    made.reset()
    made.set_loss_fn(mean_loss)
    return made


def own_replay(mode: str) -> dict[str, Any]:
    """Setting of a worker: verl's own replay."""
    return {"router_replay": EngineRouterReplayConfig(mode=mode)}


def nested(parts: list[torch.Tensor]) -> torch.Tensor:
    return torch.nested.as_nested_tensor(parts, layout=torch.jagged)


def batch(
    data_rank: int,
    routed: list[torch.Tensor] | None = None,
    kept: list[int] | None = None,
    **non_tensors: Any,
) -> Any:
    """The sequences of a data-parallel rank, or some of them, as verl's trainer hands them over."""
    tokens = tiny_batch.sequences(data_rank)
    if kept is not None:
        tokens = [tokens[number] for number in kept]
    return batch_of(tokens, routed, **non_tensors)


def batch_of(
    tokens: list[torch.Tensor], routed: list[torch.Tensor] | None, **non_tensors: Any
) -> Any:
    """Sequences with a prompt of four tokens, as verl's trainer hands them to a worker."""
    masks = [torch.tensor([0] * 4 + [1] * (len(sequence) - 4)) for sequence in tokens]
    responses = [mask[4:] for mask in masks]
    fields = {
        "input_ids": nested(tokens),
        "loss_mask": nested(masks),
        "response_mask": torch.nn.utils.rnn.pad_sequence(responses, batch_first=True),
        "temperature": torch.ones(len(tokens)),
    }
    if routed is not None:
        fields["routed_experts"] = nested(routed)
    settings = {
        "use_dynamic_bsz": True,
        "max_token_len_per_gpu": 64,
        "micro_batch_size_per_gpu": 2,
        "global_batch_size": len(tokens),
        "global_token_num": [len(sequence) for sequence in tokens],
        "compute_loss": False,
    }
    return tensordict_utils.get_tensordict(fields, non_tensor_dict=settings | non_tensors)


def mean_loss(model_output: Any, data: Any, dp_group: Any) -> tuple[torch.Tensor, dict]:
    """Minus the mean log-prob over all tokens of all data-parallel ranks."""
    total = model_output["log_probs"].values().float().sum()
    return -total / data["batch_num_tokens"] * data["dp_size"], {}


def log_probs(made: TrainingWorker, data: Any) -> torch.Tensor | None:
    """Of all tokens, from verl's old-log-prob pass; None on a rank without outputs."""
    output = made.infer_batch(data)
    return None if output is None else output["log_probs"].values().clone()


def gradients(made: TrainingWorker, *batches: Any) -> dict[str, torch.Tensor]:
    """Of a step over the batches, by parameter name, reduced as verl reduces them."""
    engine = made.engine
    with engine.train_mode():
        engine.optimizer_zero_grad()
        for data in batches:
            engine.forward_backward_batch(data, mean_loss, forward_only=False)
        return main_gradients(engine.module)


def main_gradients(chunks: Any) -> dict[str, torch.Tensor]:
    """What the optimizer would read, by parameter name."""
    return {
        f"{number}.{name}": parameter.main_grad.clone()
        for number, chunk in enumerate(chunks)
        for name, parameter in chunk.named_parameters()
    }


@contextlib.contextmanager
def environment(**values: str):
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value
