"""The settings of the recipe; presets, YAML files and flags share these keys."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields

import yaml

from routing_replay import objectives
from routing_replay.config import FLAG_PREFIX, ReplayConfig, setting, unknown_name
from routing_replay.errors import ConfigError
from routing_replay.metrics.sinks import SINKS


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """run: how long, where, and from which state"""

    run_dir: str = setting("", "folder of the run; runs/minirl-<time> if empty")
    resume: bool = setting(False, "continue the run in --run-dir from its newest checkpoint")
    steps: int = setting(40, "training steps (each: one rollout batch)")
    seed: int = setting(0, "seed of the data order, the tiny model and its warm-up")
    nproc: int = setting(1, "trainer processes on this machine")
    cpu_threads: int = setting(
        0, "threads of each trainer rank and launched server; 0: the cores shared evenly"
    )
    checkpoint_every: int = setting(10, "steps between checkpoints; 0: at the end only")
    measure_live_every: int = setting(
        1, "steps between extra old-policy passes without replay (metrics _live); 0: at the end"
    )
    keep_checkpoints: int = setting(2, "newest checkpoints that are kept")
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
    rollout_dtype: str = setting("bfloat16", "dtype of a launched server")
    rollout_weights: str = setting(
        "checkpoint",
        "fp8-grid: EMULATED FP8, the projection weights that the server receives are rounded to "
        "the e4m3 grid with a scale per row",
        ("checkpoint", "fp8-grid"),
    )
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
    request_timeout_s: float = setting(600.0, "longest wait for one batch of responses")


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """training: updates in Megatron"""

    minibatch_size: int = setting(128, "responses per update; N = batch / minibatch")
    microbatch_size: int = setting(64, "most responses per forward pass on one rank")
    learning_rate: float = setting(3e-4, "constant learning rate of AdamW")
    adam_beta2: float = setting(0.99, "second-moment decay of AdamW")
    adam_eps: float = setting(1e-8, "added to the root of the second moment of AdamW")
    weight_decay: float = setting(0.0, "of AdamW")
    clip_grad: float = setting(1.0, "largest gradient norm; 0: no clipping")
    trainer_dtype: str = setting("float32", "of the trainer", ("float32", "bfloat16"))
    tensor_parallel: int = setting(1, "ranks that share each matrix")
    pipeline_parallel: int = setting(1, "pipeline stages")
    virtual_pipeline: int = setting(1, "model chunks per pipeline stage")
    expert_parallel: int = setting(1, "ranks that share the experts")
    context_parallel: int = setting(1, "ranks that share each sequence")
    recompute: str = setting("none", "activation recomputation", ("none", "moe", "full"))
    layer_spec: str = setting(
        "auto", "modules of the layers; local is slow on GPUs", ("auto", "te", "local")
    )
    distributed_optimizer: bool = setting(False, "shard the optimizer state over data parallelism")


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
        "what the rollout engine returns per token and layer: expert ids; ids and gate "
        "probabilities; these and the full router logits of a sample of tokens",
        ("ids", "gates", "logits"),
    )
    sinks: tuple[str, ...] = setting(
        ("jsonl", "tensorboard"), f"where metrics go, of {', '.join(SINKS)}", SINKS
    )
    metrics_dir: str = setting("", "not in this recipe: a run's metrics lie in --run-dir")

    def __post_init__(self) -> None:
        known = {f.name: f.metadata["choices"] for f in fields(self)}
        for name, values in (("capture", (self.capture,)), ("sinks", self.sinks)):
            for value in values:
                if value not in known[name]:
                    raise unknown_name(f"{name} of routing replay", value, known[name])


@dataclass(frozen=True, kw_only=True)
class RecipeConfig:
    """The resolved configuration; every key exists once over all sections.

    Raises:
        ConfigError: Values that cannot work together.
    """

    run: RunSettings = field(default_factory=RunSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    data: DataSettings = field(default_factory=DataSettings)
    rollout: RolloutSettings = field(default_factory=RolloutSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)
    objective: ObjectiveSettings = field(default_factory=ObjectiveSettings)
    replay: ReplayConfig = field(default_factory=ReplayConfig)
    telemetry: TelemetrySettings = field(default_factory=TelemetrySettings)

    def __post_init__(self):
        _check_sizes(self)
        check_sampling(self)
        check_objective(self)

    @property
    def batch_size(self) -> int:
        """Responses per step."""
        return self.data.prompts_per_step * self.data.samples_per_prompt

    @property
    def num_mini_batches(self) -> int:
        """N: updates per step."""
        return self.batch_size // self.training.minibatch_size

    @property
    def has_sampling_mask(self) -> bool:
        """Whether all policies are restricted to what top-p and top-k left."""
        r = self.rollout
        return r.keep_sampling_mask and (r.top_p < 1 or r.top_k > 0)

    @property
    def needs_reference(self) -> bool:
        """Whether a frozen reference is part of the reward or of the loss."""
        in_loss = "logp_ref_T" in self.make_objective().needs
        return in_loss or self.objective.reward_kl_coefficient > 0

    @property
    def num_top_logprobs(self) -> int:
        """How many of mu's most likely tokens come back per position."""
        is_needed = "topk_ids_TK" in self.make_objective().needs
        return self.objective.topk_logprobs if is_needed else 0

    @property
    def rollout_capture(self) -> str:
        """What training rollouts bring back of the routes: only R3 replays them."""
        return self.telemetry.capture if self.replay.mode in ("R3", "auto") else "off"

    def make_objective(self) -> objectives.Objective:
        """The loss with its parameters."""
        pairs = [_name_and_value(text) for text in self.objective.objective_parameters]
        return objectives.get(self.objective.objective, **dict(pairs))

    def to_mapping(self) -> dict:
        """Flat keys, as a YAML file would hold them."""
        flat = {}
        for section in fields(self):
            values = asdict(getattr(self, section.name))
            flat |= {key_of(section.name, name): value for name, value in values.items()}
        return flat

    @classmethod
    def from_mapping(cls, values: Mapping, where=None) -> RecipeConfig:
        """From flat keys; `-` and `_` alike.

        Raises:
            ConfigError: An unknown key (the nearest is named) or a value of the wrong kind.
        """
        sections = cls.check_keys(values, where)
        return cls(**{name: SECTIONS[name](**given) for name, given in sections.items()})

    @classmethod
    def check_keys(cls, values: Mapping, where=None) -> dict[str, dict]:
        """The values by section and plain name, each of its setting's kind."""
        known = known_settings()
        sections: dict[str, dict] = {name: {} for name in SECTIONS}
        for key, value in values.items():
            name = str(key).replace("-", "_")
            if name not in known:
                raise unknown("setting", key, known, where)
            section, plain, default = known[name]
            sections[section][plain] = _of_kind(name, default, value, where)
        return sections


