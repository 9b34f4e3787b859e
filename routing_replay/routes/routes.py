"""Routes: the expert selections of one sequence, validated on construction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..errors import RoutesError
from .origin import Origin
from .shape import MoEShape

ONE_BITS, MINUS_ZERO_BITS = 0x3C00, 0x8000  # as float16
# Rows that are searched for doubled experts at a time: with 8 slots of one byte they fill half of
# a processor's first or second cache.
CHUNK_ROWS = 1 << 14
ROW_COLUMNS = (
    "expert_ids_TLK",
    "covered_T",
    "combine_weights_TLK",
    "gate_probs_TLK",
    "origin_T",
    "weight_version_T",
)
COMPACT_LIMIT = 256  # the largest number of experts whose ids fit in one byte


def compact_dtype(num_experts: int) -> np.dtype:
    """Return the type in which ids are kept: uint8 up to 256 experts, uint16 above."""
    return np.dtype(np.uint8 if num_experts <= COMPACT_LIMIT else np.uint16)


@dataclass(frozen=True, kw_only=True, eq=False)
class RouterLogits:
    """Full router logits of a sample of rows.

    Args:
        rows_N: int64, ascending row numbers within the sequence.
        values_NLE: float16 or float32, the router's logits before any score function.
    """

    rows_N: np.ndarray
    values_NLE: np.ndarray

    def select(self, is_kept_N: np.ndarray, start: int = 0) -> RouterLogits:
        """Return the sampled rows of a mask, numbered from row `start` on."""
        return RouterLogits(
            rows_N=self.rows_N[is_kept_N] - start, values_NLE=self.values_NLE[is_kept_N]
        )

    def take(self, rows_T: np.ndarray) -> RouterLogits:
        """Return the logits of row `rows_T[t]` as those of row t, where they were sampled."""
        index_T = np.searchsorted(self.rows_N, rows_T)
        index_T[index_T == len(self.rows_N)] = 0
        is_sampled_T = np.isin(rows_T, self.rows_N)
        return RouterLogits(
            rows_N=np.flatnonzero(is_sampled_T), values_NLE=self.values_NLE[index_T[is_sampled_T]]
        )

    def within(self, low: int, high: int, shift: int = 0) -> RouterLogits:
        """Return copies of the rows low .. high - 1, with their numbers moved by `shift`."""
        return self.select((self.rows_N >= low) & (self.rows_N < high), -shift)


@dataclass(frozen=True, kw_only=True, eq=False)
class Routes:
    """The experts that every routed layer chose for the tokens of one sequence.

    Row t is the routing of the forward pass that consumed token t. A sequence of n tokens has at
    most n - 1 rows: the last sampled token was never fed to the model. The content of a row that is
    not covered means nothing: replay routes its token live.

    Args:
        expert_ids_TLK: uint8 (num_experts <= 256) or uint16, slots in the order the engine chose.
        covered_T: bool, the row is known to be true. All, if None.
        layers: Global 0-based indices of the L routed layers, ascending (dense and hash-routed
            layers are left out).
        num_experts: E, routed experts per layer.
        combine_weights_TLK: float32, the factor of each selected expert's output in the layer's
            sum, after renormalisation and scaling; None if they were not captured.
        gate_probs_TLK: float16, probability of each selected expert over ALL experts, before any
            renormalisation; None if they were not captured.
        router_logits: Full logits of a sample of rows; None if they were not captured.
        origin_T: uint8 of `Origin`: the forward pass of a covered row, why another one is not
            covered. PREFILL and ABSENT, if None.
        weight_version_T: int64 version of the weights that computed the row, -1 unknown.

    Raises:
        RoutesError: Shapes that do not agree, ids out of range, an expert twice in a row, a layer
            that is zero in every covered row.
    """

    expert_ids_TLK: np.ndarray
    layers: tuple[int, ...]
    num_experts: int
    # The three columns that are None here are filled in __post_init__.
    covered_T: np.ndarray = None  # type: ignore[assignment]
    combine_weights_TLK: np.ndarray | None = None
    gate_probs_TLK: np.ndarray | None = None
    router_logits: RouterLogits | None = None
    origin_T: np.ndarray = None  # type: ignore[assignment]
    weight_version_T: np.ndarray = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(int(layer) for layer in self.layers))
        _check_shape(self)
        _fill_defaults(self)
        _check_rows(self)
        _check_weights(self)
        _check_gates(self)

    @classmethod
    def unchecked(cls, **columns: Any) -> Routes:
        """Return routes of all columns without a look at them: for the server's own loop."""
        routes = object.__new__(cls)
        for name, column in columns.items():
            object.__setattr__(routes, name, column)
        return routes

    @property
    def shape(self) -> MoEShape:
        """Layers, number of experts and top-k."""
        return MoEShape(layers=self.layers, num_experts=self.num_experts, top_k=self.top_k)

    @property
    def num_rows(self) -> int:
        return int(self.expert_ids_TLK.shape[0])

    @property
    def top_k(self) -> int:
        return int(self.expert_ids_TLK.shape[2])

    @property
    def size_bytes(self) -> int:
        return sum(column.nbytes for column in self._columns().values())

    def __getitem__(self, rows: slice) -> Routes:
        """Return the routes of a contiguous range of rows."""
        start, stop, step = rows.indices(self.num_rows)
        if step != 1:
            raise RoutesError("routes can only be sliced contiguously", expected="step 1", got=step)
        logits = self.router_logits
        if logits is not None:
            logits = logits.within(start, stop, shift=-start)
        columns = {name: column[start:stop] for name, column in self._columns().items()}
        return replace(self, **columns, router_logits=logits)

    def take(self, rows_T: np.ndarray) -> Routes:
        """Return row `rows_T[t]` as row t; -1 gives a row that is not covered.

        Args:
            rows_T: int64, below `num_rows`.
        """
        columns = {name: column[np.maximum(rows_T, 0)] for name, column in self._columns().items()}
        columns["covered_T"] &= rows_T >= 0
        columns["origin_T"][rows_T < 0] = Origin.ABSENT
        logits = None if self.router_logits is None else self.router_logits.take(rows_T)
        return replace(self, **columns, router_logits=logits).uncover(rows_T < 0)

    def _columns(self) -> dict[str, Any]:
        """The columns with one entry per row, without those that were not captured."""
        columns = {name: getattr(self, name) for name in ROW_COLUMNS}
        return {name: column for name, column in columns.items() if column is not None}

    def without_versions_before(self, weight_version: int) -> Routes:
        """Return these routes with rows of older or unknown weights uncovered."""
        return self.uncover(np.less(self.weight_version_T, weight_version), Origin.STALE)

    def uncover(self, rows_T: np.ndarray, cause: Origin = Origin.ABSENT) -> Routes:
        """Return these routes with the rows of a bool mask uncovered and their content zero."""
        if rows_T.shape != (self.num_rows,) or rows_T.dtype != np.bool_:
            raise RoutesError(
                "the rows to uncover must be a mask over all rows",
                expected=f"bool ({self.num_rows},)",
                got=f"{rows_T.dtype} {rows_T.shape}",
            )

        of_slots = ("expert_ids_TLK", "combine_weights_TLK", "gate_probs_TLK")
        columns = {name: c.copy() for name, c in self._columns().items() if name in of_slots}
        for column_TLK in columns.values():
            column_TLK[rows_T] = 0
        logits = self.router_logits
        if logits is not None:
            logits = logits.select(~rows_T[logits.rows_N])
        return replace(
            self,
            **columns,
            covered_T=self.covered_T & ~rows_T,
            origin_T=np.where(rows_T & self.covered_T, cause, self.origin_T).astype(np.uint8),
            router_logits=logits,
        )


