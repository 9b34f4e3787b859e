"""What is in a routes file: shapes, coverage, origins, versions, load per expert and layer.

It reads memory maps in blocks of rows, so a file may be larger than memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..routes.counts import count_experts
from ..routes.origin import Origin
from ..routes.table import RouteTable

# Rows of one layer that are counted at a time: 512 KiB of ids at top-8, a core's cache.
BLOCK_ROWS = 1 << 16


@dataclass(frozen=True, kw_only=True)
class LayerLoad:
    """How evenly one layer spreads its covered rows.

    Args:
        layer: Global 0-based index.
        max_violation: Largest load / mean load - 1; 0 is even.
        entropy: Of the load distribution, as a share of log E; 1 is even.
        num_dead: Experts without any row.
        busiest: The expert with the largest load.
        busiest_share: Its share of all selections.
    """

    layer: int
    max_violation: float
    entropy: float
    num_dead: int
    busiest: int
    busiest_share: float


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """A table in numbers. `weight_versions` maps a version (-1: unknown) to its rows."""

    where: str
    source: str
    num_rows: int
    num_sequences: int
    shortest: int
    longest: int
    layers: tuple[int, ...]
    num_experts: int
    top_k: int
    coverage: float
    origins: dict[str, int]
    weight_versions: dict[int, int]
    has_weights: bool
    has_gates: bool
    num_logit_rows: int
    size_bytes: int
    bytes_per_row: float
    loads: tuple[LayerLoad, ...]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def text(self) -> str:
        """Return the human-readable report: a header, then one line per layer."""
        origins = ", ".join(f"{name} {count}" for name, count in self.origins.items() if count)
        versions = ", ".join(
            f"{'unknown' if version < 0 else version}: {count}"
            for version, count in self.weight_versions.items()
        )
        extras = ["combine weights"] * self.has_weights + ["gates"] * self.has_gates
        extras += [f"router logits of {self.num_logit_rows} rows"] * bool(self.num_logit_rows)
        lines = [
            f"{self.where} ({self.source} routes)",
            f"  sequences   {self.num_sequences}, rows {self.shortest} to {self.longest}",
            f"  rows        {self.num_rows}, covered {100 * self.coverage:.2f} %",
            f"  model       {len(self.layers)} routed layers, {self.num_experts} experts, "
            f"top-{self.top_k}",
            f"  origins     {origins or 'none'}",
            f"  versions    {versions or 'none'}",
            f"  with        {', '.join(extras) or 'ids only'}",
            f"  size        {self.size_bytes} bytes, {self.bytes_per_row:.1f} per row",
            "",
            "  layer  max violation  entropy  dead  busiest expert",
        ]
        lines += [
            f"  {load.layer:5d}  {load.max_violation:13.3f}  {load.entropy:7.4f}  "
            f"{load.num_dead:4d}  {load.busiest} ({100 * load.busiest_share:.2f} %)"
            for load in self.loads
        ]
        return "\n".join(lines)


def inspect_table(table: RouteTable) -> Inspection:
    """Return a table in numbers; read its ids once, in blocks of rows."""
    lengths_S = np.diff(table.offsets_S1)
    versions, counts = np.unique(table.weight_version_T, return_counts=True)
    origin_counts = np.bincount(table.origin_T, minlength=len(Origin))
    shape = table.shape
    columns = [table.expert_ids_LTK, table.covered_T, table.origin_T, table.weight_version_T]
    optional = (table.combine_weights_LTK, table.gate_probs_LNK, table.logits_NLE)
    columns += [c for c in optional if c is not None]
    size_bytes = sum(column.nbytes for column in columns)
    num_covered = int(np.count_nonzero(table.covered_T))
    return Inspection(
        where=table.where,
        source=table.source,
        num_rows=table.num_rows,
        num_sequences=table.num_sequences,
        shortest=int(lengths_S.min(initial=0 if not len(lengths_S) else lengths_S[0])),
        longest=int(lengths_S.max(initial=0)),
        layers=shape.layers,
        num_experts=shape.num_experts,
        top_k=shape.top_k,
        coverage=num_covered / max(1, table.num_rows),
        origins={o.name.lower(): int(origin_counts[o]) for o in Origin if origin_counts[o]},
        weight_versions={int(v): int(n) for v, n in zip(versions, counts, strict=True)},
        has_weights=table.combine_weights_LTK is not None,
        has_gates=table.gate_probs_LNK is not None,
        num_logit_rows=0 if table.logit_rows_N is None else len(table.logit_rows_N),
        size_bytes=size_bytes,
        bytes_per_row=size_bytes / max(1, table.num_rows),
        loads=tuple(
            _load(layer, counts_E)
            for layer, counts_E in zip(shape.layers, expert_loads(table), strict=True)
        ),
    )


def expert_loads(table: RouteTable) -> Iterator[np.ndarray]:
    """Yield the rows per expert of each layer, int64 [E]; uncovered rows do not count."""
    for ids_TK in table.expert_ids_LTK:
        counts_E = np.zeros(table.shape.num_experts, np.int64)
        for start in range(0, table.num_rows, BLOCK_ROWS):
            block = slice(start, start + BLOCK_ROWS)
            covered_B = table.covered_T[block]
            ids_BK = np.asarray(ids_TK[block])
            # Most tables are covered whole; the selection would copy the block.
            ids_BK = ids_BK if covered_B.all() else ids_BK[covered_B]
            counts_E += count_experts(ids_BK, len(counts_E))
        yield counts_E


def _load(layer: int, counts_E: np.ndarray) -> LayerLoad:
    total = int(counts_E.sum())
    shares_E = counts_E / max(1, total)
    positive = shares_E[shares_E > 0]
    entropy = float(-(positive * np.log(positive)).sum())
    num_experts = len(counts_E)
    return LayerLoad(
        layer=layer,
        max_violation=float(shares_E.max() * num_experts - 1) if total else math.nan,
        entropy=entropy / math.log(num_experts) if num_experts > 1 else 1.0,
        num_dead=int((counts_E == 0).sum()),
        busiest=int(counts_E.argmax()),
        busiest_share=float(shares_E.max()),
    )