SECTIONS = {
    "run": RunSettings,
    "model": ModelSettings,
    "data": DataSettings,
    "rollout": RolloutSettings,
    "training": TrainingSettings,
    "objective": ObjectiveSettings,
    "replay": ReplayConfig,
    "telemetry": TelemetrySettings,
}


def key_of(section: str, name: str) -> str:
    """The flat key of a section's setting: those of routing replay carry its prefix."""
    return (FLAG_PREFIX if section in ("replay", "telemetry") else "") + name


def known_settings() -> dict[str, tuple[str, str, object]]:
    """Every key with its section, its name there, and its default."""
    return {
        key_of(section, f.name): (section, f.name, f.default)
        for section, kind in SECTIONS.items()
        for f in fields(kind)
    }


def unknown(kind: str, name, known, where=None) -> ConfigError:
    """The error for a name that does not exist; there are too many to list them all."""
    # cutoff 0: a poor suggestion is still better than none.
    nearest = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.0)[0]
    return ConfigError(
        f"unknown {kind} {name!r}",
        where=where,
        fix=f"Did you mean {nearest!r}? `python -m recipes.minirl --help` lists all",
    )


def _of_kind(name, default, value, where):
    """The value as the default's type: YAML reads 1e-4 as text and [a] as a list."""
    if isinstance(default, tuple):
        if isinstance(value, Mapping):
            value = [f"{key}={json.dumps(inner)}" for key, inner in value.items()]
        value = [value] if isinstance(value, str) else value
        if isinstance(value, (list, tuple)):
            return tuple(str(item) for item in value)
    elif isinstance(default, float) and not isinstance(value, bool):
        try:
            return float(value)
        except (TypeError, ValueError):
            pass
    elif type(value) is type(default):
        return value
    raise ConfigError(
        f"the setting {name!r}", expected=type(default).__name__, got=repr(value), where=where
    )


def _name_and_value(text: str) -> tuple[str, object]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ConfigError("a parameter of the objective", expected="name=value", got=repr(text))
    value = yaml.safe_load(value)
    # YAML 1.1 reads 1e-4 as text.
    try:
        return name, float(value) if isinstance(value, str) else value
    except ValueError:
        return name, value


