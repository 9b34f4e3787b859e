"""Routes on the wire: our compact payload; `decode` takes SGLang's own as well.

The compact payload is one byte string, little-endian, base64 in JSON:

    header        `HEADER` below, 40 bytes
    layers        bitmap of the global indices of the routed layers, `layer_bytes` bytes
    runs          `RUN` each: so many rows from here on have this origin and weight version
    body          ids [T, L, K] uint8 (E <= 256) or uint16, the first 4096 bytes of them deflated
                  or not; then, if flagged, gates [T, L, K] float16, then the logits' rows [N]
                  uint32 and values [N, L, E] float32
    checksum      CRC-32 of everything before it

Its first four bytes are no possible expert id, so a stock payload is told apart by looking. Every
size is computed in Python integers and compared with the bytes at hand before anything is
allocated; nothing is ever unpickled.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping, Sequence

import numpy as np

from ..errors import PayloadError
from .engine_payloads import decode_stock, decode_vllm
from .payload_text import FIELD, damaged, from_base64, size_bytes
from .routes import Origin, RouterLogits, Routes, compact_dtype
from .shape import MoEShape

__all__ = [
    "FIELD",
    "decode",
    "decode_compact",
    "decode_vllm",
    "encode",
    "from_base64",
]

MAGIC, VERSION = b"RRPL", 2
# magic, version, flags, codec, rows, start, layers, bytes of the bitmap, top-k, experts, runs,
# sampled logits, bytes of the stored body
HEADER = struct.Struct("<4sHBBIIHHHHIIQ")
RUN = np.dtype([("num_rows", "<u4"), ("origin", "u1"), ("weight_version", "<i8")])
CHECKSUM = struct.Struct("<I")
HAS_GATES, HAS_LOGITS = 1, 2
RAW, DEFLATE = 0, 1
# Deflate saves 16 % of 128 experts' ids and 3 % of 256's, at 0.1 GB/s (docs/capture.md): enough to
# make up for the header, and far too slow, in the server's loop, for all of a long body.
HEAD_BYTES = 4096


def encode(routes: Routes, *, start: int = 0) -> bytes:
    """The compact payload of some routes.

    Args:
        routes: The rows to send, the first of them being row `start` of the sequence.
        start: Row of the sequence at which they begin.
    """
    ids, *others = _body_of(routes)
    head = _deflate(ids[:HEAD_BYTES])
    codec = DEFLATE if len(head) < len(ids[:HEAD_BYTES]) else RAW
    body = [head, ids[HEAD_BYTES:], *others] if codec == DEFLATE else [ids, *others]
    runs = _runs_of(routes)
    bitmap = _bitmap_of(routes.layers)
    logits = routes.router_logits
    flags = HAS_GATES * (routes.gate_probs_TLK is not None) | HAS_LOGITS * (logits is not None)
    header = HEADER.pack(
        *(MAGIC, VERSION, flags, codec, routes.num_rows, start, len(routes.layers), len(bitmap)),
        *(routes.top_k, routes.num_experts, len(runs), 0 if logits is None else len(logits.rows_N)),
        sum(len(part) for part in body),
    )
    content, checksum = [header, bitmap, runs.tobytes(), *body], 0
    for part in content:
        checksum = zlib.crc32(part, checksum)
    # One copy: this runs in the server's loop.
    return b"".join([*content, CHECKSUM.pack(checksum)])


def decode(
    meta_info: Mapping,
    *,
    num_tokens: int,
    model: MoEShape | None = None,
    start: int = 0,
    accept_stock: bool = True,
) -> Routes:
    """The routes in the `meta_info` of a finished SGLang request.

    Args:
        meta_info: Holds the payload under "routed_experts", and perhaps "num_retractions".
        num_tokens: Prompt and output tokens of the request: it has `num_tokens - 1` rows.
        model: The model that will replay them; needed for a stock payload, compared otherwise.
        start: The `routed_experts_start_len` of the request; row `start` comes first.
        accept_stock: Whether SGLang's own payload will do; it has no checksum and no origins.

    Returns:
        `num_tokens - 1 - start` rows. Rows that nobody can vouch for are not covered: those of a
        stock payload after a retraction, and those that were never captured.

    Raises:
        PayloadError: No routes, damaged or foreign bytes, another model, wrong counts.
        RoutesError: The content cannot be true.
    """
    data = from_base64(meta_info.get(FIELD))
    if data[: len(MAGIC)] == MAGIC:
        routes, got_start = decode_compact(data)
        if model is not None:
            model.require_equal(
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
        routes, got_start = decode_stock(data, meta_info, num_tokens - 1 - start, model), start
    if (got_start, routes.num_rows) != (start, num_tokens - 1 - start):
        raise PayloadError(
            "the payload covers other tokens",
            expected=f"{num_tokens - 1 - start} rows from row {start}",
            got=f"{routes.num_rows} rows from row {got_start}",
            fix="Decode with the prompt, output and start of the same request",
        )
    return routes


def decode_compact(data: bytes) -> tuple[Routes, int]:
    """The routes of a compact payload and the row of the sequence at which they begin.

    Raises:
        PayloadError: Damaged, cut short, of another version, or a lying header.
        RoutesError: The content cannot be true.
    """
    if len(data) < HEADER.size + CHECKSUM.size or data[: len(MAGIC)] != MAGIC:
        raise damaged("a compact payload", f"{len(data)} bytes: {data[:8]!r}")
    version = HEADER.unpack_from(data)[1]
    if version != VERSION:
        raise PayloadError(
            "a payload of another version",
            expected=VERSION,
            got=version,
            fix="Install the same routing_replay beside the server and the trainer",
        )
    (checksum,) = CHECKSUM.unpack_from(data, len(data) - CHECKSUM.size)
    if zlib.crc32(memoryview(data)[: -CHECKSUM.size]) != checksum:
        raise damaged("its checksum", "another")
    return _unpack(data)


def _body_of(routes: Routes) -> list[np.ndarray]:
    """The bytes of the body's arrays, without a copy where they lie as they are sent."""
    arrays = [(routes.expert_ids_TLK, routes.expert_ids_TLK.dtype.newbyteorder("<"))]
    if routes.gate_probs_TLK is not None:
        arrays.append((routes.gate_probs_TLK, np.dtype("<f2")))
    if routes.router_logits is not None:
        arrays.append((routes.router_logits.rows_N, np.dtype("<u4")))
        arrays.append((routes.router_logits.values_NLE, np.dtype("<f4")))
    return [np.ascontiguousarray(a, dtype).reshape(-1).view(np.uint8) for a, dtype in arrays]


