"""Wide arrays, as stock SGLang and other tools hold expert ids: int32 [T, all layers, K].

Dense layers are zero. The array does not say which model made it, which layers are routed, or which
rows are true.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..errors import DataError, PayloadError
from .origin import Origin, is_covered
from .routes import Routes, compact_dtype
from .shape import MoEShape


def decode_stock(
    data: bytes, meta_info: Mapping[str, Any], num_rows: int, shape: MoEShape | None
) -> Routes:
    """Return the routes of SGLang's own payload, which is the array without a header.

    Args:
        data: The payload's bytes.
        meta_info: Of the same answer; after a retraction no row is covered.
        num_rows: Rows that the request must have.
        shape: Of the model in training.

    Raises:
        PayloadError: No shape to read it by, or bytes of another size.
        RoutesError: The content cannot be true.
    """
    if shape is None:
        raise PayloadError(
            "a stock payload does not describe itself",
            expected="the model's layers, number of experts and top-k",
            got="none",
            fix="Pass shape=MoEShape(...), or use the compact payload",
        )
    row_bytes = 4 * shape.top_k * num_rows
    num_layers = len(data) // row_bytes if row_bytes > 0 else 0
    if num_rows < 0 or num_layers * row_bytes != len(data) or (num_rows and not num_layers):
        raise PayloadError(
            "a stock payload has another size",
            expected=f"a multiple of {num_rows} rows x {shape.top_k} slots x 4 bytes",
            got=f"{len(data)} bytes",
            fix="The server ignored routed_experts_start_len, or runs another model",
        )
    ids_TLK = np.frombuffer(data, "<i4").reshape(num_rows, num_layers, shape.top_k)
    return from_wide(ids_TLK, shape, is_retracted=bool(meta_info.get("num_retractions")))


def from_wide(ids_TLK: np.ndarray, shape: MoEShape, *, is_retracted: bool = False) -> Routes:
    """Return the routes of an array of the routed layers, or of all layers.

    Args:
        ids_TLK: Integers [T, L or more, K].
        shape: Which layers are routed.
        is_retracted: The engine computed the sequence twice, so no row is covered.

    Raises:
        PayloadError: Other layers, another top-k, or ids of another model.
        RoutesError: The content cannot be true.
    """
    if ids_TLK.ndim != 3 or ids_TLK.shape[2] != shape.top_k or ids_TLK.dtype.kind not in "iu":
        raise PayloadError(
            "the expert ids have another shape",
            expected=f"integers [T, L, {shape.top_k}]",
            got=f"{ids_TLK.dtype} {ids_TLK.shape}",
        )
    if ids_TLK.size and ids_TLK.shape[1] != len(shape.layers):
        ids_TLK = _routed_layers(ids_TLK, shape)
    # Before the cast below, which would wrap a wide id around to a valid one.
    if ids_TLK.size and not 0 <= int(ids_TLK.min()) <= int(ids_TLK.max()) < shape.num_experts:
        raise PayloadError(
            "an expert id is out of range",
            expected=f"0..{shape.num_experts - 1}",
            got=f"{ids_TLK.min()}..{ids_TLK.max()}",
            fix="The server runs another model, or the bytes are damaged",
        )
    num_rows = len(ids_TLK)
    ids_TLK = ids_TLK.astype(compact_dtype(shape.num_experts))
    ids_TLK = ids_TLK.reshape(num_rows, len(shape.layers), shape.top_k)
    # A row that is zero everywhere was never captured; with one slot zero may be a choice.
    covered_T = np.ones(num_rows, np.bool_)
    if shape.top_k > 1:
        covered_T = np.asarray(ids_TLK.any((1, 2)))
    # After a retraction a stock server returns rows of another forward pass and cannot say which.
    known = Origin.RETRACTED if is_retracted else Origin.PREFILL
    origin_T = np.where(covered_T, known, Origin.ABSENT).astype(np.uint8)
    return Routes(
        expert_ids_TLK=ids_TLK,
        covered_T=is_covered(origin_T),
        layers=shape.layers,
        num_experts=shape.num_experts,
        origin_T=origin_T,
    )


def to_wide(routes: Routes) -> np.ndarray:
    """Return the array: int32 [T, last routed layer + 1, K].

    Raises:
        DataError: A row is not covered: the array could not say so.
    """
    if not routes.covered_T.all():
        raise DataError(
            "the format knows no missing rows",
            expected="every row covered",
            got=f"{int((~routes.covered_T).sum())} rows that are not",
            fix="Drop the sequences with uncovered rows, or keep our format",
        )
    wide_TLK = np.zeros((routes.num_rows, max(routes.layers) + 1, routes.top_k), np.int32)
    wide_TLK[:, list(routes.layers)] = routes.expert_ids_TLK
    return wide_TLK


def _routed_layers(ids_TLK: np.ndarray, shape: MoEShape) -> np.ndarray:
    layers, num_layers = list(shape.layers), ids_TLK.shape[1]
    if num_layers <= max(layers):
        raise PayloadError(
            "the expert ids are of another number of layers",
            expected=f"{len(layers)} routed or more than {max(layers)} layers in all",
            got=num_layers,
        )
    dense = np.setdiff1d(np.arange(num_layers), layers)
    if ids_TLK[:, dense].any():
        raise PayloadError(
            "a layer that should be dense has routes",
            expected=f"routed layers {layers}",
            got=[int(layer) for layer in dense if ids_TLK[:, layer].any()],
        )
    return ids_TLK[:, layers]
