"""The bytes of a routes file: header, checksums, memory maps. `table.py` names the columns."""

from __future__ import annotations

import json
import os
import zlib
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import RoutesError, TableError, reading
from .routes import compact_dtype
from .shape import MoEShape

FORMAT, VERSION = "routing_replay.table", "1"
# Who selected the experts: the inference engine (R3 replays these) or the training engine (R2).
SOURCES = ("rollout", "training")
SAFETENSORS_DTYPES: dict[str, type[np.generic]] = {
    "U8": np.uint8,
    "U16": np.uint16,
    "U32": np.uint32,
    "I64": np.int64,
    "F16": np.float16,
    "F32": np.float32,
    "BOOL": np.bool_,
}
NAMES_OF_DTYPES = {np.dtype(dtype): name for name, dtype in SAFETENSORS_DTYPES.items()}
# A safetensors header is a few hundred bytes here; anything huge is another file or damage.
MAX_HEADER_BYTES = 1 << 24
CONVERT = "`routing-replay convert` imports the files of other tools"
OPTIONAL_COLUMNS = ("gate_rows_N", "logit_rows_N", "logits_NLE", "token_ids_T", "counts_SLE")
SMALL_COLUMNS = ("covered_T", "origin_T", "weight_version_T", "offsets_S1")


def checksums(description: dict[str, str], tensors: dict[str, np.ndarray]) -> np.ndarray:
    """Return the CRC-32 of the description, of each small column, and of each layer."""
    sums = [zlib.crc32(json.dumps(description).encode())]
    sums += [_crc(tensors[name]) for name in SMALL_COLUMNS]
    for name in ("expert_ids_LTK", "combine_weights_LTK", "gate_probs_LNK"):
        sums += [_crc(layer_TK) for layer_TK in tensors.get(name, ())]
    sums += [_crc(tensors[name]) for name in OPTIONAL_COLUMNS if name in tensors]
    return np.array(sums, np.int64)


def write(path: Path, description: dict[str, str], tensors: dict[str, np.ndarray]) -> None:
    """Write a safetensors file: header and tensors, without a copy of the whole."""
    with open(path, "wb") as file:
        file.write(_header(description, tensors))
        for tensor in tensors.values():
            file.write(_bytes(tensor))


def read(path: Path) -> tuple[MoEShape, str, dict[str, np.ndarray]]:
    """Return model shape, source and memory-mapped tensors of a file, checksums not compared.

    Raises:
        TableError: Not a routes file, of another version, or damaged.
    """
    header, data = _read_header(path)
    description = header.pop("__metadata__", None)
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise TableError(
            "the file is not a routes file",
            expected=f"a safetensors file with format {FORMAT!r}",
            got=description and description.get("format"),
            where=path,
            fix=f"{CONVERT}; rr.open_table joins routes in parts",
        )
    if description.get("version") != VERSION:
        raise TableError(
            "the routes file is of another version",
            expected=VERSION,
            got=description.get("version"),
            where=path,
            fix="Read it with the routing_replay that wrote it",
        )
    try:
        shape = MoEShape(
            layers=tuple(json.loads(description["layers"])),
            num_experts=int(description["num_experts"]),
            top_k=int(description["top_k"]),
        )
        source = SOURCES[SOURCES.index(description["source"])]
        tensors = {name: _map_tensor(path, data, entry) for name, entry in header.items()}
    except (KeyError, ValueError, TypeError, RoutesError) as error:
        raise damaged(path, "a complete header", error) from error
    _check_columns(path, shape, tensors)
    return shape, source, tensors


def damaged(path: Path, expected: object, got: object) -> TableError:
    """Return the error of a routes file that was complete once."""
    return TableError(
        "the routes file is damaged",
        expected=expected,
        got=got,
        where=path,
        fix="Write it again; a file under its final name is always complete, so look at the copy",
    )


def _bytes(array: np.ndarray) -> memoryview:
    return memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8))


def _crc(array: np.ndarray) -> int:
    return zlib.crc32(_bytes(array))


