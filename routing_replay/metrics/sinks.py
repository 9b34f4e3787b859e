"""Where metrics go: JSON lines, TensorBoard, Weights & Biases, Megatron's own writers.

A sink takes the metrics of one step as floats (`metrics.to_floats`) on one rank; the reduction
over ranks has happened before. A value that is not finite (nothing was seen) is null in JSON and
left out elsewhere.
"""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from ..errors import ConfigError, DataError

SINKS = ("jsonl", "tensorboard", "wandb", "megatron")
# How a metric's name ends that belongs to one layer (global, 0-based).
LAYER_SUFFIX = re.compile(r"_layer_(\d+)$")
# Of metrics.jsonl and tensorboard/ in a job that names none.
DEFAULT_DIRECTORY = "routing_replay_metrics"
# Steps that a heat map shows, and pixels per cell.
HEAT_STEPS, HEAT_PIXELS = 256, 6
HEAT_METRICS = ("overlap", "exact_match", "router_kl", "router_kl_bound")


class Sink(Protocol):
    """Takes one step's metrics at a time."""

    def write(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class JsonLinesSink:
    """metrics.jsonl: one object per step, readable while the run goes on and after a crash.

    Args:
        directory: Made if it does not exist. Lines of an earlier run stay; a line that a crash cut
            short is removed first, so that the file is always whole lines.
    """

    def __init__(self, directory: str | os.PathLike):
        self.path = Path(directory) / "metrics.jsonl"
        self._started = time.monotonic()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _drop_cut_line(self.path)
            self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115
        except OSError as error:
            raise DataError("metrics cannot be written", got=error, where=self.path) from error

    def write(self, step: int, values: Mapping[str, float]) -> None:
        row: dict[str, float | None] = {
            "step": step,
            "time_s": round(time.monotonic() - self._started, 3),
        }
        self._started = time.monotonic()
        row |= {name: value if math.isfinite(value) else None for name, value in values.items()}
        try:
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())  # a step on record is never half there
        except OSError as error:
            raise DataError("metrics cannot be written", got=error, where=self.path) from error

    def close(self) -> None:
        self._file.close()


class TensorBoardSink:
    """Scalars, and a heat map of layers over steps for each per-layer metric.

    Args:
        writer: A SummaryWriter: Megatron's (`get_tensorboard_writer()`) or one of ours.
        heat_map_every: Steps between two heat maps; 0 writes none.
    """

    def __init__(self, writer, heat_map_every: int = 0):
        self._writer = writer
        self._every = heat_map_every
        self._history = LayerHistory()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in _finite(values).items():
            self._writer.add_scalar(name, value, step)
        self._history.add(values)
        if self._every and step % self._every == 0:
            for name, image_HWC in self._history.images().items():
                self._writer.add_image(name, image_HWC, step, dataformats="HWC")

        self._writer.flush()

    def close(self) -> None:
        """The writer belongs to whoever made it."""
        self._writer.flush()


class WandbSink:
    """Scalars and heat maps of a run of Weights & Biases.

    Args:
        run: `wandb.init(...)`, or Megatron's `get_wandb_writer()`.
        make_image: Turns a uint8 [H, W, 3] array into what `run.log` shows: `wandb.Image`.
        heat_map_every: Steps between two heat maps; 0 writes none.
    """

    def __init__(self, run, make_image=None, heat_map_every: int = 0):
        self._run = run
        self._make_image = make_image
        self._every = heat_map_every if make_image else 0
        self._history = LayerHistory()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        entries: dict = _finite(values)
        self._history.add(values)
        if self._every and step % self._every == 0:
            images = self._history.images()
            entries |= {name: self._make_image(image) for name, image in images.items()}
        self._run.log(entries, step)

    def close(self) -> None:
        """The run belongs to whoever made it."""


