"""What the settings of a run must satisfy together; all of it is checked before anything starts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from routing_replay import objectives
from routing_replay.errors import ConfigError

from ..launch.addresses import require_reachable
from ..policy.step_plan import plan_layout

if TYPE_CHECKING:
    from .config import RecipeConfig


def check_sampling(config: RecipeConfig) -> None:
    """Raise ConfigError for a sampling that the trainer could not score."""
    r, temperature = config.rollout, config.rollout.temperature
    if temperature <= 0:
        raise _out_of_range("temperature", "above 0", temperature)
    if not 0 < r.top_p <= 1:
        raise _out_of_range("top_p", "above 0, at most 1", r.top_p)
    num_servers = len(r.rollout_url) or r.num_servers
    if not 1 <= r.min_servers <= num_servers:
        raise _out_of_range("min_servers", f"1..{num_servers}, the run's servers", r.min_servers)
    if r.health_every_s <= 0:
        raise _out_of_range("health_every_s", "above 0", r.health_every_s)
    _check_range("tool_calls", r.tool_calls)
    if not 0 <= r.max_uncovered <= 1:
        raise _out_of_range("max_uncovered", "0..1", r.max_uncovered)
    if r.top_k < 0 or r.top_k == 1:
        raise _out_of_range("top_k", "0 (all), or 2 and more", r.top_k)
    if r.top_p < 1 and not r.top_k and r.keep_sampling_mask:
        raise ConfigError(
            "SGLang returns a sampling mask only for requests with a finite top_k",
            expected="--top-k N beside --top-p (up to the server's --sampling-mask-max-tokens, "
            "4096 unless told)",
            got=f"--top-p {r.top_p} alone",
            fix="Add --top-k 4096, or --no-keep-sampling-mask to train on biased log-probs",
        )


def check_machines(config: RecipeConfig) -> None:
    """Raise ConfigError for servers that this machine does not launch, or devices on Ray."""
    run, rollout = config.run, config.rollout
    if rollout.num_servers < 1:
        raise _out_of_range("num_servers", "above 0", rollout.num_servers)
    if rollout.num_servers > 1 and (rollout.rollout_url or not run.ray):
        raise ConfigError(
            "the launcher starts one server on this machine",
            expected="--num-servers 1, or --ray with the address of a cluster",
            got=f"--num-servers {rollout.num_servers}"
            + (f" beside {len(rollout.rollout_url)} of --rollout-url" * bool(rollout.rollout_url)),
        )
    chosen = {
        "--rollout-gpus": rollout.rollout_gpus,
        "--trainer-gpus": run.trainer_gpus,
        "--server-port": rollout.server_port,
    }
    if run.ray and any(chosen.values()):
        raise ConfigError(
            "Ray chooses the devices and ports of a run",
            expected=f"none of {', '.join(chosen)} beside --ray",
            got=", ".join(f"{flag} {value}" for flag, value in chosen.items() if value),
        )


def check_publish(config: RecipeConfig) -> None:
    """Raise ConfigError for weights that could not reach the servers in buckets."""
    r = config.rollout
    for name in ("publish_bucket_mb", "publish_timeout_s"):
        if getattr(r, name) <= 0:
            raise _out_of_range(name, "above 0", getattr(r, name))
    if r.publish == "disk":
        return
    if config.training.weights == "bridge":
        raise ConfigError(
            "Megatron-Bridge's converter gathers whole tensors on one rank only",
            expected=f"weights: own beside publish: {r.publish}",
            got="weights: bridge",
            fix="Choose --weights own, or --publish disk",
        )
    if r.publish == "buckets":
        require_reachable(r.rollout_url, config.run.nnodes)
    elif config.run.nnodes > 1:
        raise ConfigError(
            "weights as shared tensors need the trainer and the servers on one machine",
            expected="nnodes 1 beside publish: tensors",
            got=f"nnodes {config.run.nnodes}",
            fix="Choose --publish buckets",
        )


def check_objective(config: RecipeConfig) -> None:
    """Raise ConfigError for an objective that needs what this recipe does not have."""
    o, objective = config.objective, config.make_objective()
    if "topk_ids_TK" in objective.needs and o.topk_logprobs < 1:
        raise _out_of_range("topk_logprobs", ">= 1", o.topk_logprobs)
    _check_range("overlong_cache", o.overlong_cache, config.rollout.max_new_tokens)
    _check_range("dynamic_sampling", config.data.dynamic_sampling)
    for name in ("reward_kl_coefficient", "smoothing_correct", "smoothing_wrong", "internal_steps"):
        _check_range(name, getattr(o, name))
    if o.internal_layer >= 0:
        _check_internal(config, objective)


def check_ahead(config: RecipeConfig) -> None:
    """Raise ConfigError for rollouts of older weights that nothing would correct."""
    rollout, objective = config.rollout, config.make_objective()
    _check_range("ahead", rollout.ahead)
    if rollout.max_version_lag < -1:
        raise _out_of_range("max_version_lag", ">= 0, or -1", rollout.max_version_lag)
    if rollout.ahead and not objective.parameters.needs_mu:
        raise ConfigError(
            f"objective {objective.name!r} with these parameters does not look at mu, and what is "
            "sampled ahead is not of pi_old",
            expected="an objective with m or w (minirl, minirl_decoupled, icepop, dppo), or a "
            "correction",
            got=f"--ahead {rollout.ahead}",
            fix="Add --objective-parameters correction=tis-token, or --ahead 0",
        )
    if rollout.ahead > 1:
        _check_pool(config)
    if rollout.ahead > config.max_version_lag and config.training.plan != "none":
        raise ConfigError(
            "a step is planned by routes that are not replayed",
            expected=f"--max-version-lag of at least {rollout.ahead}, or --plan none",
            got=f"--max-version-lag {rollout.max_version_lag}, --plan {config.training.plan}",
        )


def _check_pool(config: RecipeConfig) -> None:
    """Raise ConfigError for what rollouts of several steps at once cannot do."""
    rollout = config.rollout
    if rollout.publish_pause == "wait":
        raise ConfigError(
            "rollouts of several steps do not end between two steps",
            expected="--publish-pause retract (or in_place), or --ahead 1",
            got=f"--publish-pause wait, --ahead {rollout.ahead}",
        )
    if config.data.dynamic_sampling:
        raise ConfigError(
            "dynamic sampling tells only at a step's end which prompts the next step begins with",
            expected="--ahead of at most 1, or --dynamic-sampling 0",
            got=f"--ahead {rollout.ahead}, --dynamic-sampling {config.data.dynamic_sampling}",
        )


def check_replay(config: RecipeConfig) -> None:
    """Raise ConfigError for a replay that needs more than the servers capture."""
    may_replay = config.replay.mode in ("R3", "auto")
    has_weights = config.telemetry.capture in ("weights", "logits")
    if may_replay and config.replay.replays_weights and not has_weights:
        raise ConfigError(
            "the servers are not asked for the weights that are replayed",
            expected="--routing-replay-capture weights",
            got=f"{config.telemetry.capture}, and --routing-replay-weights {config.replay.weights}",
        )
    if config.training.weights == "bridge" and config.training.plan in ("placement", "both"):
        raise ConfigError(
            "Megatron-Bridge's converter does not know of experts on other ranks than their own",
            expected="weights: own, or a plan without placement",
            got=f"weights: bridge, plan: {config.training.plan}",
        )


def check_balance(config: RecipeConfig) -> None:
    """Raise ConfigError for a plan of routes that are not known, or that do not decide alone."""
    t, replay = config.training, config.replay
    _check_range("placement_move_tokens", t.placement_move_tokens)
    if t.placement_horizon < 1:
        raise _out_of_range("placement_horizon", ">= 1", t.placement_horizon)
    if t.plan == "none":
        return
    plan_layout(t, config.world_size)
    if replay.mode not in ("R3", "auto") or replay.is_soft or replay.captured_routers:
        raise ConfigError(
            "a step can be planned only by routes that are known and replayed as they are",
            expected="--routing-replay-mode R3, without soft replay and captured routers",
            got=f"{replay.mode}, soft replay {replay.is_soft}, captured routers "
            f"{replay.captured_routers}",
            fix="Add --routing-replay-mode R3, or --plan none",
        )


def _out_of_range(name: str, expected: str, value: float) -> ConfigError:
    return ConfigError(f"the setting {name!r} is out of range", expected=expected, got=value)


def _check_range(name: str, value: float, most: int | None = None) -> None:
    if value < 0 or (most is not None and value > most):
        expected = ">= 0" if most is None else f"0..{most}, the longest response"
        raise _out_of_range(name, expected, value)


def _check_internal(config: RecipeConfig, objective: objectives.Objective) -> None:
    """BuPO: an inner layer's policy has no mu and no reference, and its layer is on one stage."""
    p = objective.parameters
    if p.needs_mu or p.kl_coefficient or objective.needs:
        raise ConfigError(
            f"objective {objective.name!r} with these parameters compares more than pi_theta and "
            "pi_old, which is all that an inner layer's policy has",
            expected="grpo, dapo, gspo and the like, without correction and KL",
            fix="Choose such an objective, or --internal-layer -1",
        )
    if config.training.pipeline_parallel > 1 or config.training.recompute == "full":
        raise ConfigError(
            "the policy of an inner layer needs that layer and the output layer in one forward",
            expected="pipeline_parallel 1, and recompute none or moe",
            got=f"{config.training.pipeline_parallel} and {config.training.recompute}",
        )


