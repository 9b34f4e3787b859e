"""What each adapter relies on in its framework: one list for adapters, doctor and contract tests.

Sources are read as text: no framework is imported, so nothing of its GPU libraries is needed.
"""

from __future__ import annotations

import ast
import importlib.machinery
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import PreflightError, unknown_name


@dataclass(frozen=True, kw_only=True)
class Seam:
    """A name of a framework that an adapter replaces, calls, or is called by.

    Args:
        module: The module that binds the name.
        name: A function, a `Class.method`, or a name that the module imports.
        parameters: What the function must take by name; none if only the name counts.
    """

    module: str
    name: str
    parameters: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(frozen=True, kw_only=True)
class Switch:
    """A setting of a job that an adapter needs, or that contradicts it.

    Args:
        setting: A flag (`--name`), a dotted key, or an environment variable (capitals).
        value: The value that is needed or wrong; "" stands for any, and for a flag without one.
        is_needed: False: wrong with this value.
        cause: What happens otherwise.
    """

    setting: str
    value: str = ""
    is_needed: bool = True
    cause: str

    def __str__(self) -> str:
        joint = " " if self.setting.startswith("--") else "="
        return self.setting + (joint + self.value if self.value else "")


@dataclass(frozen=True, kw_only=True)
class Framework:
    """What an adapter was written against.

    Args:
        package: The top-level package.
        distribution: Its name on the package index; "" if it has none.
        tested: Version, or commit and date, that the tests ran on.
        seams: Names that must be there.
        switches: Settings of a job.
    """

    package: str
    distribution: str = ""
    tested: str
    seams: tuple[Seam, ...]
    switches: tuple[Switch, ...] = ()


RAY_HOOK = Switch(
    setting="RAY_RUNTIME_ENV_HOOK",
    value="routing_replay.adapters.ray.runtime_env_hook",
    cause="Without it no worker process is patched, and the framework's own replay runs",
)


def _slime(package: str, *, get_batch: Seam, logger: str, tested: str) -> Framework:
    """slime and its fork miles: the same seams, module by module."""
    model = f"{package}.backends.megatron_utils.model"
    return Framework(
        package=package,
        tested=tested,
        seams=(
            get_batch,
            Seam(module=model, name="get_batch"),
            Seam(module=model, name="get_forward_backward_func"),
            Seam(
                module=model,
                name="forward_only",
                parameters=("model", "data_iterator", "store_prefix"),
            ),
            Seam(module=f"{package}.backends.megatron_utils.actor", name="forward_only"),
            Seam(module=f"{package}.backends.megatron_utils.initialize", name="init"),
            Seam(module=logger, name="log", parameters=("args", "metrics", "step_key")),
        ),
        switches=(
            Switch(
                setting="--custom-megatron-init-path",
                value="routing_replay.adapters.slime.init",
                cause="Nothing loads the adapter",
            ),
            Switch(
                setting="--use-rollout-routing-replay",
                cause="It makes the rollout return routes; the adapter takes them over (R3)",
            ),
        ),
    )


