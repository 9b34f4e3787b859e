"""One rollout in slime's or miles' trainer on a CPU: their own code, from the parser to the update.

`train_actor` is theirs: reference and old log-probs, advantages, loss, updates. Not theirs: weight
backups (the reference is the actor), the weight updater, the profiler.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import checkouts
import stand_ins
import torch

stand_ins.prepare()

# isort: split
import torch.distributed as dist  # noqa: E402
from megatron.core import mpu  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec  # noqa: E402
from megatron.core.tokenizers.utils.build_tokenizer import vocab_size_with_padding  # noqa: E402
from rollouts import NamedPasses, dispatch_maps, distinct_tokens, random_routes  # noqa: E402
from witness import chunk_config  # noqa: E402

from recipes.model import model as our_model  # noqa: E402
from recipes.model.parallel import start_distributed  # noqa: E402
from recipes.model.weights import load_hf  # noqa: E402

LENGTHS = (17, 30, 9, 23, 12, 40, 15, 33)
PROMPT, LAYERS, EXPERTS, TOP_K, VOCABULARY = 4, 4, 8, 2, 256
# What `recipes.model.weights` reads of a configuration, and Megatron's own does not have.
NAMES_OF_OUR_CONVERTER = {
    "architecture": "qwen3_moe",
    "tie_embeddings": False,
    "vocab_size": VOCABULARY,
    "padded_vocab_size": VOCABULARY,
}


@dataclass(frozen=True, kw_only=True)
class Job:
    """A job of one rollout.

    Args:
        package: slime or miles.
        checkpoint: Of the model, in Hugging Face's form.
        flags: Beside those of `arguments`.
        layout: Sizes of the parallel groups that are not 1.
        mini_batches: Updates of the rollout.
        folder: For TensorBoard's files.
    """

    package: str
    checkpoint: str
    flags: tuple[str, ...] = ()
    layout: tuple[tuple[str, int], ...] = ()
    mini_batches: int = 2
    folder: str

    def size(self, group: str) -> int:
        return dict(self.layout).get(group, 1)

    @property
    def num_ranks(self) -> int:
        return functools.reduce(int.__mul__, dict(self.layout).values(), 1)

    def theirs(self, name: str) -> ModuleType:
        return importlib.import_module(f"{self.package}.{name}")


def load(package: str) -> None:
    """Import a package's trainer: once, in the process that the ranks are forked from."""
    checkouts.put_on_path(package)
    if package == "miles":
        _name_what_miles_expects_of_its_megatron()
    for name in ("utils.arguments", "utils.dp_schedule", "backends.megatron_utils.actor"):
        importlib.import_module(f"{package}.{name}")


def _name_what_miles_expects_of_its_megatron() -> None:
    """A function of its fork, which the stock wheel keeps elsewhere."""
    tokenizer = ModuleType("megatron.training.tokenizer.tokenizer")
    tokenizer._vocab_size_with_padding = vocab_size_with_padding  # type: ignore[attr-defined]
    sys.modules["megatron.training.tokenizer"] = ModuleType("megatron.training.tokenizer")
    sys.modules[tokenizer.__name__] = tokenizer


def layer_spec(args: Any, config: Any, vp_stage: int | None = None) -> Any:
    """Local layers, as the tests' models have them; their `--spec`."""
    block = get_gpt_decoder_block_spec(
        config, use_transformer_engine=False, normalization="RMSNorm", vp_stage=vp_stage
    )
    our_model._use_local_modules(block, config)
    return block


