"""A run's result: small enough to be kept in the repository, so that tables need no runs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from recipes.minirl.job import journal
from routing_replay.errors import RoutingReplayError
from routing_replay.files import atomic_write

ROOT = Path(__file__).parents[2]
FOLDER = Path(__file__).parent / "results"
# What a run executes.
SOURCES = ("routing_replay", "recipes/minirl", "recipes/model", "recipes/serving")
# What tables and figures read, and what a reader may ask next.
METRICS = (
    *("eval/reward", "reward", "grad_norm", "entropy", "time_s"),
    *("train_infer/kl_k3", "train_infer/kl_k3_live", "train_infer/extreme_tau2"),
    *("off_policy/kl_k3", "off_policy/ess", "off_policy/extreme_tau2"),
    *("staleness/kl_k3", "staleness/kl_k3_live", "objective/clip_fraction"),
    *("routing_replay/live_mass", "routing_replay/replay_bias", "routing_replay/replace_rate"),
)


class StudyError(RoutingReplayError):
    """A study whose runs failed, are missing, or do not belong together."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """One run.

    Args:
        cell: Its name.
        seed: Of the run.
        code: Fingerprint of the sources that made it, `code_version`.
        flags: Of the recipe.
        steps: Metric values by step, each step's under "step".
    """

    cell: str
    seed: int
    code: str
    flags: tuple[str, ...]
    steps: tuple[dict[str, float], ...]

    @property
    def name(self) -> str:
        return file_name(self.cell, self.seed)

    def values(self, metric: str) -> list[float]:
        """Return a metric's values in the order of steps; steps without it are left out."""
        return [step[metric] for step in self.steps if metric in step]

    def save(self, folder: Path) -> None:
        """Write `<cell>-seed<seed>.json`."""
        with atomic_write(folder / self.name) as path:
            path.write_text(json.dumps(asdict(self), indent=0) + "\n")


def file_name(cell: str, seed: int) -> str:
    """Return the name of a result's file."""
    return f"{cell}-seed{seed}.json"


def code_version(sources: Iterable[str] = SOURCES) -> str:
    """Return a fingerprint of sources, folders or files; of all that a run executes."""
    digest = hashlib.sha256()
    for source in map(ROOT.joinpath, sources):
        for path in [source] if source.is_file() else sorted(source.rglob("*.py")):
            digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def of_run(run_dir: Path, cell: str, seed: int, flags: Iterable[str]) -> Result:
    """Reduce the journal of a finished run."""
    records = journal.read(run_dir / "metrics.jsonl")
    return Result(
        cell=cell,
        seed=seed,
        code=code_version(),
        flags=tuple(flags),
        steps=tuple(_kept(record) for record in records),
    )


def load(folder: Path, pattern: str = "*") -> list[Result]:
    """Read the results whose cell matches; all must come from the same sources.

    Raises:
        StudyError: There are none, one is damaged, or they mix versions of the code.
    """
    paths = sorted(folder.glob(f"{pattern}-seed*.json"))
    # A hidden file is what a killed run had begun to write.
    results = [_read(path) for path in paths if not path.name.startswith(".")]
    if not results:
        raise StudyError(
            "the study has no results",
            expected=f"{pattern}-seed*.json",
            where=folder,
            fix="python -m recipes.study run",
        )
    versions = {result.code: result.name for result in results}
    if len(versions) > 1:
        raise StudyError(
            "the results come from different versions of the code",
            expected="one fingerprint of the sources",
            got=", ".join(f"{code} ({name})" for code, name in versions.items()),
            where=folder,
            fix="Remove the old ones, and run the study again: what is there is not repeated",
        )
    return results


def _read(path: Path) -> Result:
    try:
        values: dict[str, Any] = json.loads(path.read_text())
        return Result(
            **{**values, "flags": tuple(values["flags"]), "steps": tuple(values["steps"])}
        )
    except (ValueError, TypeError, KeyError) as error:
        raise StudyError("a result cannot be read", got=error, where=path) from error


def _kept(record: dict[str, Any]) -> dict[str, float]:
    kept = {"step": float(record["step"])}
    for name in METRICS:
        value = record.get(name)
        if isinstance(value, dict):  # per layer
            value = value.get("mean")
        if isinstance(value, (int, float)):
            kept[name] = round(float(value), 9)
    return kept