def concatenate(parts: Sequence[Routes]) -> Routes:
    """Join routes; weights, gates and logits survive only where every part has them."""
    first = parts[0]
    for part in parts[1:]:
        first.shape.require_equal(part.shape, "the routes belong to different models")
    starts = np.cumsum([0] + [part.num_rows for part in parts[:-1]])
    columns_of_parts = [part._columns() for part in parts]
    return Routes(
        layers=first.layers,
        num_experts=first.num_experts,
        router_logits=concatenate_logits(parts, starts),
        **{
            name: np.concatenate([columns[name] for columns in columns_of_parts])
            for name in ROW_COLUMNS
            if all(name in columns for columns in columns_of_parts)
        },
    )


def concatenate_logits(parts: Sequence[Routes], starts: np.ndarray) -> RouterLogits | None:
    """Join the logits of all parts, shifted to each part's start; None if a part has none."""
    logits = [part.router_logits for part in parts if part.router_logits is not None]
    if len(logits) < len(parts):
        return None
    return RouterLogits(
        rows_N=np.concatenate([x.rows_N + start for x, start in zip(logits, starts, strict=True)]),
        values_NLE=np.concatenate([x.values_NLE for x in logits]),
    )


def _check_shape(routes: Routes) -> None:
    ids = routes.expert_ids_TLK
    if not isinstance(ids, np.ndarray) or ids.ndim != 3 or ids.shape[1] != len(routes.layers):
        raise RoutesError(
            "expert ids have another shape",
            expected=f"a numpy array with the axes [T, L = {len(routes.layers)}, K]",
            got=getattr(ids, "shape", type(ids).__name__),
        )
    # Reading the shape validates layers, number of experts and top-k.
    dtype = compact_dtype(routes.shape.num_experts)
    if ids.dtype != dtype:
        raise RoutesError(
            f"expert ids of a model with {routes.num_experts} experts have another type",
            expected=dtype,
            got=ids.dtype,
        )


