"""NeMo-RL's own replay and ours, in its own code, on one model and one batch.

Batching, packing, context slices, passes, loss and log-probs are NeMo-RL's. Not its own: the model
(`recipes.model`) and the worker class, whose module needs a Megatron that is not released.
"""

from __future__ import annotations

import contextlib
import os
import time
from types import ModuleType
from typing import Any

import checkouts
import stand_ins
import torch

LENGTHS = (17, 30, 9, 23, 12, 40)
LAYERS, EXPERTS, TOP_K = 4, 8, 2
TOKENS = 64  # of a microbatch
MISSING_TOKEN = 5  # of the first sequence: no route of it arrived

stand_ins.prepare()

# isort: split
from megatron.core import parallel_state as mpu  # noqa: E402
from rollouts import NamedPasses, dispatch_maps, distinct_tokens, random_routes  # noqa: E402

from recipes.model import parallel  # noqa: E402
from recipes.model.model import build_model, transformer_config  # noqa: E402
from recipes.model.parallel import ParallelLayout  # noqa: E402
from recipes.model.weights import load_hf  # noqa: E402

# isort: split
checkouts.put_on_path("nemo_rl")
import nemo_rl.models.megatron.data as data_module  # noqa: E402
import nemo_rl.models.megatron.train as train_module  # noqa: E402
from nemo_rl.algorithms.loss.loss_functions import NLLLossFn  # noqa: E402
from nemo_rl.distributed.batched_data_dict import BatchedDataDict  # noqa: E402
from nemo_rl.models.megatron import router_replay  # noqa: E402

from routing_replay.adapters import nemo_rl as adapter  # noqa: E402


def configuration(is_packed: bool, layout: ParallelLayout) -> dict[str, Any]:
    tensor, context = layout.tensor, layout.context
    algorithm = "modified_first_fit_decreasing"
    return {
        "sequence_packing": {
            "enabled": is_packed,
            "train_mb_tokens": TOKENS,
            "logprob_mb_tokens": TOKENS,
            "algorithm": algorithm,
        },
        "dynamic_batching": {"enabled": False},
        "make_sequence_length_divisible_by": 2 * tensor * context,
        "megatron_cfg": {
            "tensor_model_parallel_size": tensor,
            "context_parallel_size": context,
            "pipeline_model_parallel_size": layout.pipeline,
            "sequence_parallel": tensor > 1,
            "expert_model_parallel_size": 1,
            "fp8_cfg": None,
        },
        "logprob_chunk_size": None,
    }


def batch(config: dict[str, Any], routes: list[torch.Tensor]) -> Any:
    size, longest = len(LENGTHS), max(LENGTHS)
    ids = torch.zeros(size, longest, dtype=torch.int64)
    mask = torch.zeros(size, longest)
    routed = torch.full((size, longest, LAYERS, TOP_K), -1, dtype=torch.int8)
    for row, (tokens, experts) in enumerate(zip(distinct_tokens(LENGTHS), routes, strict=True)):
        ids[row, : len(tokens)] = tokens
        mask[row, : len(tokens)] = 1
        routed[row, : len(experts)] = experts
    routed[0, MISSING_TOKEN] = -1
    data = BatchedDataDict(
        {
            "input_ids": ids,
            "input_lengths": torch.tensor(LENGTHS),
            "token_mask": mask,
            "sample_mask": torch.ones(size),
            "routed_experts": routed,
        }
    )
    if not config["sequence_packing"]["enabled"]:
        return data
    packing = {
        "max_tokens_per_microbatch": TOKENS,
        "input_key": "input_ids",
        "input_lengths_key": "input_lengths",
        "algorithm": config["sequence_packing"]["algorithm"],
        "sequence_length_pad_multiple": config["make_sequence_length_divisible_by"],
    }
    shards, _ = data.shard_by_batch_size(1, batch_size=None, sequence_packing_args=packing)
    return shards[0]


class NoTimer:
    def __call__(self, **arguments: Any) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


def one_pass(worker: ModuleType, model: torch.nn.Module, config: Any, data: Any, kind: str) -> Any:
    """One pass: "logprobs" (old policy), "reference" or "train"."""
    packed = config["sequence_packing"]["enabled"]
    iterator, number, size, _, padded = worker.get_microbatch_iterator(
        data, config, 2, straggler_timer=NoTimer()
    )
    assert packed or size == 2
    is_train = kind == "train"
    if is_train:
        post = train_module.LossPostProcessor(NLLLossFn(), config, num_microbatches=number)
    else:
        post = train_module.LogprobsPostProcessor(cfg=config)
    return train_module.megatron_forward_backward(
        model=model,
        data_iterator=iterator,
        seq_length=padded,
        mbs=size,
        num_microbatches=number,
        post_processing_fn=post,
        forward_only=not is_train,
        straggler_timer=NoTimer(),
        global_valid_seqs=torch.tensor(float(len(LENGTHS))),
        global_valid_toks=torch.tensor(float(sum(LENGTHS) - len(LENGTHS))),
        use_router_replay=kind != "reference",
        router_replay_train=is_train,
    )