def check_sizes(config: RecipeConfig) -> None:
    """Raise ConfigError for sizes that are not positive or do not divide each other."""
    t = config.training
    positive = {
        "steps": config.run.steps,
        "nproc": config.run.nproc,
        "nnodes": config.run.nnodes,
        "prompts_per_step": config.data.prompts_per_step,
        "samples_per_prompt": config.data.samples_per_prompt,
        "minibatch_size": t.minibatch_size,
        "microbatch_size": t.microbatch_size,
        "logprob_passes": t.logprob_passes,
        "max_new_tokens": config.rollout.max_new_tokens,
    }
    for name, value in positive.items():
        if value <= 0:
            raise _out_of_range(name, "above 0", value)
    if bool(config.data.prompts) != bool(config.data.heldout_prompts):
        raise ConfigError(
            "only one of prompts and heldout_prompts is set",
            expected="both or none",
            got=f"prompts={config.data.prompts!r}, heldout_prompts={config.data.heldout_prompts!r}",
        )
    if config.model.model != "tiny" and not config.data.prompts:
        raise ConfigError(
            "the model has no prompts", expected="--prompts and --heldout-prompts", got="none"
        )
    if config.batch_size % t.minibatch_size:
        raise ConfigError(
            "minibatch_size must divide prompts_per_step * samples_per_prompt",
            expected=f"a divisor of {config.batch_size}",
            got=t.minibatch_size,
        )
    for name in ("microbatch_tokens", "first_stage_layers", "last_stage_layers"):
        _check_range(name, getattr(t, name))
    model_ranks = t.tensor_parallel * t.pipeline_parallel * t.context_parallel
    if config.world_size % model_ranks:
        raise ConfigError(
            "tensor_parallel * pipeline_parallel * context_parallel must divide nnodes * nproc",
            expected=f"a multiple of {model_ranks}",
            got=config.world_size,
        )
    data_ranks = config.world_size // model_ranks
    share, rest = divmod(t.minibatch_size, data_ranks)
    if rest or (not t.microbatch_tokens and share % min(share, t.microbatch_size)):
        raise ConfigError(
            "microbatch_size times the data-parallel ranks must divide minibatch_size",
            expected=f"a divisor of {t.minibatch_size}",
            got=f"{t.microbatch_size} * {data_ranks}",
        )