def arguments(job: Job) -> list[str]:
    values = {
        "train-backend": "megatron",
        "num-layers": LAYERS,
        "hidden-size": 64,
        "ffn-hidden-size": 96,
        "num-attention-heads": 4,
        "num-query-groups": 2,
        "kv-channels": 64,
        "seq-length": 64,
        "max-position-embeddings": 4096,
        "num-experts": EXPERTS,
        "moe-router-topk": TOP_K,
        "moe-ffn-hidden-size": 32,
        "moe-token-dispatcher-type": "alltoall",
        "moe-router-load-balancing-type": "none",
        "moe-router-dtype": "fp32",
        "transformer-impl": "local",
        "normalization": "RMSNorm",
        "norm-epsilon": 1e-6,
        "position-embedding-type": "rope",
        "rotary-base": 10000,
        "attention-dropout": 0,
        "hidden-dropout": 0,
        "distributed-backend": "gloo",
        "vocab-size": VOCABULARY,
        "make-vocab-size-divisible-by": 1,
        "lr": 1e-3,
        "seed": 7,
        "tensor-model-parallel-size": job.size("tensor"),
        "pipeline-model-parallel-size": job.size("pipeline"),
        "expert-model-parallel-size": job.size("expert"),
        "context-parallel-size": job.size("context"),
        "expert-tensor-parallel-size": 1,
        "rollout-batch-size": 4,
        "n-samples-per-prompt": 2,
        "global-batch-size": len(LENGTHS) // job.mini_batches,
        "num-rollout": 2,
        "hf-checkpoint": job.checkpoint,
        "load": job.checkpoint,
        "advantage-estimator": "grpo",
        "max-tokens-per-gpu": 64,
        "actor-num-nodes": 1,
        "actor-num-gpus-per-node": job.num_ranks,
        "data-pad-size-multiplier": 8,
        "tb-project-name": "test",
        "tb-experiment-name": "test",
    }
    switches = (
        *("debug-train-only", "group-query-attention", "swiglu", "disable-bias-linear"),
        *("untie-embeddings-and-output-weights", "qk-layernorm", "no-gradient-accumulation-fusion"),
        *("no-masked-softmax-fusion", "no-bias-swiglu-fusion", "no-persist-layer-norm"),
        *("no-rope-fusion", "use-tensorboard"),
        *([] if "bshd" in job.flags else ["use-dynamic-batch-size"]),
    )
    pairs = [part for name, value in values.items() for part in (f"--{name}", str(value))]
    spec = ["--spec", "slime_step", "layer_spec"]
    sequence = ["--sequence-parallel"] if job.size("tensor") > 1 else []
    return [*pairs, *(f"--{name}" for name in switches), *spec, *sequence, *job.flags]


def use_cpu(job: Job) -> None:
    """What stands between their code and a CPU."""
    if job.package == "slime":
        accelerator = job.theirs("utils.accelerator")
        cuda = job.theirs("utils.accelerator.cuda").CUDAAccelerator
        device = {
            "name": "cpu",
            "device_type": "cpu",
            "communication_backend_name": "gloo",
            "is_available": lambda self: True,
            "device": lambda self, index=None: torch.device("cpu"),
            "current_device": lambda self: torch.device("cpu"),
            "supports": lambda self, capability: False,
        }
        accelerator.set_accelerator(type("CPUAccelerator", (cuda,), device)())
        # It asserts numpy 1, for Megatron's sake; Megatron 0.19 runs with numpy 2.
        initialize = job.theirs("backends.megatron_utils.initialize")
        initialize.np = SimpleNamespace(**vars(initialize.np) | {"__version__": "1.26"})
        return
    job.theirs("utils.arguments").sglang_validate_args = lambda args: None
    job.theirs("utils.dumper_utils")._get_phase_override_configs = lambda *_: {"enable": False}


def parse(job: Job) -> Any:
    sys.argv = ["train.py", *arguments(job)]
    args = job.theirs("utils.arguments").parse_args()
    args.load = job.checkpoint
    args.enable_gloo_process_groups = True
    args.rank, args.local_rank = int(os.environ["RANK"]), 0
    args.world_size = job.num_ranks
    return args


def samples() -> dict[str, Any]:
    """The rollout: two samples of each of four prompts."""
    responses = [n - PROMPT for n in LENGTHS]
    routes = random_routes(LENGTHS, LAYERS, EXPERTS, TOP_K)
    return {
        "tokens": distinct_tokens(LENGTHS),
        "response_lengths": responses,
        "rewards": [float(i % 2) for i in range(len(LENGTHS))],
        "loss_masks": [torch.ones(n, dtype=torch.int) for n in responses],
        "rollout_log_probs": [torch.full((n,), -5.5) for n in responses],
        "rollout_routed_experts": [r.int() for r in routes],
        "rollout_mask_sums": [float(n) for n in responses],
        "rollout_ids": list(range(len(LENGTHS))),
        "total_lengths": list(LENGTHS),
        "truncated": [0] * len(LENGTHS),
        "sample_indices": list(range(len(LENGTHS))),
        "raw_reward": [0.0] * len(LENGTHS),
    }


