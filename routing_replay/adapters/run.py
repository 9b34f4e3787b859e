"""Run a stock training script of Megatron-LM with routing replay.

    torchrun ... -m routing_replay.adapters.run pretrain_gpt.py FLAGS --routing-replay-routes FILE

Flags that begin with --routing-replay- are ours; everything else goes to the script as it is.
"""

from __future__ import annotations

import importlib
import runpy
import sys
from pathlib import Path

from ..errors import ConfigError, ReplayError, RoutingReplayError
from .patches import after_import
from .settings import AdapterSettings

LOOP = "megatron.training.training"
ADAPTER = "routing_replay.adapters.megatron_lm"


def main(arguments: list[str]) -> None:
    """Install the adapter and run the script as `__main__`.

    Raises:
        ConfigError: No script is named, or a setting cannot work.
        ReplayError: The script does not train by Megatron's loop. A job that replays nothing in it
            fails when the process ends (`Job.require_replayed_at_exit`).
    """
    settings, rest = AdapterSettings.from_arguments(arguments)
    settings.require_routes_file()
    if not rest or not Path(rest[0]).is_file():
        raise ConfigError(
            "no training script is named",
            expected="torchrun ... -m routing_replay.adapters.run SCRIPT.py ARGUMENTS",
            got=rest[0] if rest else "nothing",
        )
    if settings.is_enabled:
        # Megatron's import is left to the script, which may prepare the process for it first.
        after_import(LOOP, lambda loop: importlib.import_module(ADAPTER).wrap_loop(loop, settings))
    sys.argv = rest
    sys.path.insert(0, str(Path(rest[0]).resolve().parent))  # as `python SCRIPT.py` does
    runpy.run_path(rest[0], run_name="__main__")
    if settings.is_enabled and LOOP not in sys.modules:
        raise ReplayError(
            "the script ended without replay",
            expected=f"a script that trains by {LOOP}",
            got="the module was never imported",
        )


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except RoutingReplayError as error:
        sys.exit(f"error: {error}")
