"""Run a stock training script of Megatron-LM with routing replay.

    torchrun ... -m routing_replay.adapters.run pretrain_gpt.py FLAGS --routing-replay-routes FILE

Flags that begin with --routing-replay- are ours; everything else goes to the script as it is.
"""

from __future__ import annotations

import importlib
import runpy
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from ..errors import ConfigError, ReplayError, RoutingReplayError
from .patches import after_import
from .settings import AdapterSettings

if TYPE_CHECKING:
    from .job import Job

LOOP = "megatron.training.training"
ADAPTER = "routing_replay.adapters.megatron_lm"


def main(arguments: list[str]) -> None:
    """Install the adapter and run the script as `__main__`.

    Raises:
        ConfigError: No script is named, or a setting cannot work.
    """
    settings, rest = AdapterSettings.from_arguments(arguments)
    settings.require_routes_file()
    if not rest or not Path(rest[0]).is_file():
        raise ConfigError(
            "no training script is named",
            expected="torchrun ... -m routing_replay.adapters.run SCRIPT.py ARGUMENTS",
            got=rest[0] if rest else "nothing",
        )
    jobs = _install(settings)
    sys.argv = rest
    sys.path.insert(0, str(Path(rest[0]).resolve().parent))  # as `python SCRIPT.py` does
    runpy.run_path(rest[0], run_name="__main__")
    _require_replayed(settings, jobs)


def _install(settings: AdapterSettings) -> list[Job]:
    """Leave the import of Megatron to the script, which may prepare the process for it first.

    Returns:
        The job, once the script has imported the loop.
    """
    jobs: list[Job] = []

    def patch(loop: ModuleType) -> None:
        jobs.append(importlib.import_module(ADAPTER).wrap_loop(loop, settings))

    if settings.is_enabled:
        after_import(LOOP, patch)
    return jobs


def _require_replayed(settings: AdapterSettings, jobs: list[Job]) -> None:
    if settings.is_enabled and not jobs:
        raise ReplayError(
            "the script ended without replay",
            expected=f"a script that trains by {LOOP}",
            got="the module was never imported",
        )
    for job in jobs:
        job.require_replayed()


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except RoutingReplayError as error:
        sys.exit(f"error: {error}")
