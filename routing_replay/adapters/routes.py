"""Routes and tokens as frameworks carry them: one function per form, each to one item a sequence.

routed = of_padded(data["routed_experts"], data["attention_mask"])     # or of_nested, of_packed
batch = StepBatch(tokens=of_padded(data["input_ids"], data["attention_mask"]), routed=routed)
batch.table(shape)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from ..errors import RoutesError
from ..routes.origin import Origin
from ..routes.payload import FIELD, decode
from ..routes.routes import ROW_COLUMNS, Routes
from ..routes.shape import MoEShape
from ..routes.stock import from_wide

# One sequence's routes: ids [T, L or more, K], or SGLang's payload, or `Routes`.
Routed = torch.Tensor | np.ndarray | str | Routes


def of_nested(values: torch.Tensor) -> list[np.ndarray]:
    """Return the sequences of a nested tensor, jagged or strided: arrays [n, ...]."""
    if not values.is_nested:
        raise RoutesError("the values are not nested", expected="a nested tensor", got=values.shape)
    return [as_array(part) for part in values.unbind()]


def of_padded(values_BS: Any, mask_BS: Any) -> list[np.ndarray]:
    """Return the sequences of a padded batch: arrays [n, ...].

    Args:
        values_BS: [B, S, ...], padded on any side.
        mask_BS: [B, S], nonzero where a token is real.

    Raises:
        RoutesError: A mask of another shape.
    """
    values_BS, mask_BS = as_array(values_BS), as_array(mask_BS).astype(bool)
    if mask_BS.shape != values_BS.shape[:2]:
        raise RoutesError(
            "the mask does not fit the padded batch",
            expected=f"[B, S] of {list(values_BS.shape)}",
            got=list(mask_BS.shape),
        )
    return [values[mask] for values, mask in zip(values_BS, mask_BS, strict=True)]


def of_packed(values_T: Any, cu_seqlens: Any) -> list[np.ndarray]:
    """Return the sequences of a packed batch: arrays [n, ...].

    Args:
        values_T: [T, ...], one sequence after another.
        cu_seqlens: int [B + 1], ascending from 0 to T.

    Raises:
        RoutesError: Bounds that do not describe the values.
    """
    values_T, bounds = as_array(values_T), as_array(cu_seqlens).astype(np.int64)
    if not len(bounds) or bounds[0] or bounds[-1] != len(values_T) or (np.diff(bounds) < 0).any():
        raise RoutesError(
            "cu_seqlens do not describe the packed values",
            expected=f"ascending from 0 to {len(values_T)}",
            got=bounds.tolist()[:8],
        )
    return np.split(values_T, bounds[1:-1]) if len(bounds) > 1 else []


def as_array(values: Any) -> np.ndarray:
    """Return a tensor of any device, an array or nested lists as an array on the host."""
    return values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)


def routes_of(
    routed: Routed, num_tokens: int, shape: MoEShape, missing: int | None = None
) -> Routes:
    """Return one sequence's routes, of `num_tokens - 1` rows.

    Args:
        routed: Ids [T, L, K] of the routed layers or of all, any integer type; base64 text of
            SGLang's payload, stock or compact; or `Routes`. Fewer rows than tokens leave the other
            rows uncovered; one row more than needed belongs to the last token, which no model fed.
        num_tokens: Prompt and response tokens of the sequence.
        shape: Of the model that will replay them.
        missing: An id that stands for "no route": its rows are uncovered.

    Raises:
        PayloadError: Another shape, or ids of another model.
        RoutesError: More rows than tokens, or content that cannot be true.
    """
    if isinstance(routed, str):
        return decode({FIELD: routed}, num_tokens=num_tokens, shape=shape)
    if isinstance(routed, Routes):
        shape.require_equal(routed.shape, "the routes belong to another model")
        return _of_length(routed, num_tokens)
    ids_TLK = as_array(routed)
    is_missing_T = np.zeros(len(ids_TLK), np.bool_)
    if missing is not None:
        is_missing_T = (ids_TLK == missing).any(tuple(range(1, ids_TLK.ndim)))
        ids_TLK = np.where(is_missing_T.reshape(-1, *[1] * (ids_TLK.ndim - 1)), 0, ids_TLK)
    routes = from_wide(ids_TLK, shape)
    routes.covered_T[is_missing_T] = False
    routes.origin_T[is_missing_T] = Origin.NOT_CAPTURED
    return _of_length(routes, num_tokens)


def _of_length(routes: Routes, num_tokens: int) -> Routes:
    """Cut the last token's row, or add uncovered rows, so that there are `num_tokens - 1`."""
    if routes.num_rows > max(num_tokens, 1):
        raise RoutesError(
            "the routes belong to other tokens: they have more rows than the sequence has tokens",
            expected=f"at most {num_tokens} rows",
            got=routes.num_rows,
            fix="Cut the padding of tokens and routes alike; train on the tokens as rolled out",
        )
    num_missing = num_tokens - 1 - routes.num_rows
    if num_missing <= 0:
        return routes[: num_tokens - 1]
    columns = {name: getattr(routes, name) for name in ROW_COLUMNS}
    longer: dict[str, Any] = {
        name: np.pad(values, [(0, num_missing), *[(0, 0)] * (values.ndim - 1)])
        for name, values in columns.items()
        if values is not None
    }
    longer["origin_T"][-num_missing:] = Origin.NOT_CAPTURED
    longer["weight_version_T"][-num_missing:] = -1
    return replace(routes, **longer)


def sequences(values: Sequence[Any]) -> list[np.ndarray]:
    """Return token ids of sequences, tensors or lists, as int64 arrays [n].

    Raises:
        RoutesError: A sequence that is not one line of integers.
    """
    arrays = [as_array(value) for value in values]
    for number, array in enumerate(arrays):
        if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
            raise RoutesError(
                "the tokens of a sequence are not one line of integers",
                expected="integers [n]",
                got=f"{array.dtype} {list(array.shape)}",
                where=f"sequence {number}",
            )
    return [array.astype(np.int64) for array in arrays]
