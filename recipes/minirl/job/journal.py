"""A run's metrics: written to the sinks, shown as a progress bar and one line per step."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from routing_replay.errors import ConfigError
from routing_replay.files import atomic_write
from routing_replay.metrics.sinks import open_sinks, scalars
from routing_replay.metrics.typed import LayerValues, Value
from routing_replay.metrics.version_lag import lag_suffix, nearest_lag

from ..settings.sections import TelemetrySettings

WORST_LAYERS = 2


class Journal:
    """Records of the run's steps; only the first rank has one.

    Args:
        run_dir: Folder of the run; records after `last_step` are cut off, as after a crash.
        last_step: The last step that counts; -1: none, not even the evaluation before the first.
        num_steps: Steps of the whole run.
        telemetry: Which sinks there are. metrics.jsonl is always one: resuming and reports read it.
    """

    def __init__(
        self,
        run_dir: Path,
        last_step: int,
        num_steps: int,
        telemetry: TelemetrySettings | None = None,
    ):
        self.path = run_dir / "metrics.jsonl"
        self.num_steps = num_steps
        telemetry = telemetry or TelemetrySettings()
        truncate(self.path, last_step)
        self._sinks = open_sinks(("jsonl", *telemetry.sinks), run_dir, first_step=last_step + 1)
        self._bar = tqdm(
            total=num_steps,
            initial=max(last_step, 0),
            unit="step",
            file=sys.stdout,  # the trainer's standard error goes to a log file
            disable=not sys.stdout.isatty(),
            dynamic_ncols=True,
        )

    def phase(self, name: str) -> None:
        """Show what is being done."""
        self._bar.set_description(name)

    def write(self, step: int, metrics: Mapping[str, Value]) -> None:
        """Record a finished step in every sink, and show it."""
        for sink in self._sinks:
            sink.write(step, metrics)
        if step:
            self._bar.update()
        self._bar.write(line(step, self.num_steps, metrics), file=sys.stdout)
        sys.stdout.flush()

    def close(self) -> None:
        self._bar.close()
        for sink in self._sinks:
            sink.close()


def check_telemetry(telemetry: TelemetrySettings) -> None:
    """Refuse sinks and folders of other jobs: the recipe has its own folder and writers."""
    if "megatron" in telemetry.sinks:
        raise ConfigError(
            "the sink 'megatron' writes to the writers of Megatron's own training script",
            expected="jsonl, tensorboard or wandb in this recipe",
        )
    if telemetry.metrics_dir:
        raise ConfigError(
            "a run's metrics lie in the folder of the run",
            expected="--run-dir",
            got=f"--routing-replay-metrics-dir {telemetry.metrics_dir}",
        )


class Clock:
    """Seconds per phase of a step, which may come in several parts."""

    def __init__(self, journal: Journal | None):
        self._journal = journal
        self._start = time.monotonic()
        self._phases: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        if self._journal:
            self._journal.phase(phase)
        start = time.monotonic()
        yield
        self._phases[phase] = self._phases.get(phase, 0.0) + time.monotonic() - start

    def times(self) -> dict[str, float]:
        phases = {f"time/{k.replace(' ', '_')}_s": v for k, v in self._phases.items()}
        return {"time_s": time.monotonic() - self._start} | phases


def read(path: Path) -> list[dict[str, Any]]:
    """Read all whole records of a metrics file."""
    if not path.is_file():
        return []
    records = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(text))
        except ValueError:
            break  # a crash cut this line short; it is the last one
    return records


def truncate(path: Path, last_step: int) -> None:
    """Keep the records up to a step; an interruption leaves the earlier file or the new one."""
    kept = [record for record in read(path) if record["step"] <= last_step]
    with atomic_write(path) as partial:
        partial.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")


def line(step: int, num_steps: int, values: Mapping[str, Value]) -> str:
    """Describe a step in one line; leave out values that are not finite."""
    metrics = scalars(values)
    parts = [f"step {step:3d}/{num_steps}"]
    for name, label, form in (
        ("eval/reward", "held-out reward", ".3f"),
        ("reward", "reward", ".3f"),
        ("entropy", "entropy", ".3f"),
    ):
        if name in metrics:
            parts.append(f"{label} {metrics[name]:{form}}")
    replayed, live = kl_of(metrics)
    if replayed is not None:
        lag = version_lag(metrics)
        parts.append(
            f"KL {replayed:.2e}"
            + (f" (live {live:.2e})" if live is not None else "")
            + (f" at version lag {lag}" if lag else "")
        )
    worst = worst_layers(values)
    if worst:
        shown = ", ".join(f"{layer} ({overlap:.3f})" for layer, overlap in worst)
        parts.append(f"lowest overlap: layers {shown}")
    if "time_s" in metrics:
        parts.append(f"{metrics['time_s']:.1f} s")
    return "  ".join(parts)


def version_lag(record: Mapping[str, Any]) -> int:
    """Return the lag whose KL tells most of a step: the nearest to the mean of its responses.

    A lag is by how many versions weights that sampled are older than those trained on the samples.
    """
    return nearest_lag(record, "train_infer/kl_k3", record.get("rollout/version_lag", 0))


def kl_of(record: Mapping[str, Any]) -> tuple[float | None, float | None]:
    """Return a step's train-inference KL (k3), replayed and live, at its version lag."""
    suffix = lag_suffix(version_lag(record))
    return record.get(f"train_infer/kl_k3{suffix}"), record.get(f"train_infer/kl_k3_live{suffix}")


def worst_layers(metrics: Mapping[str, Value]) -> list[tuple[int, float]]:
    """Return the layers whose live routes overlap least with the replayed ones."""
    name = "routing_replay/overlap"  # at one lag, the largest of the step
    overlap = metrics.get(name + lag_suffix(nearest_lag(metrics, name, 0)))
    if not isinstance(overlap, LayerValues):
        return []
    layers = [(layer, value) for layer, value in overlap.layers.items() if math.isfinite(value)]
    return sorted(layers, key=lambda pair: pair[1])[:WORST_LAYERS]
