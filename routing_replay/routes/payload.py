"""Routes on the wire: our compact payload; `decode` takes SGLang's own as well.

The compact payload is one byte string, little-endian, base64 in JSON:

    header        the fields of `Header`, 32 bytes
    layers        bitmap of the global indices of the routed layers, `bitmap_bytes` bytes
    runs          `RUN` each: so many rows from here on have this `Origin` and weight version
    body          ids [T, L, K] uint8 (E <= 256) or uint16; then, if flagged, weights [T, L, K]
                  float32, gates [T, L, K] float16, then the logits' rows [N] uint32 and values
                  [N, L, E] float32
    checksum      CRC-32 of everything before it

Its first four bytes are no possible expert id, so a stock payload is told apart by looking. Every
size is computed in Python integers and compared with the bytes at hand before anything is
allocated; nothing is ever unpickled.
"""

from __future__ import annotations

import base64
import binascii
import functools
import importlib
import struct
import zlib
from collections.abc import Mapping, Sequence
from math import prod
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from ..errors import PayloadError
from .origin import Origin, cause_of, is_covered
from .routes import RouterLogits, Routes, compact_dtype
from .shape import MAX_EXPERTS, MoEShape
from .stock import decode_stock

FIELD = "routed_experts"  # SGLang's, in the `meta_info` of an answer
# Version 2 deflated the first bytes of the body, 3 knew no weights, 4 no causes of missing rows.
MAGIC, VERSION = b"RRPL", 5
HEADER = struct.Struct("<4sHHIIHHHHII")
RUN = np.dtype([("num_rows", "<u4"), ("origin", "u1"), ("weight_version", "<i8")])
CHECKSUM = struct.Struct("<I")
HAS_GATES, HAS_LOGITS, HAS_WEIGHTS = 1, 2, 4
Column = tuple[str, np.dtype, tuple[int, ...]]


class Header(NamedTuple):
    """The first bytes of a payload, packed as `HEADER`.

    The flags are HAS_GATES, HAS_LOGITS and HAS_WEIGHTS; `start` is the row of the sequence that
    comes first; `num_logits` rows have full router logits.
    """

    magic: bytes
    version: int
    flags: int
    num_rows: int
    start: int
    num_layers: int
    bitmap_bytes: int
    top_k: int
    num_experts: int
    num_runs: int
    num_logits: int

    def columns(self) -> list[Column]:
        """Name, dtype and shape of the arrays in the body, in their order."""
        shape = (self.num_rows, self.num_layers, self.top_k)
        columns: list[Column] = [("ids", compact_dtype(self.num_experts).newbyteorder("<"), shape)]
        if self.flags & HAS_WEIGHTS:
            columns.append(("weights", np.dtype("<f4"), shape))
        if self.flags & HAS_GATES:
            columns.append(("gates", np.dtype("<f2"), shape))
        if self.flags & HAS_LOGITS:
            logits = (self.num_logits, self.num_layers, self.num_experts)
            columns.append(("rows", np.dtype("<u4"), (self.num_logits,)))
            columns.append(("logits", np.dtype("<f4"), logits))
        return columns


def encode(routes: Routes, *, start: int = 0) -> bytes:
    """Return the compact payload of some routes.

    Args:
        routes: The rows to send, the first of them being row `start` of the sequence.
        start: Row of the sequence at which they begin.
    """
    return b"".join(parts_of(routes, start))


def parts_of(routes: Routes, start: int) -> list[Any]:
    """Return the buffers that make up a payload, for the server to join without a further copy."""
    runs, bitmap, logits = _runs_of(routes), _bitmap_of(routes.layers), routes.router_logits
    header = Header(
        magic=MAGIC,
        version=VERSION,
        flags=HAS_GATES * (routes.gate_probs_TLK is not None)
        | HAS_LOGITS * (logits is not None)
        | HAS_WEIGHTS * (routes.combine_weights_TLK is not None),
        num_rows=routes.num_rows,
        start=start,
        num_layers=len(routes.layers),
        bitmap_bytes=len(bitmap),
        top_k=routes.top_k,
        num_experts=routes.num_experts,
        num_runs=len(runs),
        num_logits=0 if logits is None else len(logits.rows_N),
    )
    arrays: dict[str, np.ndarray | None] = {
        "ids": routes.expert_ids_TLK,
        "weights": routes.combine_weights_TLK,
        "gates": routes.gate_probs_TLK,
        "rows": None if logits is None else logits.rows_N,
        "logits": None if logits is None else logits.values_NLE,
    }
    # Without a copy where an array lies as it is sent: this runs in the server's loop.
    body = [
        np.ascontiguousarray(arrays[name], dtype).reshape(-1).view(np.uint8)
        for name, dtype, _ in header.columns()
    ]
    content: list[Any] = [HEADER.pack(*header), bitmap, runs.tobytes(), *body]
    checksum = 0
    for part in content:
        checksum = zlib.crc32(part, checksum)
    return [*content, CHECKSUM.pack(checksum)]