def _fill_defaults(routes: Routes) -> None:
    num_rows = routes.expert_ids_TLK.shape[0]
    if routes.covered_T is None:
        object.__setattr__(routes, "covered_T", np.ones(num_rows, np.bool_))
    if routes.origin_T is None:
        origin_T = np.where(routes.covered_T, Origin.PREFILL, Origin.ABSENT).astype(np.uint8)
        object.__setattr__(routes, "origin_T", origin_T)
    if routes.weight_version_T is None:
        object.__setattr__(routes, "weight_version_T", np.full(num_rows, -1, np.int64))
    types = {"covered_T": np.bool_, "origin_T": np.uint8, "weight_version_T": np.int64}
    for name, dtype in types.items():
        column = getattr(routes, name)
        if column.shape != (num_rows,) or column.dtype != dtype:
            raise RoutesError(
                f"{name} of the routes has another shape or type",
                expected=f"{np.dtype(dtype)} ({num_rows},)",
                got=f"{column.dtype} {column.shape}",
            )


def _check_rows(routes: Routes) -> None:
    ids_CLK = routes.expert_ids_TLK
    if not routes.covered_T.all():
        ids_CLK = ids_CLK[routes.covered_T]
    if not ids_CLK.size:
        return
    rows = np.flatnonzero(routes.covered_T)
    if int(ids_CLK.max()) >= routes.num_experts:
        row, layer, slot = np.argwhere(ids_CLK >= routes.num_experts)[0]
        raise RoutesError(
            "an expert id is out of range",
            expected=f"below {routes.num_experts}",
            got=int(ids_CLK[row, layer, slot]),
            where=f"row {rows[row]}, layer {routes.layers[layer]}, slot {slot}",
            fix="Compare num_experts with the model that the server runs",
        )
    doubled_CL = has_duplicates(ids_CLK)
    if not doubled_CL.any():
        return
    # The most common cause gets its own message: engines leave layers at zero that they did not
    # capture.
    for column, layer in enumerate(routes.layers):
        if routes.top_k > 1 and not ids_CLK[:, column].any():
            raise RoutesError(
                "a layer is zero in every row: the engine did not capture it",
                expected="distinct experts in every row",
                got=f"expert 0 in all {routes.top_k} slots",
                where=f"layer {layer}",
                fix="Name only routed layers; check pipeline stages and in-kernel MoE backends",
            )
    row, column = np.argwhere(doubled_CL)[0]
    raise RoutesError(
        "an expert is selected twice for one token",
        expected=f"{routes.top_k} distinct experts",
        got=ids_CLK[row, column].tolist(),
        where=f"row {rows[row]}, layer {routes.layers[column]}",
        fix="Mark rows that were never captured as uncovered",
    )


