"""Findings about an installation, a Megatron configuration, a server and files: cause and fix.

Each check stands alone and never raises for what it looks for: a problem is a finding.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace

from ..config import ReplayConfig, read_yaml
from ..errors import ConfigError, RoutingReplayError
from ..routes.shape import MoEShape
from ..routes.table import RouteTable

# name: oldest supported, first unsupported; setup.py holds the same bounds
BOUNDS = {
    "torch": ("2.6", None),
    "numpy": ("1.26", None),
    "safetensors": ("0.4.5", None),
    "megatron-core": ("0.16.1", "0.20"),
    "sglang": ("0.5.12", "0.6"),
}
OPTIONAL = ("megatron-core", "sglang", "transformer-engine")
PLUGIN_GROUP, PLUGIN_NAME = "sglang.srt.plugins", "routing_replay"
OLDEST_PYTHON = (3, 10)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One result. `severity` is "error", "warning" or "ok"; only errors fail a job."""

    severity: str
    name: str
    what: str
    cause: str = ""
    fix: str = ""

    def __str__(self):
        return f"{self.severity:7s} {self.name}: " + ". ".join(
            part.rstrip(".") for part in (self.what, self.cause, self.fix) if part
        )

    def as_dict(self) -> dict:
        return asdict(self)


def check_versions() -> Iterator[Finding]:
    """Python, the required packages, and the optional ones where they are installed."""
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info[:2] < OLDEST_PYTHON:
        yield _error("python", f"Python {version} is too old", fix="Install Python 3.12")
    else:
        yield _ok("python", version)
    for name in (*BOUNDS, *(n for n in OPTIONAL if n not in BOUNDS)):
        try:
            installed = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            if name not in OPTIONAL:
                yield _error(name, "not installed", fix=f"pip install {name}")
            continue
        yield _check_bounds(name, installed)


def check_plugin() -> Iterator[Finding]:
    """Whether SGLang will find our plugin; nothing where SGLang is not installed."""
    try:
        importlib.metadata.version("sglang")
    except importlib.metadata.PackageNotFoundError:
        return
    found = [e.name for e in importlib.metadata.entry_points(group=PLUGIN_GROUP)]
    if PLUGIN_NAME in found:
        yield _ok("sglang-plugin", "registered")
    else:
        yield _error(
            "sglang-plugin",
            f"SGLang's plugin group {PLUGIN_GROUP} does not name us",
            cause="The package is on the path but was not installed, so nothing is captured",
            fix="pip install routing_replay (or pip install -e .) in the server's environment",
        )
    allowed = os.environ.get("SGLANG_PLUGINS")
    if allowed is not None and PLUGIN_NAME not in allowed.split(","):
        yield _error(
            "sglang-plugin-list",
            f"SGLANG_PLUGINS is {allowed!r}",
            cause="SGLang loads only the plugins that it lists",
            fix=f"Add {PLUGIN_NAME}, or unset it",
        )


def check_megatron(path: str | os.PathLike, replay: ReplayConfig) -> Iterator[Finding]:
    """Preflight on saved arguments or settings (JSON or YAML, Megatron's names)."""
    try:
        settings = _read_settings(path)
    except RoutingReplayError as error:
        yield _error("megatron-config", str(error))
        return
    try:
        from ..megatron import preflight

        # The version from the metadata: importing Megatron takes longer than all checks.
        version = importlib.metadata.version("megatron-core")
        findings = preflight.examine(SimpleNamespace(**settings), replay, version)
    except ImportError as error:  # PackageNotFoundError is one
        yield _error(
            "megatron-core",
            "the configuration cannot be checked",
            cause=f"Megatron is not installed here: {error}",
            fix="Run doctor where the trainer runs: pip install routing_replay[megatron]",
        )
        return
    for found in findings:
        severity = "error" if found.is_error else "warning"
        yield Finding(
            severity=severity, name=found.name, what=found.what, cause=found.cause, fix=found.fix
        )
    if not any(found.is_error for found in findings):
        yield _ok("megatron-config", f"replay works with {path}")


def check_server(
    url: str, model: MoEShape | None = None, capture: str = "ids"
) -> Iterator[Finding]:
    """Tiny requests that prove routes come back, through everything that stands before the server.

    Args:
        url: The server or gateway that the job will use.
        model: What the routes must have.
        capture: The level that the job will ask for.
    """
    try:
        from ..rollout import probe
    except ImportError as error:
        yield _error(
            "server",
            f"cannot ask {url}",
            cause=str(error),
            fix="pip install routing_replay[recipe]",
        )
        return
    try:
        found = probe(url, model, capture)
    except RoutingReplayError as error:
        yield _error("server", str(error))
        return
    yield _ok("server", f"{found}")


