"""Configuration: a preset, a YAML file and flags, all with the same keys."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import yaml

from routing_replay import objectives
from routing_replay.config import FLAG_PREFIX, ReplayConfig, read_yaml, setting, unknown_name
from routing_replay.errors import ConfigError

PRESETS = Path(__file__).parent / "presets"


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """run: how long, where, and from which state"""

    run_dir: str = setting("", "folder of the run; runs/<preset>-<time> if empty")
    resume: bool = setting(False, "continue the run in --run-dir from its newest checkpoint")
    steps: int = setting(40, "training steps (each: one rollout batch)")
    seed: int = setting(0, "seed of the data order, the tiny model and its warm-up")
    nproc: int = setting(1, "trainer processes on this machine")
    checkpoint_every: int = setting(10, "steps between checkpoints; 0: at the end only")
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
    tiny_layers: int = setting(4, "layers of the tiny model")
    tiny_experts: int = setting(16, "experts per layer of the tiny model")
    tiny_top_k: int = setting(2, "experts per token of the tiny model")
    warmup_target: float = setting(
        0.3, "supervised warm-up of the tiny model ends at this sampled accuracy; 0: no warm-up"
    )
    warmup_steps: int = setting(400, "most supervised steps")


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
    request_timeout_s: float = setting(600.0, "longest wait for one batch of responses")


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """training: updates in Megatron"""

    minibatch_size: int = setting(128, "responses per update; N = batch / minibatch")
    microbatch_size: int = setting(64, "responses per forward pass on one rank")
    learning_rate: float = setting(3e-4, "constant learning rate of AdamW")
    adam_beta2: float = setting(0.99, "second-moment decay of AdamW")
    weight_decay: float = setting(0.0, "of AdamW")
    clip_grad: float = setting(1.0, "largest gradient norm; 0: no clipping")
    trainer_dtype: str = setting("float32", "of the trainer", ("float32", "bfloat16"))
    tensor_parallel: int = setting(1, "ranks that share each matrix")
    pipeline_parallel: int = setting(1, "pipeline stages")
    virtual_pipeline: int = setting(1, "model chunks per pipeline stage")
    expert_parallel: int = setting(1, "ranks that share the experts")
    context_parallel: int = setting(1, "ranks that share each sequence")
    recompute: str = setting("none", "activation recomputation", ("none", "moe", "full"))
    distributed_optimizer: bool = setting(False, "shard the optimizer state over data parallelism")


@dataclass(frozen=True, kw_only=True)
class ObjectiveSettings:
    """objective: the loss"""

    objective: str = setting("minirl", "name of the loss", tuple(objectives.names()))
    objective_parameters: tuple[str, ...] = setting(
        (), "parameters of the loss as name=value; see `routing-replay objectives`"
    )


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

    def __post_init__(self):
        _check_sizes(self)
        self.make_objective()

    @property
    def batch_size(self) -> int:
        """Responses per step."""
        return self.data.prompts_per_step * self.data.samples_per_prompt

    @property
    def num_mini_batches(self) -> int:
        """N: updates per step."""
        return self.batch_size // self.training.minibatch_size

    def make_objective(self) -> objectives.Objective:
        """The loss with its parameters."""
        pairs = [_name_and_value(text) for text in self.objective.objective_parameters]
        return objectives.get(self.objective.objective, **dict(pairs))

    def to_mapping(self) -> dict:
        """Flat keys, as a YAML file would hold them."""
        flat = {}
        for section in fields(self):
            values = asdict(getattr(self, section.name))
            prefix = FLAG_PREFIX if section.name == "replay" else ""
            flat |= {prefix + name: value for name, value in values.items()}
        return flat

    @classmethod
    def from_mapping(cls, values: Mapping, where=None) -> RecipeConfig:
        """From flat keys; `-` and `_` alike.

        Raises:
            ConfigError: An unknown key (the nearest is named) or a value of the wrong kind.
        """
        known = known_settings()
        sections: dict[str, dict] = {section.name: {} for section in fields(cls)}
        for key, value in values.items():
            name = str(key).replace("-", "_")
            if name not in known:
                raise unknown_name("setting", key, sorted(known))
            section, plain, default = known[name]
            sections[section][plain] = _of_kind(name, default, value, where)
        return cls(**{name: SECTIONS[name](**given) for name, given in sections.items()})


SECTIONS = {
    "run": RunSettings,
    "model": ModelSettings,
    "data": DataSettings,
    "rollout": RolloutSettings,
    "training": TrainingSettings,
    "objective": ObjectiveSettings,
    "replay": ReplayConfig,
}


def known_settings() -> dict[str, tuple[str, str, object]]:
    """Every key with its section, its name there, and its default."""
    return {
        (FLAG_PREFIX if section == "replay" else "") + f.name: (section, f.name, f.default)
        for section, kind in SECTIONS.items()
        for f in fields(kind)
    }


def parse(argv: Sequence[str] | None = None) -> RecipeConfig:
    """The configuration of a command line: preset, then --config, then flags.

    A resumed run starts from its own configuration instead of a preset.

    Raises:
        ConfigError: An unknown flag, key or preset, or values that cannot work.
    """
    parser = make_parser()
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        flags = [flag for action in parser._actions for flag in action.option_strings]
        raise unknown_name("flag", unknown[0].split("=")[0], flags)
    flags = {k: v for k, v in vars(arguments).items() if v is not None}
    preset, files = flags.pop("preset", None), []
    if flags.get("resume"):
        files.append(_stored(flags.get("run_dir"), preset))
    else:
        files.append(_preset(preset or "tiny_cpu"))
    for extra in (flags.pop("routing_replay_config", None), flags.pop("config", None)):
        files += [Path(extra)] if extra else []
    values = {}
    for path in files:
        content = json.loads(path.read_text()) if path.suffix == ".json" else read_yaml(path)
        content = _with_prefix(content) if str(path) == arguments.routing_replay_config else content
        RecipeConfig.from_mapping({**values, **content}, where=path)
        values |= {str(key).replace("-", "_"): value for key, value in content.items()}
    return RecipeConfig.from_mapping(values | flags)


def make_parser() -> argparse.ArgumentParser:
    """One flag per key; a flag that is not given is None."""
    parser = argparse.ArgumentParser(
        prog="python -m recipes.minirl",
        usage="%(prog)s [--preset NAME] [--config FILE.yaml] [FLAGS]",
        description="Reinforcement learning of a Mixture-of-Experts model: SGLang rollouts that "
        "return expert routes, updates in Megatron that replay them.",
        epilog="Every flag is also a key of the YAML file, with _ for -. Without flags the preset "
        f"tiny_cpu trains a tiny model on this machine. Presets: {', '.join(preset_names())}.",
        allow_abbrev=False,
    )
    parser.add_argument("--preset", metavar="NAME", help="a preset or the path of one (tiny_cpu)")
    parser.add_argument("--config", metavar="FILE.yaml", help="settings on top of the preset")
    parser.add_argument(
        "--routing-replay-config", metavar="FILE.yaml", help="settings of routing replay alone"
    )
    for name, kind in SECTIONS.items():
        title = "routing replay" if name == "replay" else kind.__doc__.strip()
        group = parser.add_argument_group(title)
        for f in fields(kind):
            _add_flag(group, (FLAG_PREFIX if name == "replay" else "") + f.name, f)
    return parser


def preset_names() -> list[str]:
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def _add_flag(group, name, f):
    flag = "--" + name.replace("_", "-")
    default = " ".join(f.default) if isinstance(f.default, tuple) else f.default
    shown = "" if default == "" else f" (default: {default})"
    help_text = (f.metadata["help"] + shown).replace("%", "%%")
    if isinstance(f.default, bool):
        action = argparse.BooleanOptionalAction
        group.add_argument(flag, action=action, default=None, help=help_text)
    elif isinstance(f.default, tuple):
        group.add_argument(flag, nargs="*", metavar="TEXT", help=help_text)
    else:
        kind, choices = type(f.default), f.metadata["choices"]
        metavar = None if choices else kind.__name__.upper()
        group.add_argument(flag, type=kind, choices=choices, metavar=metavar, help=help_text)


def _preset(name: str) -> Path:
    path = Path(name)
    if path.suffix in (".yaml", ".yml") and path.is_file():
        return path
    if name not in preset_names():
        raise unknown_name("preset", name, preset_names())
    return PRESETS / f"{name}.yaml"


def _stored(run_dir: str | None, preset: str | None) -> Path:
    if not run_dir or preset:
        raise ConfigError(
            "--resume continues a run with that run's configuration",
            expected="--run-dir and no --preset",
            got=f"--run-dir {run_dir}, --preset {preset}",
        )
    path = Path(run_dir) / "config.json"
    if not path.is_file():
        raise ConfigError(
            "there is no run to resume", expected="a config.json in it", where=run_dir
        )
    return path


def _with_prefix(content: dict) -> dict:
    return {
        FLAG_PREFIX + str(key).replace("-", "_").removeprefix(FLAG_PREFIX): value
        for key, value in content.items()
    }


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
        "temperature": config.rollout.temperature,
    }
    for name, value in positive.items():
        if value <= 0:
            raise ConfigError(f"the setting {name!r}", expected="above 0", got=value)
    if bool(config.data.prompts) != bool(config.data.heldout_prompts):
        raise ConfigError(
            "prompts and heldout_prompts go together",
            got=f"prompts={config.data.prompts!r}, heldout_prompts={config.data.heldout_prompts!r}",
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
    per_rank, rest = divmod(t.minibatch_size, nproc // model_ranks)
    if rest or per_rank % t.microbatch_size:
        raise ConfigError(
            "microbatch_size times the data-parallel ranks must divide minibatch_size",
            expected=f"a divisor of {t.minibatch_size}",
            got=f"{t.microbatch_size} * {nproc // model_ranks}",
        )