def passes(
    worker: ModuleType, model: torch.nn.Module, layout: ParallelLayout, begin: Any
) -> dict[str, Any]:
    """Outputs, gradients and seconds of every pass, packed and padded."""
    results = {}
    for batching, is_packed in (("packed", True), ("padded", False)):
        if not is_packed and layout.context > 1:
            continue  # NeMo-RL makes a mask then, which the local attention refuses
        config = configuration(is_packed, layout)
        data = batch(config, routes())
        for kind in ("reference", "logprobs", "train"):
            model.zero_grad()
            begin(f"{batching} {kind}")
            started = time.perf_counter()
            outputs = one_pass(worker, model, config, data, kind)
            results[f"{batching} {kind}"] = {
                "outputs": [output.get("logprobs", output) for output in outputs or []],
                "lengths": data["input_lengths"],  # packing takes the sequences in another order
                "seconds": time.perf_counter() - started,
                "gradient": [
                    None if p.grad is None else p.grad.clone() for p in model.parameters()
                ],
            }
    return results


def use_cpu_in_backward() -> None:
    """Let NeMo-RL's own backward of a context slice put its index on a CPU.

    `enable_cpu` reads "cuda" as "cpu" by a mode, and torch runs a backward outside of it.
    """
    stock = torch.tensor

    def tensor(*args: Any, pin_memory: bool = False, **named: Any) -> torch.Tensor:
        return stock(*args, **named)

    torch.tensor = tensor  # type: ignore[assignment]
    torch.Tensor.cuda = lambda self, *args, **named: self  # type: ignore[method-assign]


def run(rank: int, checkpoint: str, layouts: list[dict[str, int]]) -> list[dict[str, Any]]:
    """What NeMo-RL's own replay gives in each layout, and then ours."""
    checkouts.put_on_path("nemo_rl")  # a forked rank has the path of the process that asked for it
    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"  # Megatron asks for it beside TP and CP
    use_cpu_in_backward()
    router_replay._install_missing_route_fallback_patch()
    # The name by which the worker's module, which cannot be imported here, calls the iterator.
    worker = ModuleType("nemo_rl.models.policy.workers.megatron_policy_worker")
    worker.get_microbatch_iterator = data_module.get_microbatch_iterator
    results = []
    for sizes in layouts:
        layout = ParallelLayout(**sizes, expert_tensor=1)
        parallel.initialize(layout, seed=1)
        results.append(compared(checkpoint, layout, worker))
        parallel.destroy(keep_world=True)
    return results


def routes() -> list[torch.Tensor]:
    return random_routes(LENGTHS, LAYERS, EXPERTS, TOP_K)


def model_of(checkpoint: str, layout: ParallelLayout) -> torch.nn.Module:
    """A model of ours with NeMo-RL's settings for replay."""
    config = transformer_config(
        checkpoint,
        layout,
        spec="local",
        variable_seq_lengths=True,
        moe_enable_routing_replay=True,
    )
    (model,) = build_model(config, layout)
    load_hf([model], checkpoint)
    return model


def compared(checkpoint: str, layout: ParallelLayout, worker: ModuleType) -> dict[str, Any]:
    model = model_of(checkpoint, layout)
    seen = NamedPasses([model], dispatch_maps(routes(), EXPERTS))
    own = passes(worker, model, layout, lambda name: seen.begin(f"own {name}"))
    with patched(worker) as job:
        ours = passes(worker, model, layout, lambda name: seen.begin(f"ours {name}"))
        seen.begin("")
        metrics = job.metrics
    is_last = mpu.is_pipeline_last_stage()
    return {"own": own, "ours": ours, "seen": seen.seen, "is_last": is_last, "metrics": metrics}


@contextlib.contextmanager
def patched(worker: ModuleType) -> Any:
    """Within: NeMo-RL's functions with our adapter; afterwards its own again."""
    stock = [(module, dict(vars(module))) for module in (worker, train_module)]
    adapter._worker.cache_clear()
    adapter.patch_worker(worker)
    adapter.patch_train(train_module)
    try:
        yield adapter._worker().job
    finally:
        for module, names in stock:
            vars(module).update(names)
