"""The settings of the recipe: presets, YAML files and flags share these names."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import Field, dataclass, fields
from typing import Any, Literal

from routing_replay.balance.step_plan import KINDS
from routing_replay.config import FLAG_PREFIX, ReplayConfig, setting
from routing_replay.errors import ConfigError, unknown_name
from routing_replay.metrics.sinks import SINKS


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """run: how long, where, and from which state"""

    run_dir: str = setting("", "folder of the run; runs/minirl-<time> if empty")
    shared_dir: str = setting(
        "",
        "folder for weights and checkpoints that all machines and servers see; empty: --run-dir",
    )
    scratch_dir: str = setting(
        "",
        "folder of each machine, such as /dev/shm, for the batch and the routes of a step; empty: "
        "--run-dir",
    )
    node_timeout_s: float = setting(600.0, "longest wait for the trainer's other machines")
    resume: bool = setting(False, "continue the run in --run-dir from its newest checkpoint")
    steps: int = setting(40, "training steps (each: one rollout batch)")
    seed: int = setting(0, "seed of the data order, the tiny model and its warm-up")
    nproc: int = setting(1, "trainer processes per machine")
    nnodes: int = setting(
        1,
        "machines of the trainer; for more than one, --prepare-only prints each one's command. On "
        "Ray there are nnodes * nproc ranks on as few machines as hold them",
    )
    ray: str = setting(
        "",
        "address of a Ray cluster that runs servers and trainer, host:port, or auto inside one; "
        "empty: this machine runs them, without Ray",
    )
    trainer_gpus: str = setting(
        "", "CUDA devices of the trainer, as 4,5,6,7; needed beside a launched server"
    )
    cpu_threads: int = setting(
        0, "threads of each trainer rank and launched server; 0: the cores shared evenly"
    )
    checkpoint_every: int = setting(10, "steps between checkpoints; 0: at the end only")
    measure_live_every: int = setting(
        1, "steps between extra old-policy passes without replay (metrics _live); 0: at the end"
    )
    keep_checkpoints: int = setting(2, "newest checkpoints that are kept")
    store_answers: bool = setting(
        True,
        "store each training response as it ends, until a checkpoint covers its step: an "
        "interrupted run samples none of them again",
    )
    evaluate_every: int = setting(
        0, "steps between evaluations on held-out prompts; 0: before the first, after the last"
    )


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """model: which checkpoint is trained"""

    model: str = setting(
        "tiny", "Hugging Face checkpoint folder, or `tiny`: a small Qwen3-MoE made on the spot"
    )
    cache_dir: str = setting("runs/cache", "where tiny models are kept between runs")
    tiny_layers: int = setting(6, "layers of the tiny model")
    tiny_experts: int = setting(32, "experts per layer of the tiny model")
    tiny_top_k: int = setting(2, "experts per token of the tiny model")
    warmup_target: float = setting(
        0.3, "supervised warm-up of the tiny model ends at this sampled accuracy; 0: no warm-up"
    )
    warmup_steps: int = setting(500, "most supervised steps")


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """data: prompts with verifiable answers"""

    prompts: str = setting(
        "",
        'JSON lines {"prompt": ..., "answer": ..., "verifier": "exact" or "math"}; '
        "the addition task if empty",
    )
    heldout_prompts: str = setting("", "the same for evaluation; needed with --prompts")
    heldout_limit: int = setting(0, "held-out prompts used per evaluation; 0: all")
    chat_template: bool = setting(False, "wrap prompts in the tokenizer's chat template")
    prompts_per_step: int = setting(64, "prompts per rollout batch")
    samples_per_prompt: int = setting(8, "responses per prompt (the group of the advantage)")
    dynamic_sampling: int = setting(
        0,
        "DAPO: rounds of further prompts in place of those whose responses all got the same "
        "reward; what is still missing after them stays in the batch. 0: off",
    )


@dataclass(frozen=True, kw_only=True)
class RolloutSettings:
    """rollout: SGLang servers and sampling"""

    rollout_url: tuple[str, ...] = setting((), "running servers with our plugin; none: launch one")
    num_servers: int = setting(1, "servers to launch; more than one needs --ray")
    rollout_dtype: str = setting("bfloat16", "dtype of a launched server")
    rollout_weights: Literal["checkpoint", "fp8", "fp8-grid"] = setting(
        "checkpoint",
        "fp8: the servers get block FP8 weights and start from --rollout-model (GPUs only). "
        "fp8-grid: EMULATED FP8, the projection weights that the server receives are rounded to "
        "the e4m3 grid with a scale per row",
        ("checkpoint", "fp8", "fp8-grid"),
    )
    rollout_model: str = setting(
        "",
        "checkpoint that the servers start from; empty: --model. With rollout_weights fp8 one in "
        "block FP8, such as python -m recipes.model.fp8 writes",
    )
    publish: Literal["disk", "buckets", "tensors"] = setting(
        "disk",
        "how new weights reach the servers: as files that all see, or bucket by bucket into their "
        "memory (--tp only), over NCCL between GPUs and gloo otherwise; tensors: servers on the "
        "trainer's machine read the buckets in its memory. If that fails, as files",
        ("disk", "buckets", "tensors"),
    )
    publish_bucket_mb: int = setting(512, "MiB of weights that a pipeline stage sends at once")
    publish_timeout_s: float = setting(
        600.0, "longest wait for the servers to take a bucket, or to load a checkpoint"
    )
    rollout_gpus: str = setting("", "CUDA devices of a launched server, as 0,1,2,3")
    rollout_python: str = setting(
        "", "Python interpreter of a launched server's environment; empty: this one"
    )
    ready_timeout_s: float = setting(600.0, "longest wait for a launched server to be ready")
    server_port: int = setting(0, "TCP port of a launched server; 0: a free one")
    server_arguments: tuple[str, ...] = setting((), "further arguments of a launched server")
    max_new_tokens: int = setting(5, "longest response in tokens")
    temperature: float = setting(1.0, "of sampling; the trainer scores with the same")
    top_p: float = setting(1.0, "sample from the smallest set of tokens with this probability")
    top_k: int = setting(0, "sample from this many most likely tokens; 0: all")
    keep_sampling_mask: bool = setting(
        True,
        "with top-p or top-k: the tokens that they left to choose from come back with the samples, "
        "and all policies are restricted to them. Needs top-k. Otherwise log-probs are of the "
        "whole vocabulary and the samples are not from mu",
    )
    tool: Literal["none", "calculator"] = setting(
        "none",
        "what a response can call: calculator returns the sum or the difference before an =. The "
        "tool's output is not trained",
        ("none", "calculator"),
    )
    tool_calls: int = setting(4, "most calls of the tool in a response")
    request_timeout_s: float = setting(
        600.0, "longest wait for one response; with --ahead K of more than 1, K times as long"
    )
    min_servers: int = setting(1, "fewest servers that the run goes on with")
    server_recovery_s: float = setting(
        600.0, "how long there may be fewer, while dead and hanging servers come back"
    )
    server_restarts: int = setting(
        3, "how often a launched server that died or hangs is started again"
    )
    health_every_s: float = setting(
        30.0,
        "seconds between health checks of a server; after two missed ones it is left out",
    )
    ahead: int = setting(
        0,
        "rollouts of so many further steps run while a step is trained, from weights at most so "
        "many versions older than those that will train on them; 0: one after the other. More than "
        "1 need --publish-pause retract or in_place",
    )
    publish_pause: Literal["wait", "retract", "in_place"] = setting(
        "wait",
        "what new weights do to responses that run. wait: they wait until the rollout that runs "
        "ahead has ended. retract: the responses stop, their tokens are prefilled again, and what "
        "follows is of the new weights alone. in_place: the responses stop and go on, and what "
        "follows attends to keys and values of the old weights, which no recomputation reproduces",
        ("wait", "retract", "in_place"),
    )
    max_version_lag: int = setting(
        -1,
        "replay the rollout's routes (R3) of weights that are at most so many versions old; older "
        "ones route live. -1: as many as --ahead",
    )
    max_uncovered: float = setting(
        0.05,
        "largest fraction of a step's rows that may have no routes against the job's intention; "
        "above it the step stops with the causes",
    )


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """training: updates in Megatron"""

    minibatch_size: int = setting(128, "responses per update; N = batch / minibatch")
    microbatch_size: int = setting(64, "most responses per forward pass on one rank")
    microbatch_tokens: int = setting(
        0,
        "pack whole sequences into microbatches of at most so many tokens, without padding (a "
        "longer sequence stands alone); 0: pad --microbatch-size sequences to their longest",
    )
    logprob_passes: int = setting(
        1,
        "pi_old's log-probs are the mean of so many recomputations under the same routes (mean_8 "
        "of KAT-Coder): less noise where kernels do not repeat themselves bitwise",
    )
    learning_rate: float = setting(3e-4, "constant learning rate of AdamW")
    adam_beta2: float = setting(0.99, "second-moment decay of AdamW")
    adam_eps: float = setting(1e-8, "added to the root of the second moment of AdamW")
    weight_decay: float = setting(0.0, "of AdamW")
    clip_grad: float = setting(1.0, "largest gradient norm; 0: no clipping")
    trainer_dtype: str = setting("float32", "of the trainer", ("float32", "bfloat16"))
    tensor_parallel: int = setting(1, "ranks that share each matrix")
    pipeline_parallel: int = setting(1, "pipeline stages")
    virtual_pipeline: int = setting(1, "model chunks per pipeline stage")
    first_stage_layers: int = setting(
        0, "layers of the first pipeline stage; 0: as many as a middle one"
    )
    last_stage_layers: int = setting(
        0, "layers of the last pipeline stage; 0: as many as a middle one"
    )
    expert_parallel: int = setting(1, "ranks that share the experts")
    context_parallel: int = setting(1, "ranks that share each sequence")
    recompute: Literal["none", "moe", "full"] = setting(
        "none", "activation recomputation", ("none", "moe", "full")
    )
    layer_spec: Literal["auto", "te", "local"] = setting(
        "auto", "modules of the layers; local is slow on GPUs", ("auto", "te", "local")
    )
    weights: Literal["own", "bridge"] = setting(
        "own",
        "converter between Hugging Face's weights and Megatron's: own, or Megatron-Bridge's",
        ("own", "bridge"),
    )
    distributed_optimizer: bool = setting(False, "shard the optimizer state over data parallelism")
    plan: str = setting(
        "none",
        "what the known routes of a step (R3) arrange for expert parallelism: packing, sequences "
        "to microbatches and ranks; placement, experts to ranks; both",
        KINDS,
    )
    placement_horizon: int = setting(
        10, "steps for which a placement of experts is expected to stay"
    )
    placement_move_tokens: int = setting(
        100, "cost of moving one expert to another rank, in tokens that an expert computes"
    )


@dataclass(frozen=True, kw_only=True)
class ObjectiveSettings:
    """objective: the loss"""

    objective: str = setting(
        "minirl", "name of the loss, see docs/objectives.md; help prints them all"
    )
    objective_parameters: tuple[str, ...] = setting(
        (), "parameters of the loss as name=value; see --objective help"
    )
    reference: str = setting(
        "", "checkpoint of the frozen reference of KL terms; empty: that of --model"
    )
    reward_kl_coefficient: float = setting(
        0.0, "weight of the KL to the reference in the reward; 0: none"
    )
    reward_kl_estimator: str = setting("k1", "its estimator", ("k1", "k2", "k3"))
    overlong_cache: int = setting(
        0, "DAPO: the reward falls by 1 over the last N tokens before --max-new-tokens; 0: off"
    )
    smoothing_correct: float = setting(
        0.0, "differential smoothing: rare right answers gain, by this times log pi_old(y|x)"
    )
    smoothing_wrong: float = setting(
        0.0, "differential smoothing: common wrong answers lose, by this times log pi_old(y|x)"
    )
    topk_logprobs: int = setting(20, "K of objectives that compare mu's most likely tokens")
    internal_layer: int = setting(
        -1, "BuPO: layer (from 0) whose own policy is trained first; -1: none"
    )
    internal_steps: int = setting(30, "BuPO: steps before the whole policy is trained")


@dataclass(frozen=True, kw_only=True)
class TelemetrySettings:
    """telemetry: what the servers capture, and where metrics go"""

    capture: str = setting(
        "gates",
        "what the rollout engine returns per token and layer: expert ids; ids and combine weights; "
        "ids and gate probabilities; all of these and the full router logits of a sample of tokens",
        ("ids", "weights", "gates", "logits"),
    )
    sinks: tuple[str, ...] = setting(
        ("jsonl", "tensorboard"), f"where metrics go, of {', '.join(SINKS)}", SINKS
    )
    metrics_dir: str = setting("", "not in this recipe: a run's metrics lie in --run-dir")


@dataclass(frozen=True, kw_only=True)
class PlanSettings:
    """plan: the machines and the rates that --dry-run reckons with; a run does not read them"""

    plan_gpu_gb: float = setting(0.0, "memory of a GPU in 10^9 bytes; 0: not compared")
    plan_gpus_per_node: int = setting(8, "GPUs of a machine")
    plan_server_nodes: int = setting(
        1, "machines with one SGLang server each; 0: the server is on the trainer's machine"
    )
    plan_prompt_tokens: int = setting(0, "mean length of a prompt")
    plan_response_tokens: int = setting(
        0, "mean length of a response; 0: the longest, --max-new-tokens"
    )
    plan_trainer_tflops: float = setting(
        250.0, "TFLOP/s that a trainer's GPU achieves in bf16; assumed, not measured"
    )
    plan_rollout_tokens_per_s: float = setting(
        5000.0, "tokens that a server samples per second and GPU; assumed, not measured"
    )
    plan_disk_gb_per_s: float = setting(
        1.0, "of the disk that all machines see, in 10^9 bytes per second; assumed"
    )
    plan_network_gb_per_s: float = setting(
        10.0, "of a broadcast of weights to all servers, in 10^9 bytes per second; assumed"
    )


SECTIONS: dict[str, type] = {
    "run": RunSettings,
    "model": ModelSettings,
    "data": DataSettings,
    "rollout": RolloutSettings,
    "training": TrainingSettings,
    "objective": ObjectiveSettings,
    "replay": ReplayConfig,
    "telemetry": TelemetrySettings,
    "plan": PlanSettings,
}


def key_of(section: str, name: str) -> str:
    """Return the flat key of a section's setting: those of routing replay carry its prefix."""
    return (FLAG_PREFIX if section in ("replay", "telemetry") else "") + name


