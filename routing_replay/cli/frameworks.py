"""`routing-replay doctor --framework NAME`: is the adapter's framework there, and the job set up?

Neither the framework nor an engine is imported.
"""

from __future__ import annotations

import functools
import importlib.metadata
import os
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, reading
from ..findings import Finding
from .model import read_settings

if TYPE_CHECKING:
    from ..adapters.seams import Framework, Switch

FRAMEWORKS = ("megatron-lm", "megatron-bridge", "verl", "slime", "miles", "nemo-rl", "skyrl")
DATA_FILES = (".json", ".yaml", ".yml")

_ok = functools.partial(Finding, level="ok")
_note = functools.partial(Finding, level="note")
_error = functools.partial(Finding, level="error")


def check_framework(name: str, job: str | None = None) -> Iterator[Finding]:
    """Compare the installed framework and a job's settings with what the adapter relies on.

    Args:
        name: One of `FRAMEWORKS`.
        job: The job's start script, or its configuration (YAML, JSON).
    """
    from ..adapters import contracts

    entry = contracts.framework(name)
    yield from _check_sources(name, entry)
    settings = _variables(os.environ)
    if job is None:
        needed = "; ".join(str(switch) for switch in entry.switches if switch.is_needed)
        yield _note(
            name=f"{name}-switches",
            what=f"the job's settings were not looked at; it needs {needed}",
            fix="Add --job FILE: the start script or the configuration of the job",
        )
        return
    try:
        settings |= read_job(job)
    except ConfigError as error:
        yield _error(name=f"{name}-job", what=str(error))
        return
    yield from _check_switches(name, entry, settings)


def _check_sources(name: str, entry: Framework) -> Iterator[Finding]:
    from ..adapters import seams

    page = f"docs/adopt/{name.replace('-', '_')}.md"
    if not seams.is_installed(entry):
        yield _error(
            name=name,
            what=f"the package {entry.package} is not on the path",
            fix="Run doctor in the trainer's environment, with the checkout in PYTHONPATH",
        )
        return
    version = _version(entry.distribution)
    differences = list(seams.compare(entry))
    for difference in differences:
        yield _error(
            name=f"{name}-seam",
            what=difference,
            cause=f"The adapter was written for {entry.tested} and refuses another signature",
            fix=f"Use the tested version ({page})",
        )
    if not differences:
        what = f"all {len(entry.seams)} names that the adapter uses are as in {entry.tested}"
        yield _ok(name=name, what=f"{version}: {what}" if version else what)


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution) if distribution else ""
    except importlib.metadata.PackageNotFoundError:
        return ""


def _check_switches(name: str, entry: Framework, settings: Mapping[str, str]) -> Iterator[Finding]:
    modes = ("", _mode(settings))
    switches = [switch for switch in entry.switches if switch.mode in modes]
    wrong = [switch for switch in switches if not _is_right(switch, settings)]
    for switch in wrong:
        present = settings.get(switch.setting)
        if switch.is_needed and present is None:
            what, fix = f"the job does not set {switch.setting}", f"Add {switch}"
        elif switch.is_needed:
            what = f"the job sets {switch.setting} to {present!r}"
            fix = f"Set {switch}"
        else:
            what, fix = f"the job sets {switch}", "Remove it"
        yield _error(name=f"{name}-switch", what=what, cause=switch.cause, fix=fix)
    if not wrong:
        yield _ok(name=f"{name}-switches", what="the job's settings are right for replay")


def _mode(settings: Mapping[str, str]) -> str:
    """The job's mode: our variable, or slime's and miles' two flags."""
    by_flag = "R2" if "--use-routing-replay" in settings else "R3"
    if "--use-rollout-routing-replay" in settings:
        by_flag = "R3"
    return settings.get("ROUTING_REPLAY_MODE", by_flag)


def _is_right(switch: Switch, settings: Mapping[str, str]) -> bool:
    present = settings.get(switch.setting)
    matches = present is not None and (not switch.value or _equal(present, switch.value))
    return matches == switch.is_needed


def _equal(text: str, other: str) -> bool:
    return text.strip("\"'").casefold() == other.casefold()


def read_job(path: str | os.PathLike[str]) -> dict[str, str]:
    """Return the settings of a job by flag, dotted key or variable; the last one counts.

    Args:
        path: A shell script (flags, `key=value` overrides, variables), YAML or JSON.

    Raises:
        ConfigError: The file cannot be read.
    """
    if Path(path).suffix in DATA_FILES:
        settings = dict(_flattened(read_settings(path)))
    else:
        with reading(path, "the job's script", ConfigError):
            text = Path(path).read_text(encoding="utf-8")
        settings = settings_of(_words(text))
    # Ray's runtime environment sets variables of the workers by keys of their own.
    workers = [key for key in settings if ".env_vars." in key]
    return settings | {key.rpartition(".")[2]: settings[key] for key in workers}


def settings_of(words: list[str]) -> dict[str, str]:
    """Return flags and assignments among the words of a command; a flag without a value is ""."""
    settings: dict[str, str] = {}
    for word, following in zip(words, [*words[1:], ""], strict=True):
        name, equals, value = word.partition("=")
        if word.startswith("--"):
            has_value = not following.startswith("--") and following != ")"
            settings[name] = value if equals else following if has_value else ""
        elif equals:
            settings[name.lstrip("+~")] = value
    return settings


def _words(script: str) -> list[str]:
    script = script.replace("\\\n", " ")
    try:
        return shlex.split(script, comments=True)
    except ValueError:  # an apostrophe in a here-document
        return script.split()


def _flattened(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flattened(inner, f"{prefix}.{key}" if prefix else str(key))
    elif value is not None:
        yield prefix, str(value)


def _variables(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name.isupper()}
