"""`routing-replay doctor`: check versions, a Megatron configuration, servers and routes files.

Each check stands alone and never raises for what it looks for: a problem is a finding.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import json
import os
import sys
from collections.abc import Iterator
from types import SimpleNamespace

from ..config import ReplayConfig
from ..errors import ConfigError, RoutingReplayError
from ..findings import Finding
from ..routes.parts import open_table
from ..routes.shape import MoEShape
from .frameworks import FRAMEWORKS, check_framework
from .model import add_model, read_settings, read_shape

HELP = "check versions, a framework's job, a Megatron configuration, a server, routes files"
DESCRIPTION = "Each finding names its cause and its fix. Exit code 1 if one is an error."

PACKAGE = "routing_replay"
# Checked where they are installed: a trainer needs no SGLang, a server no Megatron.
OPTIONAL = ("megatron-core", "sglang", "transformer-engine")
PLUGIN_GROUP, PLUGIN_NAME = "sglang.srt.plugins", "routing_replay"

_ok = functools.partial(Finding, level="ok")
_warning = functools.partial(Finding, level="warning")
_error = functools.partial(Finding, level="error")


def add_arguments(verb: argparse.ArgumentParser) -> None:
    """Add the verb's flags."""
    from ..capture import CAPTURES

    verb.add_argument(
        "--megatron-args", metavar="FILE", help="Megatron's arguments or settings (JSON, YAML)"
    )
    verb.add_argument("--framework", choices=FRAMEWORKS, help="check what its adapter relies on")
    verb.add_argument("--job", metavar="FILE", help="the framework's start script or configuration")
    verb.add_argument("--replay-config", metavar="FILE", help="routing replay's settings (YAML)")
    verb.add_argument(
        "--url", metavar="URL", action="append", default=[], help="an SGLang server; repeatable"
    )
    verb.add_argument(
        "--capture",
        choices=CAPTURES[1:],
        default="ids",
        help="what the job will ask the servers for (ids)",
    )
    verb.add_argument(
        "--table", metavar="FILE", action="append", default=[], help="a routes file; repeatable"
    )
    add_model(verb, "compare the server and the tables with this model")


def run(parsed: argparse.Namespace) -> int:
    """Print all findings, the worst first; 1 if one is an error."""
    path = parsed.replay_config
    replay = ReplayConfig.from_yaml(path) if path else ReplayConfig()
    shape = read_shape(parsed)
    findings = [*check_versions(), *check_plugin()]
    if parsed.job and not parsed.framework:
        raise ConfigError("--job is read for a framework", expected="--framework NAME")
    if parsed.framework:
        findings += check_framework(parsed.framework, parsed.job)
    if parsed.megatron_args:
        findings += check_megatron(parsed.megatron_args, replay)
    for url in parsed.url:
        findings += check_server(url, shape, parsed.capture)
    for path in parsed.table:
        findings += check_table(path, shape)
    findings.sort(key=lambda finding: finding.rank)
    if parsed.json:
        print(json.dumps({"findings": [finding.as_dict() for finding in findings]}))
    else:
        print("\n".join(map(str, findings)))
    return int(any(finding.is_error for finding in findings))


def check_versions() -> Iterator[Finding]:
    """Compare Python and the installed packages with the requirements of this package."""
    yield _ok(name="python", what=".".join(map(str, sys.version_info[:3])))
    try:
        from packaging.requirements import Requirement

        requirements = importlib.metadata.requires(PACKAGE) or []
    except ImportError as error:  # PackageNotFoundError is one
        yield _warning(
            name="versions",
            what="the versions cannot be compared",
            cause=f"Not installed: {error}",
            fix="pip install routing_replay packaging",
        )
        return
    # The bounds stand in pyproject.toml only; an extra's requirements carry a marker.
    for requirement in map(Requirement, requirements):
        is_optional = requirement.name in OPTIONAL
        if requirement.marker is None or is_optional:
            yield from _check_version(requirement.name, str(requirement.specifier), is_optional)


def _check_version(name: str, specifier: str, is_optional: bool) -> Iterator[Finding]:
    from packaging.specifiers import SpecifierSet

    try:
        installed = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        if not is_optional:
            yield _error(name=name, what="not installed", fix=f"pip install {name}")
        return
    # Prereleases count, as they are installed on purpose; by default a specifier excludes them.
    if SpecifierSet(specifier).contains(installed, prereleases=True):
        yield _ok(name=name, what=installed)
    else:
        yield _error(
            name=name,
            what=f"version {installed} is not supported",
            cause="The seams that we use were read in other versions",
            fix=f"pip install '{name}{specifier}'",
        )


