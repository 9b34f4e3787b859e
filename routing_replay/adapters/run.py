"""Run a stock training script of Megatron-LM with routing replay.

    torchrun ... -m routing_replay.adapters.run pretrain_gpt.py FLAGS --routing-replay-routes FILE

Flags that begin with --routing-replay- are ours; everything else goes to the script as it is.
"""

from __future__ import annotations

import importlib
import runpy
import sys
from pathlib import Path

from ..errors import ConfigError, RoutingReplayError
from .patches import after_import
from .settings import AdapterSettings

LOOP = "megatron.training.training"
ADAPTER = "routing_replay.adapters.megatron_lm"


def main(arguments: list[str]) -> None:
    """Install the adapter and run the script as `__main__`.

    Raises:
        ConfigError: No script is named, or a setting cannot work.
    """
    settings, rest = AdapterSettings.from_arguments(arguments)
    if not rest or not Path(rest[0]).is_file():
        raise ConfigError(
            "no training script is named",
            expected="torchrun ... -m routing_replay.adapters.run SCRIPT.py ARGUMENTS",
            got=rest[0] if rest else "nothing",
        )
    _install(settings)
    sys.argv = rest
    sys.path.insert(0, str(Path(rest[0]).resolve().parent))  # as `python SCRIPT.py` does
    runpy.run_path(rest[0], run_name="__main__")


def _install(settings: AdapterSettings) -> None:
    """Leave the import of Megatron to the script, which may prepare the process for it first."""
    if settings.mode != "disabled":
        after_import(LOOP, lambda loop: importlib.import_module(ADAPTER).wrap_loop(loop, settings))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except RoutingReplayError as error:
        sys.exit(f"error: {error}")
