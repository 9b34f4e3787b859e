"""Payloads that the engines send by themselves: SGLang's int32, vLLM's arrays.

Neither says what it holds: the model's shape is given, and dense layers are dropped.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np

from ..errors import PayloadError
from .payload_text import FIELD, absent, damaged, from_base64, size_bytes
from .routes import Origin, Routes, compact_dtype
from .shape import MoEShape

# Version 1.0 of the format, as numpy writes it for arrays of integers in C order.
NPY_MAGIC = b"\x93NUMPY\x01\x00"
NPY_HEADER = re.compile(
    r"\{'descr': '(?P<dtype>[<|][iu][1248])', 'fortran_order': False, "
    r"'shape': \((?P<shape>[0-9, ]{1,80})\), \} *\n"
)


def decode_stock(data: bytes, meta_info: Mapping, num_rows: int, model: MoEShape | None) -> Routes:
    """The routes of SGLang's own payload: int32 [num_rows, L, K] and no header.

    Raises:
        PayloadError: No model to compare with, or bytes of another size.
        RoutesError: The content cannot be true.
    """
    if model is None:
        raise PayloadError(
            "a stock payload does not describe itself",
            expected="the model's layers, number of experts and top-k",
            got="none",
            fix="Pass model=MoEShape(...), or use the compact payload",
        )
    row_bytes = 4 * model.top_k * num_rows
    num_layers = len(data) // row_bytes if row_bytes > 0 else 0
    if num_rows < 0 or num_layers * row_bytes != len(data) or (num_rows and not num_layers):
        raise PayloadError(
            "a stock payload of another size",
            expected=f"a multiple of {num_rows} rows x {model.top_k} slots x 4 bytes",
            got=f"{len(data)} bytes",
            fix="The server ignored routed_experts_start_len, or runs another model",
        )
    ids_TLK = np.frombuffer(data, "<i4").reshape(num_rows, num_layers, model.top_k)
    return _from_wide(ids_TLK, model, is_retracted=bool(meta_info.get("num_retractions")))


def decode_vllm(
    choice: Mapping, *, num_tokens: int, model: MoEShape, num_prompt_tokens: int | None = None
) -> Routes:
    """The routes of one choice of vLLM: written from its documented formats, not run against it.

    Since 0.22 `routed_experts` is a base64 .npy of uint8 or uint16 [num_tokens - 1, L, K]; 0.21
    sent `prompt_routed_experts` [P, L, K] apart; before it nested lists came. L is the number of
    routed layers or of all layers.

    Raises:
        PayloadError: No routes, damaged bytes, wrong counts or layers.
        RoutesError: The content cannot be true.
    """
    parts = [choice[name] for name in ("prompt_" + FIELD, FIELD) if choice.get(name) is not None]
    if not parts:
        raise absent("vLLM's answer")
    try:
        ids_TLK = np.concatenate([_array_of(part) for part in parts])
    except ValueError as error:
        raise damaged("arrays of one shape", error) from error
    if ids_TLK.ndim != 3 or ids_TLK.shape[2] != model.top_k or len(ids_TLK) != num_tokens - 1:
        raise PayloadError(
            "vLLM's routes have another shape",
            expected=f"({num_tokens - 1}, L, {model.top_k})",
            got=ids_TLK.shape,
        )
    origin_T = None
    if num_prompt_tokens is not None:
        rows_T = np.arange(num_tokens - 1)
        origin_T = np.where(rows_T < num_prompt_tokens, Origin.PREFILL, Origin.DECODE)
        origin_T = origin_T.astype(np.uint8)
    return _from_wide(ids_TLK, model, origin_T=origin_T)


def _from_wide(ids_TLK, model: MoEShape, *, is_retracted: bool = False, origin_T=None) -> Routes:
    """Routes of an array that may hold dense layers too and says nothing of its rows."""
    num_layers = ids_TLK.shape[1]
    layers = list(model.layers)
    if ids_TLK.size and num_layers != len(layers):
        if num_layers <= max(layers):
            raise PayloadError(
                "routes of another number of layers",
                expected=f"{len(layers)} routed or more than {max(layers)} layers in all",
                got=num_layers,
            )
        dense = np.setdiff1d(np.arange(num_layers), layers)
        if ids_TLK[:, dense].any():
            raise PayloadError(
                "a layer that is said to be dense has routes",
                expected=f"routed layers {layers}",
                got=[int(layer) for layer in dense if ids_TLK[:, layer].any()],
            )
        ids_TLK = ids_TLK[:, layers]
    if ids_TLK.size and not 0 <= int(ids_TLK.min()) <= int(ids_TLK.max()) < model.num_experts:
        raise PayloadError(
            "expert id out of range",
            expected=f"0..{model.num_experts - 1}",
            got=f"{ids_TLK.min()}..{ids_TLK.max()}",
            fix="The server runs another model, or the bytes are damaged",
        )
    shape = (len(ids_TLK), len(layers), model.top_k)
    ids_TLK = ids_TLK.astype(compact_dtype(model.num_experts)).reshape(shape)
    # A row that is zero everywhere was never captured; with one slot zero may be a choice.
    covered_T = ids_TLK.any((1, 2)) if model.top_k > 1 else np.ones(len(ids_TLK), np.bool_)
    # After a retraction a stock server returns rows of another forward pass and cannot say which.
    covered_T &= not is_retracted
    if origin_T is not None:
        origin_T = np.where(covered_T, origin_T, Origin.ABSENT).astype(np.uint8)
    return Routes(
        expert_ids_TLK=ids_TLK,
        covered_T=covered_T,
        layers=model.layers,
        num_experts=model.num_experts,
        origin_T=origin_T,
    )


def _array_of(value) -> np.ndarray:
    """An array from a base64 .npy or from nested lists; object arrays are refused."""
    if not isinstance(value, (str, bytes)):
        array = np.asarray(value)
    else:
        array = _read_npy(from_base64(value))
    if array.dtype.kind not in "iu":
        raise damaged("an array of integers", array.dtype)
    return array


def _read_npy(data: bytes) -> np.ndarray:
    """numpy's own reader allocates whatever the header says, and parses it as Python."""
    header_bytes = int.from_bytes(data[8:10], "little")
    text = data[10 : 10 + header_bytes].decode("latin1")
    match = NPY_HEADER.fullmatch(text) if data[:8] == NPY_MAGIC else None
    if match is None:
        raise damaged("an .npy file of integers in C order", data[:32])
    dtype = np.dtype(match["dtype"])
    shape = tuple(int(size) for size in match["shape"].split(",") if size.strip())
    rest = data[10 + header_bytes :]
    if size_bytes(dtype, shape) != len(rest):
        raise damaged(f"{size_bytes(dtype, shape)} bytes for {shape} of {dtype}", len(rest))
    return np.frombuffer(rest, dtype).reshape(shape)