def shard(job: Job, args: Any, data: dict[str, Any]) -> dict[str, Any]:
    """This data-parallel rank's part, scheduled by their own function."""
    config = {
        "dp_size": mpu.get_data_parallel_world_size(),
        "cp_size": mpu.get_context_parallel_world_size(),
        "vpp_size": 1,
        "microbatch_group_size_per_vp_stage": 1,
    }
    partitions, indices, numbers, sizes = job.theirs("utils.dp_schedule").build_dp_schedule(
        args,
        config,
        list(LENGTHS),
        global_batch_size=args.global_batch_size,
        rollout_indices=data["rollout_ids"],
    )
    rank = mpu.get_data_parallel_rank()
    rollout = {key: [values[i] for i in partitions[rank]] for key, values in data.items()}
    rollout |= {
        "partition": partitions[rank],
        "micro_batch_indices": indices[rank],
        "num_microbatches": numbers,
        "global_batch_sizes": sizes,
        "rollout_mask_sums": torch.tensor(rollout["rollout_mask_sums"]),
    }
    layout = []
    if getattr(args, "qkv_format", "thd") == "bshd":
        longest = -(-max(rollout["total_lengths"]) // 16) * 16
        rollout["max_seq_lens"] = [longest] * len(rollout["tokens"])
        layout = ["bshd", longest]
    cp_utils = "backends.megatron_utils.cp_utils"
    cut = job.theirs(cp_utils if job.package == "slime" else "backends.training_utils.cp_utils")
    parts = zip(
        rollout["rollout_log_probs"],
        rollout["total_lengths"],
        rollout["response_lengths"],
        strict=True,
    )
    rollout["rollout_log_probs"] = [cut.slice_log_prob_with_cp(*p, *layout) for p in parts]
    return rollout


def actor_of(
    job: Job, args: Any, model: list[torch.nn.Module], optimizer: Any, scheduler: Any
) -> Any:
    """Their actor without Ray and without weights to publish."""
    module = job.theirs("backends.megatron_utils.actor")
    actor_class = module.MegatronTrainRayActor
    actor_class = getattr(actor_class, "__ray_actor_class__", actor_class)
    actor = object.__new__(actor_class)
    backuper = SimpleNamespace(
        backup_tags={"actor", "ref"}, restore=lambda tag: None, backup=lambda tag: None
    )
    actor.__dict__.update(
        args=args,
        model=model,
        optimizer=optimizer,
        opt_param_scheduler=scheduler,
        weights_backuper=backuper,
        _active_model_tag="actor",
        rollout_data_postprocess=None,
        prof=SimpleNamespace(step=lambda rollout_id: None),
        role="actor",
        with_ref=True,
        with_opd_teacher=False,
        _heartbeat=SimpleNamespace(bump=lambda: None),
        _ft_test_action_executor=None,
        weight_updater=SimpleNamespace(pop_metrics=dict),
    )
    return actor


def run(rank: int, options: dict[str, Any]) -> dict[str, Any]:
    """Train on one rollout; return what this rank saw and printed."""
    job = Job(**options)
    load(job.package)
    other = "miles" if job.package == "slime" else "slime"
    for name in [name for name in sys.modules if name.partition(".")[0] == other]:
        del sys.modules[name]  # a process has one of them
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(job.num_ranks),
        "LOCAL_RANK": "0",
        "TENSORBOARD_DIR": job.folder,
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",  # Megatron asks for it beside TP and CP
        "SLIME_DESTROY_WORLD_PROCESS_GROUP": "0",
    }
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        result = train(job)
    return result | {"printed": printed.getvalue()}


def train(job: Job) -> dict[str, Any]:
    use_cpu(job)
    start_distributed()
    args = parse(job)
    actor_module = job.theirs("backends.megatron_utils.actor")
    job.theirs("backends.megatron_utils.initialize").init(args)
    if job.package == "miles" and dist.get_rank() == dist.get_world_size() - 1:
        job.theirs("utils.tracking_utils.tracking").init_tracking(args, primary=False)
    setup = job.theirs("backends.megatron_utils.model").setup_model_and_optimizer
    model, optimizer, scheduler = setup(args, "actor")
    model[0].role = "actor"
    for chunk in model:
        chunk_config(chunk).__dict__.update(NAMES_OF_OUR_CONVERTER)
    load_hf(model, job.checkpoint)
    optimizer.reload_model_params()
    routes = random_routes(LENGTHS, LAYERS, EXPERTS, TOP_K)
    passes = NamedPasses(model, dispatch_maps(routes, EXPERTS))
    name_passes(actor_module, passes)
    rollout = shard(job, args, samples())
    timer = job.theirs("observability.timer" if job.package == "slime" else "utils.timer").Timer()
    timer.start("train_wait")
    timer.seq_lens = list(LENGTHS)
    extra = {"witness_info": None, "attempt": 0} if job.package == "miles" else {}
    actor_of(job, args, model, optimizer, scheduler).train_actor(0, rollout, **extra)
    passes.begin("")
    return {
        "seen": passes.seen,
        "partition": rollout["partition"],
        "log_probs": rollout.get("log_probs"),
        "ref_log_probs": rollout.get("ref_log_probs"),
    }


def name_passes(actor_module: ModuleType, passes: Any) -> None:
    """Tell the passes apart by the prefix under which their results are stored."""
    actor_class = actor_module.MegatronTrainRayActor
    stock: Callable[..., Any] = actor_class.compute_log_prob

    def compute_log_prob(self: Any, *args: Any, **named: Any) -> Any:
        passes.begin((named.get("store_prefix") or "old_") + "log_probs")
        try:
            return stock(self, *args, **named)
        finally:
            passes.begin("update")

    actor_class.compute_log_prob = compute_log_prob