def has_duplicates(expert_ids_XK: np.ndarray) -> np.ndarray:
    """Return where the last axis holds some id twice: bool, without that axis.

    Compares slot by slot over a chunk that stays in the cache, because a processor compares
    columns of bytes 32 at a time. Sorting, bit sets and tables of seen experts were 5 to 20 times
    slower.
    """
    ids_XK = expert_ids_XK.reshape(-1, expert_ids_XK.shape[-1])
    doubled_X = np.zeros(len(ids_XK), np.bool_)
    for start in range(0, len(ids_XK), CHUNK_ROWS):
        ids_KC = np.ascontiguousarray(ids_XK[start : start + CHUNK_ROWS].T)
        doubled_C = doubled_X[start : start + CHUNK_ROWS]
        for slot in range(1, len(ids_KC)):
            for other_C in ids_KC[:slot]:
                doubled_C |= ids_KC[slot] == other_C
    return doubled_X.reshape(expert_ids_XK.shape[:-1])


def _check_weights(routes: Routes) -> None:
    weights_TLK = routes.combine_weights_TLK
    if weights_TLK is None:
        return
    if weights_TLK.shape != routes.expert_ids_TLK.shape or weights_TLK.dtype != np.float32:
        raise RoutesError(
            "combine weights of the routes have another shape or type",
            expected=f"float32 {routes.expert_ids_TLK.shape}, a weight for each slot of the ids",
            got=f"{weights_TLK.dtype} {weights_TLK.shape}",
        )
    is_wrong_TLK = (
        ~(np.isfinite(weights_TLK) & (weights_TLK >= 0)) & routes.covered_T[:, None, None]
    )
    if is_wrong_TLK.any():
        row, column, slot = np.argwhere(is_wrong_TLK)[0]
        raise RoutesError(
            "a combine weight is out of range",
            expected="a finite value >= 0",
            got=weights_TLK[row, column, slot],
            where=f"row {row}, layer {routes.layers[column]}, slot {slot}",
        )


def are_probabilities(gates: np.ndarray) -> bool:
    """Return whether all float16 values are finite and in 0..1."""
    # Seen as integers, the float16 from 0 to 1 are 0..ONE_BITS; negative ones, infinity and nan
    # lie above. One pass over integers replaces three over halves, which processors convert first.
    bits = gates.view(np.uint16)
    if not bits.size or bits.max() <= ONE_BITS:
        return True
    return bool(((bits <= ONE_BITS) | (bits == MINUS_ZERO_BITS)).all())


def _check_gates(routes: Routes) -> None:
    gates = routes.gate_probs_TLK
    if gates is not None:
        if gates.shape != routes.expert_ids_TLK.shape or gates.dtype != np.float16:
            raise RoutesError(
                "gate probabilities of the routes have another shape or type",
                expected=f"float16 {routes.expert_ids_TLK.shape}",
                got=f"{gates.dtype} {gates.shape}",
            )
        if not are_probabilities(gates):
            wrong = gates[~((gates >= 0) & (gates <= 1))]
            raise RoutesError(
                "gate probabilities are out of range",
                expected="finite values in 0..1",
                got=f"{len(wrong)} other values, the first of them {wrong[0]}",
            )
    logits = routes.router_logits
    if logits is None:
        return
    shape = (len(logits.rows_N), len(routes.layers), routes.num_experts)
    if logits.values_NLE.shape != shape or not np.isfinite(logits.values_NLE).all():
        raise RoutesError(
            "router logits of the routes have another shape or are not finite",
            expected=f"finite values of shape {shape}",
            got=f"{logits.values_NLE.dtype} {logits.values_NLE.shape}",
        )
    if len(logits.rows_N) and not (
        (np.diff(logits.rows_N) > 0).all()
        and logits.rows_N[0] >= 0
        and logits.rows_N[-1] < routes.num_rows
        and routes.covered_T[logits.rows_N].all()
    ):
        raise RoutesError(
            "the rows of the router logits are out of order or not covered",
            expected=f"ascending covered rows below {routes.num_rows}",
            got=logits.rows_N.tolist()[:8],
        )
