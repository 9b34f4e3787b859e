"""The command line: preset, then YAML files, then flags, each overriding the one before."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import Field, fields
from pathlib import Path

from routing_replay import objectives
from routing_replay.config import FLAG_PREFIX, read_yaml
from routing_replay.errors import ConfigError

from .config import SECTIONS, RecipeConfig, key_of, unknown

PRESETS = Path(__file__).parent / "presets"
DEFAULT_PRESET = "tiny_cpu"


def parse(argv: Sequence[str] | None = None) -> RecipeConfig:
    """The configuration of a command line.

    A resumed run starts from its own configuration instead of a preset.

    Raises:
        ConfigError: An unknown flag, key or preset, or values that cannot work.
    """
    arguments, rest = make_parser().parse_known_args(argv)
    if rest:
        raise unknown("flag", rest[0].partition("=")[0], flags())
    given = {name: value for name, value in vars(arguments).items() if value is not None}
    preset, config, replay_config = (
        given.pop(name, None) for name in ("preset", "config", "routing_replay_config")
    )
    if given.get("resume"):
        values = _stored(given.get("run_dir"), preset)
    else:
        values = _read(_preset_path(preset or DEFAULT_PRESET))
    if config:
        values |= _read(Path(config))
    if replay_config:
        values |= _read(Path(replay_config), FLAG_PREFIX)
    return RecipeConfig.from_mapping(values | given)


def make_parser() -> argparse.ArgumentParser:
    """One flag per key; a flag that is not given is None."""
    parser = argparse.ArgumentParser(
        prog="python -m recipes.minirl",
        usage="%(prog)s [--preset NAME] [--config FILE.yaml] [FLAGS]",
        description="Reinforcement learning of a Mixture-of-Experts model: SGLang rollouts that "
        "return expert routes, updates in Megatron that replay them.",
        epilog="Every flag is also a key of the YAML file, with _ for -. Without flags the preset "
        f"{DEFAULT_PRESET} trains a tiny model on this machine. Presets: "
        f"{', '.join(preset_names())}.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--preset", metavar="NAME", help=f"a preset, or the path of one (default: {DEFAULT_PRESET})"
    )
    parser.add_argument("--config", metavar="FILE.yaml", help="settings on top of the preset")
    parser.add_argument(
        "--routing-replay-config", metavar="FILE.yaml", help="settings of routing replay alone"
    )
    for name, kind in SECTIONS.items():
        title = "routing replay" if name == "replay" else kind.__doc__.strip()
        group = parser.add_argument_group(title)
        for f in fields(kind):
            _add_flag(group, key_of(name, f.name), f)
    return parser


def flags() -> list[str]:
    """All flags."""
    return [flag for action in make_parser()._actions for flag in action.option_strings]


def preset_names() -> list[str]:
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def _add_flag(group, name: str, f: Field) -> None:
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
        action = "store"
        if name == "objective":
            metavar, action = "NAME", _ObjectiveOrHelp
        group.add_argument(
            flag, type=kind, choices=choices, metavar=metavar, action=action, help=help_text
        )


class _ObjectiveOrHelp(argparse.Action):
    """`--objective help` prints the table of all losses and ends."""

    def __call__(self, parser, namespace, value, option_string=None):
        if value == "help":
            print(objectives.help_text())
            parser.exit(0)
        setattr(namespace, self.dest, value)


def _preset_path(name: str) -> Path:
    path = Path(name)
    if path.suffix in (".yaml", ".yml") and path.is_file():
        return path
    if name not in preset_names():
        raise unknown("preset", name, preset_names())
    return PRESETS / f"{name}.yaml"


def _read(path: Path, prefix: str = "") -> dict:
    """A YAML file's settings, checked alone so that an error names the file."""
    content = {
        prefix + str(key).replace("-", "_").removeprefix(prefix): value
        for key, value in read_yaml(path).items()
    }
    RecipeConfig.check_keys(content, where=path)
    return content


def _stored(run_dir: str | None, preset: str | None) -> dict:
    if not run_dir or preset:
        raise ConfigError(
            "--resume continues a run with that run's configuration",
            expected="--run-dir DIR --resume, without --preset",
            got=f"--run-dir {run_dir}, --preset {preset}",
        )
    path = Path(run_dir) / "config.json"
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(
            "there is no run to resume", expected="its config.json", got=error, where=path
        ) from error