def decode(
    meta_info: Mapping[str, Any],
    *,
    num_tokens: int,
    shape: MoEShape | None = None,
    start: int = 0,
    accept_stock: bool = True,
) -> Routes:
    """Return the routes in the `meta_info` of a finished SGLang request.

    Args:
        meta_info: Holds the payload under "routed_experts", and perhaps "num_retractions".
        num_tokens: Prompt and output tokens of the request: it has `num_tokens - 1` rows.
        shape: Of the model that will replay them; needed for a stock payload, compared otherwise.
        start: The `routed_experts_start_len` of the request; row `start` comes first.
        accept_stock: Whether SGLang's own payload will do; it has no checksum and no origins.

    Returns:
        `num_tokens - 1 - start` rows. Rows of unknown origin are not covered: those of a stock
        payload after a retraction, and those that were never captured.

    Raises:
        PayloadError: No routes, damaged or foreign bytes, another model, wrong counts.
        RoutesError: The content cannot be true.
    """
    data = from_base64(meta_info.get(FIELD))
    if data[: len(MAGIC)] == MAGIC:
        routes, got_start = decode_compact(data)
        if shape is not None:
            shape.require_equal(
                routes.shape,
                "the server runs another model",
                PayloadError,
                fix="Roll out and train the same checkpoint",
            )
    elif not accept_stock:
        raise PayloadError(
            "the server answered with SGLang's own payload",
            expected="a compact payload",
            got=f"{len(data)} bytes without its mark",
            fix="Install routing_replay beside the server and start it with a capture level",
        )
    else:
        routes, got_start = decode_stock(data, meta_info, num_tokens - 1 - start, shape), start
    if (got_start, routes.num_rows) != (start, num_tokens - 1 - start):
        raise PayloadError(
            "the payload covers other tokens",
            expected=f"{num_tokens - 1 - start} rows from row {start}",
            got=f"{routes.num_rows} rows from row {got_start}",
            fix="Decode with the prompt, output and start of the same request",
        )
    return routes


def decode_compact(data: bytes) -> tuple[Routes, int]:
    """Return the routes of a compact payload and the row of the sequence at which they begin.

    Raises:
        PayloadError: Damaged, cut short, of another version, or with a header that does not fit.
        RoutesError: The content cannot be true.
    """
    if len(data) < HEADER.size + CHECKSUM.size or data[: len(MAGIC)] != MAGIC:
        raise _damaged("a compact payload", f"{len(data)} bytes: {data[:8]!r}")
    header = Header(*HEADER.unpack_from(data))
    if header.version != VERSION:
        raise PayloadError(
            "the payload is of another version",
            expected=VERSION,
            got=header.version,
            fix="Install the same routing_replay beside the server and the trainer",
        )
    (checksum,) = CHECKSUM.unpack_from(data, len(data) - CHECKSUM.size)
    if zlib.crc32(memoryview(data)[: -CHECKSUM.size]) != checksum:
        raise _damaged("its checksum", "another")
    return _unpack(data, header), header.start


def from_base64(text: object) -> bytes:
    """Return the bytes of a payload's JSON string.

    Raises:
        PayloadError: There is none, or it is not base64.
    """
    if text is None:
        raise PayloadError(
            "the answer holds no routes",
            expected=f"a field {FIELD!r}",
            got="none",
            fix="Ask for them in the request and start the server with --enable-return-routed-"
            "experts; if a gateway stands in between, probe() tells whether it drops the field",
        )
    if not isinstance(text, (str, bytes)):
        raise _damaged("a base64 string", type(text).__name__)
    try:
        data: bytes = _base64().b64decode(text, validate=True)
        return data
    except (binascii.Error, ValueError) as error:
        raise _damaged("base64", error) from error


def to_base64(data: bytes) -> str:
    """Return a payload as a JSON string's text."""
    text: bytes = _base64().b64encode(data)
    return text.decode()