MEGATRON_LOOP = "megatron.training.training"
VERL_ENGINE = "verl.workers.engine.megatron.transformer_impl"
SKYRL_WRAPPER = "skyrl.backends.skyrl_train.workers.megatron.megatron_model_wrapper"
SKYRL_REPLAY = "skyrl.backends.skyrl_train.utils.replay_utils"
BRIDGE = "megatron.bridge.training"
NEMO_TRAIN = "nemo_rl.models.megatron.train"
FRAMEWORKS = {
    "megatron-lm": Framework(
        package="megatron",
        distribution="megatron-core",
        tested="megatron-core 0.19.2",
        seams=(
            Seam(module=MEGATRON_LOOP, name="get_forward_backward_func"),
            Seam(
                module=MEGATRON_LOOP,
                name="train_step",
                parameters=("forward_step_func", "data_iterator", "model"),
            ),
        ),
        switches=(
            Switch(
                setting="--overlap-moe-expert-parallel-comm",
                is_needed=False,
                cause="Forwards of two microbatches are interleaved: replay refuses the job",
            ),
        ),
    ),
    "verl": Framework(
        package="verl",
        distribution="verl",
        tested="0.9.1",
        seams=(
            *(
                Seam(
                    module=VERL_ENGINE,
                    name=f"MegatronEngineWithLMHead.{name}",
                    parameters=parameters,
                )
                for name, parameters in {
                    "forward_step": ("batch_iter", "model"),
                    "prepare_model_inputs": ("batch",),
                }.items()
            ),
            *(
                Seam(module=VERL_ENGINE, name=f"MegatronEngine.{name}", parameters=parameters)
                for name, parameters in {
                    "initialize": (),
                    "disable_adapter": (),
                    "forward_backward_batch": ("data", "loss_function", "forward_only"),
                    "_get_context_parallel_layout": ("unwrapped_model",),
                }.items()
            ),
            Seam(
                module="verl.models.mcore.util",
                name="preprocess_thd_engine",
                parameters=(
                    "input_ids",
                    "pre_process",
                    "use_fp8_padding",
                    "min_local_rows",
                    "pad_to_length_bucket",
                    "cp_layout",
                ),
            ),
            Seam(
                module="verl.models.mcore.util",
                name="preprocess_bshd_engine",
                parameters=("input_ids", "pre_process", "use_fp8_padding", "forced_max_seqlen"),
            ),
            Seam(
                module="verl.workers.engine.base",
                name="EngineRegistry.register",
                parameters=("model_type", "backend", "device", "vendor"),
            ),
            Seam(
                module="verl.trainer.ppo.core_algos",
                name="register_policy_loss",
                parameters=("name",),
            ),
        ),
        switches=(
            Switch(
                setting="ROUTING_REPLAY_MODE",
                cause="Nothing is replayed; every worker reads it: set it in ray_init.runtime_env",
            ),
            Switch(
                setting="actor_rollout_ref.rollout.enable_rollout_routing_replay",
                value="True",
                cause="The rollout returns no routes (R3)",
            ),
            *(
                Switch(
                    setting="actor_rollout_ref.actor.megatron.router_replay.mode",
                    value=mode,
                    is_needed=False,
                    cause="verl would replay as well: the adapter refuses the job",
                )
                for mode in ("R2", "R3")
            ),
        ),
    ),
    "skyrl": Framework(
        package="skyrl",
        distribution="skyrl",
        tested="0.4.0",
        seams=(
            *(
                Seam(module=SKYRL_WRAPPER, name=name)
                for name in (
                    "get_forward_backward_func",
                    "setup_per_microbatch_replay_forward",
                    "setup_per_microbatch_replay_backward",
                    "router_replay_schedule",
                    "get_model_config",
                    "PackedTensor",
                )
            ),
            Seam(
                module=SKYRL_REPLAY,
                name="setup_per_microbatch_replay_forward",
                parameters=(
                    "rollout_expert_indices",
                    "router_padding_mask",
                    "attention_mask",
                    "model",
                    "model_config",
                    "metadata_layout",
                ),
            ),
            Seam(
                module=SKYRL_REPLAY,
                name="scatter_router_padding_mask_for_model",
                parameters=("router_padding_mask", "model", "model_config"),
            ),
            Seam(
                module="skyrl.backends.skyrl_train.distributed.megatron.token_metadata",
                name="align_packed_token_metadata",
                parameters=("metadata", "layout", "padding_value"),
            ),
            Seam(
                module="skyrl.backends.skyrl_train.distributed.megatron.megatron_utils",
                name="make_batch_generator",
                parameters=("batches", "vpp_size"),
            ),
            Seam(
                module="skyrl.backends.skyrl_train.utils.ppo_utils",
                name="register_policy_loss",
                parameters=("name",),
            ),
        ),
        switches=(
            RAY_HOOK,
            Switch(
                setting="trainer.policy.megatron_config.moe_enable_routing_replay",
                value="true",
                cause="It carries the routes; the adapter takes them over",
            ),
        ),
    ),
    "megatron-bridge": Framework(
        package="megatron",
        distribution="megatron-bridge",
        tested="megatron-bridge 0.6.2",
        seams=(
            Seam(
                module=f"{BRIDGE}.pretrain",
                name="pretrain",
                parameters=("config", "forward_step_func", "callbacks"),
            ),
            *(
                Seam(
                    module=f"{BRIDGE}.callbacks", name=f"Callback.{event}", parameters=("context",)
                )
                for event in ("on_train_step_start", "on_train_step_end", "on_train_end")
            ),
            Seam(module=f"{BRIDGE}.state", name="GlobalState.tensorboard_logger"),
            Seam(module=f"{BRIDGE}.state", name="GlobalState.wandb_logger"),
        ),
    ),
    "slime": _slime(
        "slime",
        logger="slime.observability.logging_utils",
        get_batch=Seam(
            module="slime.backends.megatron_utils.data",
            name="get_batch",
            parameters=("data_iterator", "keys", "pad_multiplier", "allgather_cp"),
        ),
        tested="624b824a (2026-08-21)",
    ),
    "miles": _slime(
        "miles",
        logger="miles.utils.tracking_utils.tracking",
        get_batch=Seam(
            module="miles.backends.training_utils.data",
            name="get_batch",
            parameters=("data_iterator", "keys", "pad_multiplier", "qkv_format"),
        ),
        tested="31f1ca96 (2026-08-21)",
    ),
    "nemo-rl": Framework(
        package="nemo_rl",
        tested="7ea279ab (2026-08-22)",
        seams=(
            Seam(
                module="nemo_rl.models.megatron.data",
                name="get_microbatch_iterator",
                parameters=("data", "cfg", "mbs", "straggler_timer"),
            ),
            Seam(
                module="nemo_rl.models.policy.workers.megatron_policy_worker",
                name="get_microbatch_iterator",
            ),
            Seam(
                module="nemo_rl.models.megatron.router_replay",
                name="set_router_replay_forward",
                parameters=("model", "routed_experts"),
            ),
            Seam(
                module="nemo_rl.models.megatron.router_replay",
                name="set_router_replay_backward",
                parameters=("model",),
            ),
            Seam(
                module="nemo_rl.models.megatron.router_replay",
                name="clear_router_replay",
                parameters=("model",),
            ),
            Seam(module=NEMO_TRAIN, name="set_router_replay_forward"),
            Seam(module=NEMO_TRAIN, name="set_router_replay_backward"),
            Seam(module=NEMO_TRAIN, name="clear_router_replay"),
            Seam(module=NEMO_TRAIN, name="get_forward_backward_func"),
        ),
        switches=(
            RAY_HOOK,
            Switch(
                setting="policy.router_replay.enabled",
                value="true",
                cause="It carries the routes; the adapter takes them over",
            ),
        ),
    ),
}