def _header(description: dict[str, str], tensors: dict[str, np.ndarray]) -> bytes:
    """The safetensors header: names, types, shapes and offsets of the tensors, in their order."""
    header: dict[str, Any] = {"__metadata__": description}
    start = 0
    for name, tensor in tensors.items():
        header[name] = {
            "dtype": NAMES_OF_DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, start + tensor.nbytes],
        }
        start += tensor.nbytes
    text = json.dumps(header).encode()
    # Padding so that the data, and with it every int64 column in our order, starts at 8 bytes.
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    with reading(path, "the routes file", TableError), open(path, "rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        text = file.read(length) if length <= MAX_HEADER_BYTES else b""
    if not text.startswith(b"{"):
        raise TableError(
            "the file is no safetensors file",
            expected="a routes file, which is one",
            got=f"the first bytes {(prefix + text)[:16]!r}",
            where=path,
            fix=CONVERT,
        )
    try:
        return json.loads(text), 8 + length
    except ValueError as error:
        raise damaged(path, "a header in JSON", error) from error


def _map_tensor(path: Path, data: int, entry: dict[str, Any]) -> np.ndarray:
    dtype = np.dtype(SAFETENSORS_DTYPES[entry["dtype"]])
    shape = tuple(int(size) for size in entry["shape"])
    start, stop = entry["data_offsets"]
    size_bytes = dtype.itemsize * prod(shape)  # Python integers: a lying shape cannot overflow
    if min(shape, default=0) < 0 or stop - start != size_bytes:
        raise ValueError(f"shape {shape} does not fit {stop - start} bytes")
    if start < 0 or data + stop > os.path.getsize(path):
        raise damaged(path, f"at least {data + stop} bytes", os.path.getsize(path))
    if size_bytes == 0:  # nothing can be mapped
        return np.empty(shape, dtype)
    # Mapped here, because safetensors copies a tensor for numpy: a pipeline stage reads its own
    # layers only, and the ranks of a node share the pages.
    return np.memmap(path, dtype, "r", data + start, shape)


def _check_columns(path: Path, shape: MoEShape, tensors: dict[str, np.ndarray]) -> None:
    missing = [n for n in ("expert_ids_LTK", "checksums", *SMALL_COLUMNS) if n not in tensors]
    if missing:
        raise damaged(path, "all columns", f"no {', '.join(missing)}")
    ids = tensors["expert_ids_LTK"]
    num_rows = ids.shape[1] if ids.ndim == 3 else -1
    shape_LTK = (len(shape.layers), num_rows, shape.top_k)
    offsets_S1 = tensors["offsets_S1"]
    shape_SLE = (len(offsets_S1) - 1, len(shape.layers), shape.num_experts)
    fits = (
        ids.shape == shape_LTK
        and ids.dtype == compact_dtype(shape.num_experts)
        and all(tensors[name].shape == (num_rows,) for name in SMALL_COLUMNS[:3])
        and _gates_fit(tensors, shape_LTK)
        and _weights_fit(tensors, shape_LTK)
        and tensors.get("token_ids_T", tensors["covered_T"]).shape == (num_rows,)
        and len(offsets_S1) >= 1
        and ("counts_SLE" not in tensors or tensors["counts_SLE"].shape == shape_SLE)
        and offsets_S1[0] == 0
        and offsets_S1[-1] == num_rows
        and bool((np.diff(offsets_S1) >= 0).all())
    )
    if not fits:
        raise damaged(path, f"columns of one shape for {shape}", f"expert ids {ids.shape}")


def _gates_fit(tensors: dict[str, np.ndarray], shape_LTK: tuple[int, int, int]) -> bool:
    """Return whether the gates are of all rows, or of distinct ascending ones."""
    num_layers, num_rows, top_k = shape_LTK
    gates_LNK, rows_N = tensors.get("gate_probs_LNK"), tensors.get("gate_rows_N")
    if gates_LNK is None:
        return rows_N is None
    if rows_N is None:
        return gates_LNK.shape == shape_LTK
    in_range = not len(rows_N) or (rows_N[0] >= 0 and rows_N[-1] < num_rows)
    is_ascending = bool((np.diff(rows_N) > 0).all())
    return gates_LNK.shape == (num_layers, len(rows_N), top_k) and in_range and is_ascending


def _weights_fit(tensors: dict[str, np.ndarray], shape_LTK: tuple[int, int, int]) -> bool:
    """Return whether the combine weights are float32, one for each slot of all rows."""
    weights_LTK = tensors.get("combine_weights_LTK")
    if weights_LTK is None:
        return True
    return weights_LTK.shape == shape_LTK and weights_LTK.dtype == np.float32