@functools.cache
def _base64() -> ModuleType:
    try:
        # The same functions, eight to thirty times faster. It comes with SGLang; a trainer may be
        # without.
        return importlib.import_module("pybase64")
    except ImportError:
        return base64


def _bitmap_of(layers: Sequence[int]) -> bytes:
    bits = np.zeros(layers[-1] + 1 if layers else 0, np.bool_)
    bits[list(layers)] = True
    return np.packbits(bits, bitorder="little").tobytes()


def _runs_of(routes: Routes) -> np.ndarray:
    """Origins and weight versions, run-length coded; the origin says whether a row is covered."""
    origin_T = cause_of(routes.covered_T, routes.origin_T)
    version_T = routes.weight_version_T
    changes = (origin_T[1:] != origin_T[:-1]) | (version_T[1:] != version_T[:-1])
    starts = np.append([0], np.flatnonzero(changes) + 1)[: routes.num_rows]
    runs = np.empty(len(starts), RUN)
    runs["num_rows"] = np.diff(np.append(starts, routes.num_rows))
    runs["origin"] = origin_T[starts]
    runs["weight_version"] = version_T[starts]
    return runs


def _unpack(data: bytes, header: Header) -> Routes:
    """The routes, after every count in the header was compared with the bytes at hand."""
    if not header.num_layers:
        raise PayloadError(
            "no router of the server's model reports its experts",
            expected="at least one routed layer",
            got="none",
            fix="SGLang reports routes for MoE layers of its own that select with its TopK module, "
            "not for models that it serves through its transformers backend",
        )
    is_shape = 1 <= header.num_experts <= MAX_EXPERTS and 1 <= header.top_k <= header.num_experts
    if not is_shape or header.flags & ~(HAS_GATES | HAS_LOGITS | HAS_WEIGHTS):
        raise _damaged("a known shape and known flags", header)
    runs_at = HEADER.size + header.bitmap_bytes
    body_at = runs_at + header.num_runs * RUN.itemsize
    # Python integers: a header that lies cannot overflow.
    body_bytes = sum(dtype.itemsize * prod(shape) for _, dtype, shape in header.columns())
    if body_at + body_bytes + CHECKSUM.size != len(data):
        raise _damaged(f"{body_at + body_bytes + CHECKSUM.size} bytes", len(data))
    bitmap = np.frombuffer(data, np.uint8, header.bitmap_bytes, HEADER.size)
    layers = tuple(np.flatnonzero(np.unpackbits(bitmap, bitorder="little")).tolist())
    runs = np.frombuffer(data, RUN, header.num_runs, runs_at)
    num_rows = int(runs["num_rows"].sum(dtype=np.int64))
    if (len(layers), num_rows) != (header.num_layers, header.num_rows):
        raise _damaged(
            f"{header.num_layers} layers and {header.num_rows} rows",
            f"{len(layers)} layers and {num_rows} rows",
        )
    return _routes_of(_arrays(data, body_at, header), layers, header.num_experts, runs)


def _arrays(data: bytes, at: int, header: Header) -> dict[str, np.ndarray]:
    """The body's arrays by name; views of `data` on a little-endian machine."""
    arrays = {}
    for name, dtype, shape in header.columns():
        flat = np.frombuffer(data, dtype, prod(shape), at)
        arrays[name] = flat.astype(dtype.newbyteorder("="), copy=False).reshape(shape)
        at += flat.nbytes
    return arrays


def _routes_of(
    arrays: dict[str, np.ndarray], layers: tuple[int, ...], num_experts: int, runs: np.ndarray
) -> Routes:
    origin_T = np.repeat(runs["origin"], runs["num_rows"])
    if len(runs) and runs["origin"].max() > max(Origin):
        raise _damaged("known origins", runs["origin"].max())
    logits = None
    if "rows" in arrays:
        logits = RouterLogits(rows_N=arrays["rows"].astype(np.int64), values_NLE=arrays["logits"])
    return Routes(
        expert_ids_TLK=arrays["ids"],
        covered_T=is_covered(origin_T),
        layers=layers,
        num_experts=num_experts,
        combine_weights_TLK=arrays.get("weights"),
        gate_probs_TLK=arrays.get("gates"),
        router_logits=logits,
        origin_T=origin_T,
        weight_version_T=np.repeat(runs["weight_version"], runs["num_rows"]).astype(np.int64),
    )


def _damaged(expected: object, got: object) -> PayloadError:
    return PayloadError(
        "the payload is damaged",
        expected=expected,
        got=got,
        fix="Ask again; if it stays, something between the server and here changes the bytes",
    )