class LayerHistory:
    """The last steps of the per-layer metrics, as pictures: layers down, steps across."""

    def __init__(self) -> None:
        self._columns: dict[str, deque[dict[int, float]]] = {}

    def add(self, values: Mapping[str, float]) -> None:
        """Add one step."""
        columns: dict[str, dict[int, float]] = {}
        for name, value in values.items():
            match = LAYER_SUFFIX.search(name)
            if match is None:
                continue
            metric = name[: match.start()]
            if metric.rpartition("/")[2] in HEAT_METRICS:
                columns.setdefault(metric, {})[int(match.group(1))] = value
        for metric, column in columns.items():
            self._columns.setdefault(metric, deque(maxlen=HEAT_STEPS)).append(column)

    def images(self) -> dict[str, np.ndarray]:
        """uint8 [H, W, 3] by `{metric}_heat_map`: dark is far from agreement, grey is no value."""
        return {f"{metric}_heat_map": _image(list(c)) for metric, c in self._columns.items()}


def _image(columns: Sequence[Mapping[int, float]]) -> np.ndarray:
    layers = sorted({layer for column in columns for layer in column})
    values_LS = np.array([[column.get(i, np.nan) for column in columns] for i in layers])
    known_LS = np.isfinite(values_LS)
    shown = values_LS[known_LS]
    low, high = (shown.min(), shown.max()) if shown.size else (0.0, 0.0)
    level_LS = np.where(known_LS, (values_LS - low) / ((high - low) or 1.0), 0.0)
    # From white to one hue; grey says "no value", which is not an end of the scale.
    hue_C = np.array([130, 30, 20])
    image_LSC = 255 + level_LS[..., None] * (hue_C - 255)
    image_LSC = np.where(known_LS[..., None], image_LSC, 160).astype(np.uint8)
    return image_LSC.repeat(HEAT_PIXELS, 0).repeat(HEAT_PIXELS, 1)


def open_sinks(
    names: Sequence[str],
    directory: str | os.PathLike[str] = "",
    *,
    heat_map_every: int = 0,
    megatron_writers: Sequence = (),
    first_step: int | None = None,
) -> list[Sink]:
    """Open the named sinks. Call it on the one rank that writes.

    Args:
        names: Of `SINKS`; each is opened once.
        directory: Of metrics.jsonl and tensorboard/; `DEFAULT_DIRECTORY` if empty.
        heat_map_every: Steps between two heat maps of layers over steps; 0 writes none.
        megatron_writers: For "megatron": what its `get_tensorboard_writer()` and
            `get_wandb_writer()` return on that rank (its last one); None entries are skipped.
        first_step: Of a resumed run: what TensorBoard shows of later steps is dropped.

    Raises:
        ConfigError: A sink is unknown, its package is missing, or Megatron has no open writer.
    """
    directory = Path(directory or DEFAULT_DIRECTORY)
    every = heat_map_every
    sinks: list[Sink] = []
    for name in dict.fromkeys(names):
        match name:
            case "jsonl":
                sinks.append(JsonLinesSink(directory))
            case "tensorboard":
                module = _import("torch.utils.tensorboard", "tensorboard")
                writer = module.SummaryWriter(directory / "tensorboard", purge_step=first_step)
                sinks.append(TensorBoardSink(writer, every))
            case "wandb":
                wandb = _import("wandb", "wandb")
                run = wandb.run or wandb.init(dir=directory)
                sinks.append(WandbSink(run, wandb.Image, every))
            case "megatron":
                sinks += _megatron_sinks(megatron_writers, every)
            case _:
                raise ConfigError("unknown sink", expected=", ".join(SINKS), got=repr(name))
    return sinks


def _megatron_sinks(writers: Sequence, every: int) -> list[Sink]:
    sinks: list[Sink] = []
    for writer in writers:
        if hasattr(writer, "add_scalar"):
            sinks.append(TensorBoardSink(writer, every))
        elif hasattr(writer, "log"):
            sinks.append(WandbSink(writer, getattr(writer, "Image", None), every))
    if not sinks:
        raise ConfigError(
            "no writer of Megatron is open on this rank",
            expected="--tensorboard-dir or --wandb-project",
            fix="Write on Megatron's last rank, where its writers are, or choose another sink",
        )
    return sinks


def _import(module: str, package: str):
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"the sink needs the package {package}", got=error, fix=f"pip install {package}"
        ) from error


def _finite(values: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in values.items() if math.isfinite(value)}


def _drop_cut_line(path: Path) -> None:
    if not path.exists():
        return
    with open(path, "rb+") as file:
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)