def check_interleaving(config: RecipeConfig) -> None:
    """Raise ConfigError for microbatches that Megatron's interleaved schedule cannot run."""
    t = config.training
    if t.virtual_pipeline == 1 or t.pipeline_parallel == 1:  # the layout refuses the latter
        return
    if t.microbatch_tokens:
        raise ConfigError(
            "packed microbatches cannot be interleaved: their number differs from batch to batch",
            expected="virtual_pipeline 1 beside microbatch_tokens",
            got=f"virtual_pipeline {t.virtual_pipeline}",
        )
    model_ranks = t.tensor_parallel * t.pipeline_parallel * t.context_parallel
    share = t.minibatch_size * model_ranks // config.world_size
    num_microbatches = share // min(share, t.microbatch_size)
    if num_microbatches % t.pipeline_parallel:
        raise ConfigError(
            "the interleaved schedule needs whole rounds of microbatches",
            expected=f"a multiple of pipeline_parallel {t.pipeline_parallel} per minibatch",
            got=f"{num_microbatches} microbatches on each data-parallel rank",
            fix="Change microbatch_size, or set virtual_pipeline: 1",
        )


def check_plan(config: RecipeConfig) -> None:
    """Raise ConfigError for machines or rates that cannot be."""
    p = config.plan
    rates = ("plan_trainer_tflops", "plan_rollout_tokens_per_s")
    speeds = ("plan_disk_gb_per_s", "plan_network_gb_per_s")
    for name in ("plan_gpus_per_node", *rates, *speeds):
        if getattr(p, name) <= 0:
            raise _out_of_range(name, "above 0", getattr(p, name))
    for name in ("plan_gpu_gb", "plan_server_nodes", "plan_prompt_tokens", "plan_response_tokens"):
        _check_range(name, getattr(p, name))
    if p.plan_gpu_gb and config.run.nproc > p.plan_gpus_per_node:
        raise ConfigError(
            "a machine has fewer GPUs than trainer processes",
            expected=f"--nproc of at most {p.plan_gpus_per_node} (--plan-gpus-per-node)",
            got=config.run.nproc,
        )


def require_ready(config: RecipeConfig, world_size: int, where: Path) -> None:
    """Refuse a stored configuration that would not train as its author meant.

    Args:
        config: The trainer's configuration.
        world_size: Ranks that torchrun has started.
        where: The file that the configuration comes from.

    Raises:
        ConfigError: The mode of routing replay is still `auto`, or the number of ranks differs.
    """
    fix = "Write it with `python -m recipes.minirl --prepare-only --run-dir DIR ...`"
    if config.replay.mode == "auto":
        raise ConfigError(
            "the mode of routing replay is not resolved",
            expected="disabled, R2 or R3",
            got="auto",
            where=where,
            fix=fix,
        )
    if world_size != config.world_size:
        raise ConfigError(
            "the number of ranks differs from the configuration",
            expected=f"nnodes * nproc = {config.run.nnodes} * {config.run.nproc}",
            got=f"{world_size} from torchrun",
            where=where,
            fix=fix,
        )