def check_table(path: str | os.PathLike, model: MoEShape | None = None) -> Iterator[Finding]:
    """A routes file: whole, of the model, covered, captured by one version of the weights."""
    try:
        table = RouteTable.open(path)
        if model is not None:
            table.check_shape(model)
    except RoutingReplayError as error:
        yield _error("table", str(error))
        return
    num_missing = int((~table.covered_T).sum())
    if table.num_rows and num_missing == table.num_rows:
        yield _error(
            "table-coverage",
            f"no row of {path} is covered",
            cause="The server or a gateway dropped the routes",
            fix="routing-replay doctor --url URL, at each hop",
        )
    elif num_missing:
        yield _warning(
            "table-coverage",
            f"{num_missing} of {table.num_rows} rows of {path} are not covered",
            cause="Those tokens take the live routes",
            fix="Look for retractions and aborts in the rollout's log",
        )
    versions = sorted({int(v) for v in table.weight_version_T[table.covered_T] if v >= 0})
    if len(versions) > 1:
        yield _warning(
            "table-versions",
            f"{path} holds rows of the weight versions {versions}",
            cause="Partial rollouts, or a prefix cache that outlived a weight update",
            fix="Flush the cache with each update, or drop old rows (without_versions_before)",
        )
    yield _ok("table", f"{path}: {table.num_rows} rows of {table.shape}")


def read_model(path: str | os.PathLike) -> MoEShape:
    """Layers, experts and top-k from a Hugging Face checkpoint's config.json.

    Raises:
        ConfigError: No such file, or not the configuration of a Mixture-of-Experts model.
    """
    path = Path(path)
    path = path / "config.json" if path.is_dir() else path
    settings = _read_settings(path)
    settings = settings.get("text_config") or settings
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    num_experts = next((settings[n] for n in names if settings.get(n)), None)
    top_k = settings.get("num_experts_per_tok") or settings.get("moe_topk")
    num_layers = settings.get("num_hidden_layers")
    if not (num_experts and top_k and num_layers):
        raise ConfigError(
            "not the configuration of a Mixture-of-Experts model",
            expected=f"num_hidden_layers, num_experts_per_tok and one of {', '.join(names)}",
            got=", ".join(sorted(settings)[:8]),
            where=path,
        )
    layers = tuple(layer for layer in range(num_layers) if _is_routed(settings, layer))
    return MoEShape(layers=layers, num_experts=int(num_experts), top_k=int(top_k))


def _is_routed(settings: dict, layer: int) -> bool:
    """By the conventions of Qwen (steps, named dense layers) and DeepSeek (dense layers first)."""
    step = settings.get("decoder_sparse_step") or settings.get("moe_layer_freq") or 1
    if isinstance(step, list):
        return bool(step[layer])
    if layer in (settings.get("mlp_only_layers") or ()):
        return False
    first_dense = settings.get("first_k_dense_replace") or 0
    offset = 1 if "decoder_sparse_step" in settings else 0
    return layer >= first_dense and (layer + offset) % step == 0


def has_errors(findings: Iterable[Finding]) -> bool:
    return any(finding.severity == "error" for finding in findings)


def _read_settings(path: str | os.PathLike) -> dict:
    if Path(path).suffix in (".yaml", ".yml"):
        return read_yaml(path)
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError("the configuration cannot be read", got=error, where=path) from error
    if not isinstance(content, dict):
        raise ConfigError("a configuration is a JSON object", got=type(content), where=path)
    return content


def _check_bounds(name: str, installed: str) -> Finding:
    oldest, newest = BOUNDS.get(name, (None, None))
    number = _numbers(installed)
    if (oldest and number < _numbers(oldest)) or (newest and number >= _numbers(newest)):
        bounds = f">={oldest}" + (f",<{newest}" if newest else "")
        return _error(
            name,
            f"version {installed} is not supported",
            cause="The seams that we use were read in other versions",
            fix=f"pip install '{name}{bounds}'",
        )
    return _ok(name, installed)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.split("+")[0])[:3])


def _ok(name: str, what: str) -> Finding:
    return Finding(severity="ok", name=name, what=what)


def _warning(name: str, what: str, cause: str = "", fix: str = "") -> Finding:
    return Finding(severity="warning", name=name, what=what, cause=cause, fix=fix)


def _error(name: str, what: str, cause: str = "", fix: str = "") -> Finding:
    return Finding(severity="error", name=name, what=what, cause=cause, fix=fix)
