"""Where metrics go: JSON lines, TensorBoard, Weights & Biases, Megatron's own writers.

A sink takes the metrics of one step (`typed.to_floats`) on one rank; the reduction over ranks has
happened before. A value that is not finite (nothing was seen) is null in JSON and left out
elsewhere.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from ..errors import ConfigError, DataError, unknown_name, writing
from .typed import LayerValues, Value

SINKS = ("jsonl", "tensorboard", "wandb", "megatron")
# Folder of metrics.jsonl and tensorboard/ in a job that names none.
DEFAULT_DIRECTORY = "routing_replay_metrics"


class Sink(Protocol):
    """Takes one step's metrics at a time."""

    def write(self, step: int, values: Mapping[str, Value]) -> None: ...

    def close(self) -> None: ...


class JsonLinesSink:
    """metrics.jsonl: one object per step, readable while the run goes on and after a crash.

    A metric of the layers is `{"mean": 0.9, "layers": {"0": 0.8, "3": 1.0}}`.

    Args:
        directory: Made if it does not exist. Lines of an earlier run stay; a line that a crash cut
            short is removed first, so that the file is always whole lines.

    Raises:
        DataError: The file cannot be written.
    """

    def __init__(self, directory: str | os.PathLike[str]):
        self.path = Path(directory) / "metrics.jsonl"
        self._started = time.monotonic()
        with writing(self.path, "the metrics", DataError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _drop_cut_line(self.path)
            self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115

    def write(self, step: int, values: Mapping[str, Value]) -> None:
        row: dict[str, Any] = {
            "step": step,
            "time_s": round(time.monotonic() - self._started, 3),
        }
        self._started = time.monotonic()
        row |= {name: _as_json(value) for name, value in values.items()}
        with writing(self.path, "the metrics", DataError):
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())  # a step on record is never half there

    def close(self) -> None:
        self._file.close()


class TensorBoardSink:
    """Scalars of a SummaryWriter: Megatron's (`get_tensorboard_writer()`) or one of ours."""

    def __init__(self, writer: Any):
        self._writer = writer

    def write(self, step: int, values: Mapping[str, Value]) -> None:
        for name, value in scalars(values).items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()  # a crash loses no finished step

    def close(self) -> None:
        """Flush: the writer belongs to whoever made it."""
        self._writer.flush()


class WandbSink:
    """Scalars of a run of Weights & Biases: `wandb.init(...)`, or Megatron's."""

    def __init__(self, run: Any):
        self._run = run

    def write(self, step: int, values: Mapping[str, Value]) -> None:
        # One call per step: wandb refuses values of a step that a later call has closed.
        self._run.log(scalars(values), step)

    def close(self) -> None:
        """Do nothing: the run belongs to whoever made it."""


def scalars(values: Mapping[str, Value]) -> dict[str, float]:
    """Return finite values under the names of scalar sinks; a layer's is `NAME_layer_{i}`."""
    expanded: dict[str, float] = {}
    for name, value in values.items():
        if not isinstance(value, LayerValues):
            expanded[name] = value
            continue
        if value.mean is not None:
            expanded[name] = value.mean
        expanded |= {f"{name}_layer_{layer}": v for layer, v in value.layers.items()}
    return {name: value for name, value in expanded.items() if math.isfinite(value)}


def open_sinks(
    names: Iterable[str],
    directory: str | os.PathLike[str] = DEFAULT_DIRECTORY,
    *,
    megatron_writers: Sequence[Any] = (),
    first_step: int | None = None,
) -> list[Sink]:
    """Open sinks by name. Call it on the one rank that writes.

    Args:
        names: Of "jsonl", "tensorboard", "wandb" and "megatron"; each is opened once.
        directory: Folder of metrics.jsonl, of tensorboard/ and of what wandb keeps.
        megatron_writers: For "megatron": what its `get_tensorboard_writer()` and
            `get_wandb_writer()` return on that rank (its last one); None entries are skipped.
        first_step: Of a resumed run: TensorBoard drops what it shows of this step and later ones.

    Raises:
        ConfigError: An unknown name, a package is missing, or "megatron" without an open writer.
    """
    directory = Path(directory)
    sinks: list[Sink] = []
    for name in dict.fromkeys(names):  # two JSON-lines sinks would write every step twice
        match name:
            case "jsonl":
                sinks.append(JsonLinesSink(directory))
            case "tensorboard":
                module = _import("torch.utils.tensorboard", "tensorboard")
                writer = module.SummaryWriter(directory / "tensorboard", purge_step=first_step)
                sinks.append(TensorBoardSink(writer))
            case "wandb":
                wandb = _import("wandb", "wandb")
                sinks.append(WandbSink(wandb.run or wandb.init(dir=directory)))
            case "megatron":
                sinks += _megatron_sinks(megatron_writers)
            case _:
                raise unknown_name("sink of metrics", name, SINKS)
    return sinks


def _megatron_sinks(writers: Sequence[Any]) -> list[Sink]:
    sinks: list[Sink] = []
    for writer in writers:
        if hasattr(writer, "add_scalar"):
            sinks.append(TensorBoardSink(writer))
        elif hasattr(writer, "log"):
            sinks.append(WandbSink(writer))
    if not sinks:
        raise ConfigError(
            "no writer of Megatron is open on this rank",
            expected="--tensorboard-dir or --wandb-project",
            fix="Write on Megatron's last rank, where its writers are, or choose another sink",
        )
    return sinks


def _import(module: str, package: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"the sink needs the package {package}", got=error, fix=f"pip install {package}"
        ) from error


def _as_json(value: Value) -> Any:
    if not isinstance(value, LayerValues):
        return value if math.isfinite(value) else None
    layers = {str(layer): _as_json(v) for layer, v in value.layers.items()}
    if value.mean is None:
        return {"layers": layers}
    return {"mean": _as_json(value.mean), "layers": layers}


def _drop_cut_line(path: Path) -> None:
    if not path.exists():
        return
    with open(path, "rb+") as file:
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)
