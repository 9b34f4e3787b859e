"""What the ranks of the world in `test_megatron_model.py` measure."""

import torch
from megatron_worlds import megatron
from resume_checks import _policy, _settings, _step

from recipes.model import memory, weight_plan

# isort: split
from megatron.core import parallel_state


def measure(rank, folder, layouts, batch):
    """By layout, type and optimizer: measured and estimated bytes of this rank's tensors."""
    return {
        (name, dtype, is_distributed): _measure(folder, layout, _settings(dtype, is_distributed))
        for name, layout in layouts.items()
        for dtype in ("float32", "bfloat16")
        for is_distributed in (True, False)
    }


def _measure(folder, layout, settings):
    with megatron(layout):
        policy = _policy(folder, layout, settings)
        _step(policy, [[torch.arange(16)], [torch.arange(16)]])
        chunks = [weight_plan.unwrap(chunk) for chunk in policy.chunks]
        parameters = [p for chunk in chunks for p in chunk.parameters()]
        states = [s for part in _optimizers(policy.optimizer) for s in part.state.values()]
        moments = [s[name] for s in states for name in ("exp_avg", "exp_avg_sq")]
        masters = [] if settings.trainer_dtype == "float32" else [s["exp_avg"] for s in states]
        workload = memory.Workload(
            num_ranks=torch.distributed.get_world_size(),
            microbatch_tokens=16,
            distributed_optimizer=settings.distributed_optimizer,
        )
        stage = parallel_state.get_pipeline_model_parallel_rank()
        estimated = memory._stage(chunks[0].config, layout, workload, stage)
        return {
            "weights": (_bytes(parameters), estimated.weights),
            "gradients": (_bytes([p.main_grad for p in parameters]), estimated.gradients),
            # A master weight has the size of a moment.
            "optimizer": (_bytes(moments + masters), estimated.optimizer),
        }


def _optimizers(optimizer):
    return [part.optimizer for part in getattr(optimizer, "chained_optimizers", [optimizer])]


def _bytes(tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