def check_sampling(config: RecipeConfig) -> None:
    """Raise ConfigError for a sampling that the trainer could not score."""
    r, temperature = config.rollout, config.rollout.temperature
    if temperature <= 0:
        raise ConfigError("the setting 'temperature'", expected="above 0", got=temperature)
    if not 0 < r.top_p <= 1:
        raise ConfigError("the setting 'top_p'", expected="above 0, at most 1", got=r.top_p)
    if r.top_k < 0 or r.top_k == 1:
        raise ConfigError("the setting 'top_k'", expected="0 (all), or 2 and more", got=r.top_k)
    if r.top_p < 1 and not r.top_k and r.keep_sampling_mask:
        raise ConfigError(
            "SGLang returns a sampling mask only for requests with a finite top_k",
            expected="--top-k N beside --top-p (up to the server's --sampling-mask-max-tokens, "
            "4096 unless told)",
            got=f"--top-p {r.top_p} alone",
            fix="Add --top-k 4096, or --no-keep-sampling-mask to train on biased log-probs",
        )


def check_objective(config: RecipeConfig) -> None:
    """Raise ConfigError for an objective that needs what this recipe does not have."""
    o, objective = config.objective, config.make_objective()
    if "topk_ids_TK" in objective.needs and o.topk_logprobs < 1:
        raise ConfigError("the setting 'topk_logprobs'", expected=">= 1", got=o.topk_logprobs)
    limits = {"overlong_cache": (o.overlong_cache, config.rollout.max_new_tokens)}
    limits["dynamic_sampling"] = (config.data.dynamic_sampling, None)
    for name in ("reward_kl_coefficient", "smoothing_correct", "smoothing_wrong", "internal_steps"):
        limits[name] = (getattr(o, name), None)
    for name, (value, most) in limits.items():
        if value < 0 or (most is not None and value > most):
            expected = ">= 0" if most is None else f"0..{most}, the longest response"
            raise ConfigError(f"the setting {name!r}", expected=expected, got=value)
    if o.reward_kl_estimator not in ("k1", "k2", "k3"):
        got = repr(o.reward_kl_estimator)
        raise ConfigError("the setting 'reward_kl_estimator'", expected="k1, k2 or k3", got=got)
    if o.internal_layer >= 0:
        _check_internal(config, objective)


def _check_internal(config: RecipeConfig, objective: objectives.Objective) -> None:
    """BuPO: an inner layer's policy has no mu and no reference, and its layer is on one stage."""
    p = objective.parameters
    looks_at_m = ("geometric_low", "geometric_high", "sequence_k3_max", "veto_below")
    looks_elsewhere = p.has_m or p.correction != "none" or p.off_policy_delta is not None
    looks_elsewhere |= any(getattr(p, name) is not None for name in looks_at_m)
    if looks_elsewhere or p.kl_coefficient or objective.needs:
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


def _check_sizes(config: RecipeConfig) -> None:
    t, nproc = config.training, config.run.nproc
    positive = {
        "steps": config.run.steps,
        "nproc": nproc,
        "prompts_per_step": config.data.prompts_per_step,
        "samples_per_prompt": config.data.samples_per_prompt,
        "minibatch_size": t.minibatch_size,
        "microbatch_size": t.microbatch_size,
        "max_new_tokens": config.rollout.max_new_tokens,
    }
    for name, value in positive.items():
        if value <= 0:
            raise ConfigError(f"the setting {name!r}", expected="above 0", got=value)
    if bool(config.data.prompts) != bool(config.data.heldout_prompts):
        raise ConfigError(
            "prompts and heldout_prompts go together",
            got=f"prompts={config.data.prompts!r}, heldout_prompts={config.data.heldout_prompts!r}",
        )
    if config.model.model != "tiny" and not config.data.prompts:
        raise ConfigError(
            "a model needs prompts", expected="--prompts and --heldout-prompts", got="none"
        )
    if config.batch_size % t.minibatch_size:
        raise ConfigError(
            "minibatch_size must divide prompts_per_step * samples_per_prompt",
            expected=f"a divisor of {config.batch_size}",
            got=t.minibatch_size,
        )
    model_ranks = t.tensor_parallel * t.pipeline_parallel * t.context_parallel
    if nproc % model_ranks:
        raise ConfigError(
            "tensor_parallel * pipeline_parallel * context_parallel must divide nproc",
            expected=f"a multiple of {model_ranks}",
            got=nproc,
        )
    share, rest = divmod(t.minibatch_size, nproc // model_ranks)
    if rest or share % min(share, t.microbatch_size):
        raise ConfigError(
            "microbatch_size times the data-parallel ranks must divide minibatch_size",
            expected=f"a divisor of {t.minibatch_size}",
            got=f"{t.microbatch_size} * {nproc // model_ranks}",
        )