def _deflate(head: np.ndarray) -> bytes:
    # Routes repeat as symbols, not as strings: Huffman codes alone give what deflate can give.
    coder = zlib.compressobj(1, zlib.DEFLATED, -zlib.MAX_WBITS, 9, zlib.Z_HUFFMAN_ONLY)
    return coder.compress(head) + coder.flush()


def _bitmap_of(layers: Sequence[int]) -> bytes:
    bits = np.zeros(layers[-1] + 1 if layers else 0, np.bool_)
    bits[list(layers)] = True
    return np.packbits(bits, bitorder="little").tobytes()


def _runs_of(routes: Routes) -> np.ndarray:
    """Origins and weight versions, run-length coded; an uncovered row has origin ABSENT."""
    origin_T = np.where(routes.covered_T, routes.origin_T, Origin.ABSENT)
    version_T = routes.weight_version_T
    changes = (origin_T[1:] != origin_T[:-1]) | (version_T[1:] != version_T[:-1])
    starts = np.append([0], np.flatnonzero(changes) + 1)[: routes.num_rows]
    runs = np.empty(len(starts), RUN)
    runs["num_rows"] = np.diff(np.append(starts, routes.num_rows))
    runs["origin"] = origin_T[starts]
    runs["weight_version"] = version_T[starts]
    return runs


