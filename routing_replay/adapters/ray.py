"""Replay in every worker of a Ray job, by variables alone:

    RAY_RUNTIME_ENV_HOOK=routing_replay.adapters.ray.runtime_env_hook ROUTING_REPLAY_MODE=R3 ...

Ray calls the hook with the job's runtime environment, and `setup` first in every worker process;
no framework is imported yet, so `setup` only leaves word what to replace after an import. Where the
driver starts by `uv run`, Ray heeds the hook only with RAY_ENABLE_UV_RUN_RUNTIME_ENV=0.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping
from functools import partial
from types import ModuleType
from typing import Any

from .patches import after_import
from .settings import PREFIX, AdapterSettings

SETUP = "worker_process_setup_hook"
VARIABLES = "env_vars"
# A hook that was in RAY_RUNTIME_ENV_HOOK before, such as uv's: it is called first.
NEXT_HOOK = PREFIX + "RAY_NEXT_HOOK"
# The job's own setup hook, if it is named by its path: workers call it after ours.
NEXT_SETUP = PREFIX + "RAY_NEXT_SETUP"
# Module of a framework: the function of ours that gets it after its import, as module:function.
PATCHES = {
    "nemo_rl.models.megatron.train": "routing_replay.adapters.nemo_rl:patch_train",
    "nemo_rl.models.policy.workers.megatron_policy_worker": (
        "routing_replay.adapters.nemo_rl:patch_worker"
    ),
    "skyrl.backends.skyrl_train.workers.megatron.megatron_model_wrapper": (
        "routing_replay.adapters.skyrl:patch_wrapper"
    ),
    "skyrl.backends.skyrl_train.utils.ppo_utils": "routing_replay.adapters.skyrl_losses:register",
}


def runtime_env_hook(runtime_env: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the job's runtime environment with our setup and our variables in it.

    What the job sets itself stays: other keys, its variables, and its own setup hook, which runs
    after ours.
    """
    if NEXT_HOOK in os.environ:
        runtime_env = _load(os.environ[NEXT_HOOK].rpartition("."))(runtime_env)
    changed = dict(runtime_env or {})
    ours = {name: value for name, value in os.environ.items() if name.startswith(PREFIX)}
    own_setup = changed.get(SETUP)
    if isinstance(own_setup, str) and own_setup != _path_of(setup):
        ours[NEXT_SETUP] = own_setup
    changed[VARIABLES] = ours | dict(changed.get(VARIABLES) or {})
    changed[SETUP] = _followed_by(own_setup) if callable(own_setup) else _path_of(setup)
    return changed


def setup() -> None:
    """Prepare a worker process; called by Ray before the job's code."""
    if AdapterSettings.from_environment(mode="disabled").is_enabled:
        for module, function in PATCHES.items():
            after_import(module, partial(_patch, function))
    if NEXT_SETUP in os.environ:
        _load(os.environ[NEXT_SETUP].rpartition("."))()


def _patch(function: str, module: ModuleType) -> None:
    _load(function.partition(":"))(module)


def _followed_by(own_setup: Callable[[], None]) -> Callable[[], None]:
    def setup_and_own() -> None:
        setup()
        own_setup()

    return setup_and_own


def _path_of(function: Callable[..., Any]) -> str:
    return f"{function.__module__}.{function.__qualname__}"


def _load(parts: tuple[str, str, str]) -> Callable[..., Any]:
    """The function of `str.partition`'s parts: its module, a separator, its name."""
    module, _, name = parts
    function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return function
