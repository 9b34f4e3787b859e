"""Sequences to a routes file without holding them: first a spool on the disk, then the file.

A routes file is layer first, so its bytes can be placed only when all rows are known.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import numpy as np

from ..errors import DataError
from .routes import Routes, compact_dtype
from .shape import MoEShape
from .table import RouteTable

# Rows that are turned from token-first to layer-first at a time.
BLOCK_ROWS = 1 << 16


class RouteSpool:
    """Collects sequences beside the target; use as a context manager, then `finish`.

    Args:
        model: Of all sequences.
        target: The routes file; the spool needs about its size again in the same folder.
    """

    def __init__(self, model: MoEShape, target: Path):
        self.shape = model
        self._target = target
        self._columns: dict[str, list[np.ndarray]] = {
            "covered_T": [],
            "origin_T": [],
            "weight_version_T": [],
        }
        self._lengths: list[int] = []
        self._has_gates = True

    def __enter__(self) -> RouteSpool:
        try:
            prefix = f".{self._target.name}."
            self._folder = Path(tempfile.mkdtemp(prefix=prefix, dir=self._target.parent))
        except OSError as error:
            raise DataError(
                "the target cannot be written", got=error.strerror, where=self._target
            ) from error
        self._files = {
            name: open(self._folder / name, "wb")  # noqa: SIM115  (closed in __exit__)
            for name in ("ids", "gates")
        }
        return self

    def __exit__(self, *exception) -> None:
        for file in self._files.values():
            file.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def num_sequences(self) -> int:
        return len(self._lengths)

    def add(self, routes: Routes) -> None:
        """Append one sequence. Gates survive only where every sequence has them."""
        self._files["ids"].write(routes.expert_ids_TLK.tobytes())
        if routes.gate_probs_TLK is None:
            self._has_gates = False
        elif self._has_gates:
            self._files["gates"].write(routes.gate_probs_TLK.tobytes())
        for name, parts in self._columns.items():
            parts.append(getattr(routes, name))
        self._lengths.append(routes.num_rows)

    def finish(self, source: str) -> Path:
        """Write the routes file.

        Args:
            source: "rollout" or "training", as in `RouteTable`.

        Raises:
            DataError: No sequence was added.
        """
        if not self._lengths:
            raise DataError("the file holds no sequence", where=self._target)
        for file in self._files.values():
            file.close()
        tensors = {name: np.concatenate(parts) for name, parts in self._columns.items()}
        tensors["offsets_S1"] = np.concatenate([[0], np.cumsum(self._lengths)]).astype(np.int64)
        dtype = compact_dtype(self.shape.num_experts)
        tensors["expert_ids_LTK"] = self._layer_first("ids", dtype)
        if self._has_gates:
            tensors["gate_probs_LTK"] = self._layer_first("gates", np.dtype(np.float16))
        return RouteTable(self.shape, tensors, source).save(self._target)

    def _layer_first(self, name: str, dtype: np.dtype) -> np.ndarray:
        num_rows, num_layers = sum(self._lengths), len(self.shape.layers)
        top_k = self.shape.top_k
        if not num_rows:
            return np.empty((num_layers, 0, top_k), dtype)
        shape = (num_rows, num_layers, top_k)
        tokens_TLK = np.memmap(self._folder / name, dtype, "r", shape=shape)
        turned = self._folder / f"{name}.layers"
        layers_LTK = np.memmap(turned, dtype, "w+", shape=(num_layers, num_rows, top_k))
        for start in range(0, num_rows, BLOCK_ROWS):
            block = slice(start, start + BLOCK_ROWS)
            layers_LTK[:, block] = tokens_TLK[block].swapaxes(0, 1)
        return layers_LTK