def framework(name: str) -> Framework:
    """Return the entry of a framework.

    Raises:
        ConfigError: No adapter has this name.
    """
    if name not in FRAMEWORKS:
        raise unknown_name("framework", name, FRAMEWORKS)
    return FRAMEWORKS[name]


def require(name: str) -> None:
    """Raise PreflightError unless the installed framework has what its adapter relies on."""
    differences = list(compare(framework(name)))
    if differences:
        raise PreflightError(
            f"{name} is another version than the adapter was written for",
            expected=FRAMEWORKS[name].tested,
            got="; ".join(differences),
            fix=f"Use the tested version, or see docs/adopt/{name.replace('-', '_')}.md",
        )


def compare(entry: Framework, path: Sequence[str] | None = None) -> Iterator[str]:
    """Yield one line for each seam that a framework's sources do not have.

    Args:
        entry: What is relied on.
        path: Folders to look in; `sys.path` if None.
    """
    for seam in entry.seams:
        source = _find(seam.module, path)
        if source is None:
            yield f"{seam.module} does not exist"
            continue
        found = _definition(ast.parse(source.read_text(encoding="utf-8")), seam.name)
        if found is None:
            yield f"{seam} does not exist"
        elif seam.parameters and not _fits(found, seam.parameters):
            yield f"{seam}{_text(found)} does not take ({', '.join(seam.parameters)})"


def is_installed(entry: Framework, path: Sequence[str] | None = None) -> bool:
    """Return whether the framework's package is on the path."""
    return importlib.machinery.PathFinder.find_spec(entry.package, _folders(path)) is not None


def _folders(path: Sequence[str] | None) -> list[str]:
    return list(sys.path if path is None else path)


def _find(module: str, path: Sequence[str] | None) -> Path | None:
    """The source of a module, by its name alone: finding it by import would run its parents."""
    top, *rest = module.split(".")
    spec = importlib.machinery.PathFinder.find_spec(top, _folders(path))
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    for folder in folders:
        base = Path(os.path.join(folder, *rest))
        for file in (base.with_suffix(".py"), base / "__init__.py"):
            if file.is_file():
                return file
    return None


def _definition(tree: ast.Module | ast.ClassDef, name: str) -> ast.AST | None:
    """The last binding of a name in a module or class."""
    head, _, rest = name.partition(".")
    found: ast.AST | None = None
    for node in _statements(tree.body):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names = [node.name]
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.asname or alias.name for alias in node.names]
        elif isinstance(node, ast.Assign):
            names = [target.id for target in node.targets if isinstance(target, ast.Name)]
        else:
            continue
        if head in names:
            found = node
    if rest:
        return _definition(found, rest) if isinstance(found, ast.ClassDef) else None
    return found


def _statements(body: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements of a body and of the `if` and `try` blocks in it."""
    for node in body:
        yield node
        for part in ("body", "orelse", "finalbody"):
            if isinstance(node, ast.If | ast.Try | ast.With):
                yield from _statements(getattr(node, part, []))


def _fits(node: ast.AST, parameters: tuple[str, ...]) -> bool:
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return False
    arguments = (*node.args.args, *node.args.kwonlyargs)
    return set(parameters) <= {argument.arg for argument in arguments}


def _text(node: ast.AST) -> str:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return f"({ast.unparse(node.args)})"
    return " (no function)"