def check_plugin() -> Iterator[Finding]:
    """Check that SGLang will load our plugin; find nothing where SGLang is not installed."""
    try:
        importlib.metadata.version("sglang")
    except importlib.metadata.PackageNotFoundError:
        return
    plugins = [entry.name for entry in importlib.metadata.entry_points(group=PLUGIN_GROUP)]
    if PLUGIN_NAME in plugins:
        yield _ok(name="sglang-plugin", what="registered")
    else:
        yield _error(
            name="sglang-plugin",
            what=f"SGLang's plugin group {PLUGIN_GROUP} does not name routing_replay",
            cause="The package is on the path but was not installed, so nothing is captured",
            fix="pip install routing_replay (or pip install -e .) in the server's environment",
        )
    allowed = os.environ.get("SGLANG_PLUGINS")
    if allowed is not None and PLUGIN_NAME not in allowed.split(","):
        yield _error(
            name="sglang-plugin-list",
            what=f"SGLANG_PLUGINS is {allowed!r}",
            cause="SGLang loads only the plugins that it lists",
            fix=f"Add {PLUGIN_NAME}, or unset it",
        )


def check_megatron(path: str | os.PathLike[str], replay: ReplayConfig) -> Iterator[Finding]:
    """Run the preflight on saved arguments or settings (JSON or YAML, Megatron's names)."""
    try:
        settings = read_settings(path)
    except RoutingReplayError as error:
        yield _error(name="megatron-config", what=str(error))
        return
    try:
        from ..megatron import preflight

        # The version from the metadata: importing Megatron takes longer than all checks.
        version = importlib.metadata.version("megatron-core")
        findings = preflight.examine(SimpleNamespace(**settings), replay, version)
    except ImportError as error:  # PackageNotFoundError is one
        yield _error(
            name="megatron-core",
            what="the configuration cannot be checked",
            cause=f"Megatron is not installed here: {error}",
            fix="Run doctor where the trainer runs: pip install routing_replay[megatron]",
        )
        return
    yield from findings
    if not any(finding.is_error for finding in findings):
        yield _ok(name="megatron-config", what=f"replay works with {path}")


def check_server(
    url: str, shape: MoEShape | None = None, capture: str = "ids"
) -> Iterator[Finding]:
    """Send tiny requests that prove that routes come back through every hop before the server.

    Args:
        url: The server or gateway that the job will use.
        shape: What the routes must have.
        capture: The level that the job will ask for.
    """
    try:
        from ..rollout import probe
    except ImportError as error:
        yield _error(
            name="server",
            what=f"the server {url} cannot be asked",
            cause=str(error),
            fix="pip install routing_replay[rollout]",
        )
        return
    try:
        yield _ok(name="server", what=str(probe(url, shape, capture)))
    except RoutingReplayError as error:
        yield _error(name="server", what=str(error))


def check_table(path: str | os.PathLike[str], shape: MoEShape | None = None) -> Iterator[Finding]:
    """Check that a routes file is whole, of the model, covered, and of one weight version."""
    try:
        table = open_table(path)
        if shape is not None:
            table.check_shape(shape)
    except RoutingReplayError as error:
        yield _error(name="table", what=str(error))
        return
    num_uncovered = int((~table.covered_T).sum())
    if table.num_rows and num_uncovered == table.num_rows:
        yield _error(
            name="table-coverage",
            what=f"no row of {path} is covered",
            cause="The server or a gateway dropped the routes",
            fix="routing-replay doctor --url URL, at each hop",
        )
    elif num_uncovered:
        yield _warning(
            name="table-coverage",
            what=f"{num_uncovered} of {table.num_rows} rows of {path} are not covered",
            cause="Those tokens take the live routes",
            fix="Look for retractions and aborts in the rollout's log",
        )
    versions = sorted({int(v) for v in table.weight_version_T[table.covered_T] if v >= 0})
    if len(versions) > 1:
        yield _warning(
            name="table-versions",
            what=f"{path} holds rows of the weight versions {versions}",
            cause="Partial rollouts, or a prefix cache that outlived a weight update",
            fix="Flush the cache with each update, or drop old rows (without_versions_before)",
        )
    yield _ok(name="table", what=f"{path}: {table.num_rows} rows of {table.shape}")