def known_settings() -> dict[str, tuple[str, Field[Any]]]:
    """Return every flat key with its section and its field there."""
    return {
        key_of(section, f.name): (section, f)
        for section, kind in SECTIONS.items()
        for f in fields(kind)
    }


def by_section(values: Mapping[str, object], where: object = None) -> dict[str, dict[str, Any]]:
    """Sort flat settings into their sections, each value converted to its setting's type.

    Args:
        values: By key; `-` and `_` alike.
        where: The file that they come from, for errors.

    Raises:
        ConfigError: A key is unknown (the nearest is named), or a value has the wrong type.
    """
    known = known_settings()
    sections: dict[str, dict[str, Any]] = {name: {} for name in SECTIONS}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in known:
            raise unknown_setting("setting", key, known, where)
        section, f = known[name]
        sections[section][f.name] = converted(name, f, value, where)
    return sections


def unknown_setting(
    kind: str, name: object, known: Mapping[str, Any] | Sequence[str], where: object = None
) -> ConfigError:
    """Return the error for an unknown name. It does not list the known ones: they are too many."""
    fix = unknown_name(kind, name, known).fix
    hint = "`python -m recipes.minirl --help` lists all"
    return ConfigError(
        f"unknown {kind} {name!r}", where=where, fix=f"{fix} {hint}" if fix else hint
    )


def converted(name: str, f: Field[Any], value: object, where: object = None) -> Any:
    """Return a value as the type of its setting: YAML reads 1e-4 as text and [a] as a list."""
    result, choices = _as_type(f.default, value), f.metadata["choices"]
    if result is None:
        raise ConfigError(
            f"the setting {name!r} has the wrong type",
            expected=type(f.default).__name__,
            got=repr(value),
            where=where,
        )
    for choice in result if isinstance(result, tuple) else (result,):
        if choices and choice not in choices:
            raise unknown_name(f"value of {name!r}", choice, choices)
    return result


def _as_type(default: object, value: object) -> object | None:
    """Return the value as the default's type, or None if it has another type."""
    if isinstance(default, tuple):
        if isinstance(value, Mapping):
            value = [f"{key}={json.dumps(inner)}" for key, inner in value.items()]
        value = [value] if isinstance(value, str) else value
        return tuple(str(item) for item in value) if isinstance(value, (list, tuple)) else None
    if isinstance(default, float) and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            return None
    return value if type(value) is type(default) else None
