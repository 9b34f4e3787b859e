"""The command line: preset, then YAML files, then flags, each overriding the one before."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import Field, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from routing_replay import objectives
from routing_replay.config import FLAG_PREFIX, read_yaml
from routing_replay.errors import ConfigError, reading

from .config import RecipeConfig
from .sections import SECTIONS, by_section, key_of, unknown_setting

PRESETS = Path(__file__).parents[1] / "presets"
DEFAULT_PRESET = "tiny_cpu"


@dataclass(frozen=True, kw_only=True)
class Command:
    """A parsed command line.

    Args:
        config: The settings.
        action: run it; or only prepare its folder and print each node's command; or only print the
            plan, without a file.
    """

    config: RecipeConfig
    action: Literal["run", "prepare", "dry-run"] = "run"


def parse(argv: Sequence[str] | None = None) -> RecipeConfig:
    """Return the settings of a command line."""
    return parse_command(argv).config


def parse_command(argv: Sequence[str] | None = None) -> Command:
    """Parse a command line. A resumed run starts from its own configuration, not from a preset.

    Raises:
        ConfigError: An unknown flag, key or preset, or values that cannot work.
    """
    arguments, rest = make_parser().parse_known_args(argv)
    if rest:
        raise unknown_setting("flag", rest[0].partition("=")[0], flags())
    values = {name: value for name, value in vars(arguments).items() if value is not None}
    action = values.pop("action")
    preset, config, replay_config = (
        values.pop(name, None) for name in ("preset", "config", "routing_replay_config")
    )
    if values.get("resume"):
        base = _stored(values.get("run_dir"), preset)
    else:
        base = _read(_preset_path(preset or DEFAULT_PRESET))
    if config:
        base |= _read(Path(config))
    if replay_config:
        base |= _read(Path(replay_config), FLAG_PREFIX)
    return Command(config=RecipeConfig.from_mapping(base | values), action=action)


def make_parser() -> argparse.ArgumentParser:
    """Return the parser: one flag per key, None unless it is on the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m recipes.minirl",
        usage="%(prog)s [--preset NAME] [--config FILE.yaml] [FLAGS]",
        description="Reinforcement learning of a Mixture-of-Experts model: SGLang rollouts that "
        "return expert routes, updates in Megatron that replay them.",
        epilog="Every setting is also a key of the YAML file, with _ for -. Without flags the "
        f"preset {DEFAULT_PRESET} trains a tiny model on this machine. Presets: "
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
    actions = parser.add_mutually_exclusive_group()
    actions.add_argument(
        "--prepare-only",
        action="store_const",
        dest="action",
        const="prepare",
        default="run",
        help="write the folder of the run, with one SLURM job for all of it, and print "
        "the command of each node; start nothing",
    )
    actions.add_argument(
        "--dry-run",
        action="store_const",
        dest="action",
        const="dry-run",
        help="print the plan: memory per GPU, seconds per step, the commands; write nothing",
    )
    for section, kind in SECTIONS.items():
        title = "routing replay" if section == "replay" else (kind.__doc__ or "").strip()
        group = parser.add_argument_group(title)
        for f in fields(kind):
            _add_flag(group, key_of(section, f.name), f)
    return parser


def flags() -> list[str]:
    """Return all flags."""
    return [flag for action in make_parser()._actions for flag in action.option_strings]


def preset_names() -> list[str]:
    """Return the names of all presets."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def _add_flag(group: argparse._ArgumentGroup, name: str, f: Field[Any]) -> None:
    flag = "--" + name.replace("_", "-")
    default = " ".join(f.default) if isinstance(f.default, tuple) else f.default
    shown = "" if default == "" else f" (default: {default})"
    help_text = (f.metadata["help"] + shown).replace("%", "%%")
    if isinstance(f.default, bool):
        action = argparse.BooleanOptionalAction
        group.add_argument(flag, action=action, default=None, help=help_text)
    elif isinstance(f.default, tuple):
        group.add_argument(flag, nargs="*", metavar="TEXT", help=help_text)
    elif name == "objective":
        group.add_argument(flag, metavar="NAME", action=_ObjectiveOrHelp, help=help_text)
    else:
        kind, choices = type(f.default), f.metadata["choices"]
        metavar = None if choices else kind.__name__.upper()
        group.add_argument(flag, type=kind, choices=choices, metavar=metavar, help=help_text)


class _ObjectiveOrHelp(argparse.Action):
    """`--objective help` prints the table of all losses and ends."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        value: Any,
        option_string: str | None = None,
    ) -> None:
        if value == "help":
            print(objectives.help_text())
            parser.exit(0)
        setattr(namespace, self.dest, value)


def _preset_path(name: str) -> Path:
    path = Path(name)
    if path.suffix in (".yaml", ".yml") and path.is_file():
        return path
    if name not in preset_names():
        raise unknown_setting("preset", name, preset_names())
    return PRESETS / f"{name}.yaml"


def _read(path: Path, prefix: str = "") -> dict[str, Any]:
    """Return a YAML file's settings, checked alone so that an error names the file."""
    content = {
        prefix + str(key).replace("-", "_").removeprefix(prefix): value
        for key, value in read_yaml(path).items()
    }
    by_section(content, where=path)
    return content


def _stored(run_dir: str | None, preset: str | None) -> dict[str, Any]:
    if not run_dir or preset:
        raise ConfigError(
            "--resume continues a run with that run's configuration",
            expected="--run-dir DIR --resume, without --preset",
            got=f"--run-dir {run_dir}, --preset {preset}",
        )
    path = Path(run_dir) / "config.json"
    with reading(path, "the configuration of the run to resume", ConfigError):
        values: dict[str, Any] = json.loads(path.read_text())
    return values