def _unpack(data: bytes) -> tuple[Routes, int]:
    (_, _, flags, codec, num_rows, start, num_layers, layer_bytes, top_k, num_experts) = (
        HEADER.unpack_from(data)[:10]
    )
    num_runs, num_logits, stored_bytes = HEADER.unpack_from(data)[10:]
    runs_at = HEADER.size + layer_bytes
    body_at = runs_at + num_runs * RUN.itemsize
    if body_at + stored_bytes + CHECKSUM.size != len(data):
        raise damaged(f"{len(data)} bytes", f"{body_at + stored_bytes + CHECKSUM.size} announced")
    bits = np.unpackbits(np.frombuffer(data, np.uint8, layer_bytes, HEADER.size), bitorder="little")
    layers = tuple(np.flatnonzero(bits).tolist())
    runs = np.frombuffer(data, RUN, num_runs, runs_at)
    if not num_layers and not layers:
        raise PayloadError(
            "no router of the server's model reports its experts",
            expected="at least one routed layer",
            got="none",
            fix="SGLang reports routes for MoE layers of its own that select with its TopK module, "
            "not for models that it serves through its transformers backend",
        )
    if len(layers) != num_layers or int(runs["num_rows"].sum(dtype=np.int64)) != num_rows:
        raise damaged("layers and runs that add up", f"{len(layers)} layers, {num_runs} runs")
    if not 1 <= num_experts <= 1 << 15 or not 1 <= top_k <= num_experts:
        raise damaged("a top-k of 1..experts", f"top-{top_k} of {num_experts}")
    shape = (num_rows, num_layers, top_k)
    dtype = compact_dtype(num_experts).newbyteorder("<")
    columns = _columns(flags, shape, dtype, num_logits, num_experts)
    stored = memoryview(data)[body_at : body_at + stored_bytes]  # no copy of a long body
    body = _inflate(stored, codec, columns)
    arrays = _split(body, columns)
    return _routes_of(arrays, layers, num_experts, runs), start


def _columns(flags: int, shape, dtype, num_logits: int, num_experts: int) -> list[tuple]:
    """Name, dtype and shape of the arrays in the body, in their order."""
    if flags & ~(HAS_GATES | HAS_LOGITS) or (num_logits and not flags & HAS_LOGITS):
        raise damaged("known flags", flags)
    columns = [("ids", dtype, shape)]
    if flags & HAS_GATES:
        columns.append(("gates", np.dtype("<f2"), shape))
    if flags & HAS_LOGITS:
        columns.append(("rows", np.dtype("<u4"), (num_logits,)))
        columns.append(("logits", np.dtype("<f4"), (num_logits, shape[1], num_experts)))
    return columns


def _inflate(stored: memoryview, codec: int, columns: list[tuple]) -> memoryview | bytes:
    ids_bytes, *others = (size_bytes(dtype, shape) for _, dtype, shape in columns)
    body_bytes, head_bytes = ids_bytes + sum(others), min(HEAD_BYTES, ids_bytes)
    if codec == RAW and body_bytes == len(stored):
        return stored
    # What is left for the deflated head; a lie about any size leaves too little or too much.
    deflated_bytes = len(stored) - (body_bytes - head_bytes)
    if codec != DEFLATE or not 0 < deflated_bytes < head_bytes:
        raise damaged(f"a body of {body_bytes} bytes", f"{len(stored)} in codec {codec}")
    decoder = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        head = decoder.decompress(stored[:deflated_bytes], head_bytes + 1)
    except zlib.error as error:
        raise damaged("a deflated body", error) from error
    if len(head) != head_bytes or not decoder.eof or decoder.unused_data:
        raise damaged(f"{head_bytes} deflated bytes", len(head))
    return b"".join([head, stored[deflated_bytes:]])


def _split(body: memoryview | bytes, columns: list[tuple]) -> dict[str, np.ndarray]:
    arrays, at = {}, 0
    for name, dtype, shape in columns:
        num_bytes = size_bytes(dtype, shape)
        flat = np.frombuffer(body, dtype, num_bytes // dtype.itemsize, at)
        arrays[name] = flat.astype(dtype.newbyteorder("="), copy=False).reshape(shape)
        at += num_bytes
    return arrays


def _routes_of(arrays, layers, num_experts: int, runs: np.ndarray) -> Routes:
    origin_T = np.repeat(runs["origin"], runs["num_rows"])
    if len(runs) and runs["origin"].max() > max(Origin):
        raise damaged("known origins", runs["origin"].max())
    logits = None
    if "rows" in arrays:
        logits = RouterLogits(rows_N=arrays["rows"].astype(np.int64), values_NLE=arrays["logits"])
    return Routes(
        expert_ids_TLK=arrays["ids"],
        covered_T=origin_T != Origin.ABSENT,
        layers=layers,
        num_experts=num_experts,
        gate_probs_TLK=arrays.get("gates"),
        router_logits=logits,
        origin_T=origin_T,
        weight_version_T=np.repeat(runs["weight_version"], runs["num_rows"]).astype(np.int64),
    )
