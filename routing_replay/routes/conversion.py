"""Files of other tools to routes files, and back.

| kind | what it is |
| --- | --- |
| `rollout` | `--save-debug-rollout-data` (.pt) of slime and miles |
| `sglang` | responses of `/generate` as JSON or JSON lines |

The .pt files are pickles. They are read by torch's restricted unpickler, which builds tensors,
numpy arrays and plain Python values and refuses everything else: no code of a file ever runs.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ..errors import DataError, PayloadError, RoutesError, reading, unknown_name, writing
from ..files import atomic_write
from . import payload
from .routes import Routes, compact_dtype, concatenate
from .shape import MoEShape
from .stock import from_wide, to_wide
from .table import RouteTable

# What a pickle may construct beyond tensors and plain values: numpy's arrays, without objects.
_multiarray = (np._core if hasattr(np, "_core") else np.core).multiarray  # numpy 2 and 1.26
SAFE_NUMPY = [
    np.ndarray,
    np.dtype,
    _multiarray._reconstruct,
    _multiarray.scalar,
    *{type(np.dtype(code)) for code in ("u1", "i1", "u2", "i2", "i4", "i8", "f2", "f4", "f8", "?")},
]
ROUTES_KEYS = ("rollout_routed_experts", "routed_experts")


def import_routes(
    kind: str,
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    shape: MoEShape,
) -> RouteTable:
    """Read another tool's file and write a routes file.

    Args:
        kind: A key of `READERS`.
        source: The file.
        target: The routes file; written under a temporary name, then renamed.
        shape: Layers, experts and top-k; most formats do not state them.

    Returns:
        The written table, memory-mapped.

    Raises:
        ConfigError: An unknown kind.
        DataError: Unreadable, of another format, a pickle that wants to run code, or routes that
            cannot be true.
        TableError: The target cannot be written.
    """
    if kind not in READERS:
        raise unknown_name("kind of file", kind, READERS)
    sequences: list[Routes] = []
    try:
        with reading(source, "the file", DataError):
            for routes in READERS[kind](source, shape):
                sequences.append(routes)
    except (RoutesError, PayloadError) as error:
        where = f"sequence {len(sequences)} of {source}"
        raise DataError("the routes cannot be true", got=error, where=where) from error
    if not sequences:
        raise DataError("the file holds no sequence", where=source)
    RouteTable.from_routes(sequences).save(target)
    return RouteTable.open(target, verify=False)


def load_restricted(path: str | os.PathLike[str]) -> Any:
    """Load a .pt file without running anything that is in it; tensors stay memory-mapped.

    Raises:
        DataError: It holds something else than tensors, arrays and plain values.
    """
    try:
        with torch.serialization.safe_globals(SAFE_NUMPY):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except OSError:
        raise
    except Exception as error:  # torch raises bare RuntimeError and pickle.UnpicklingError
        raise DataError(
            "the file is not one of tensors and plain values",
            expected="a torch.save file whose pickle runs no code",
            got=str(error).strip().splitlines()[0][:160],
            where=path,
            fix="Save it again with dictionaries, lists, numbers, strings, tensors and arrays only",
        ) from error


def read_rollout_dump(path: str | os.PathLike[str], shape: MoEShape) -> Iterator[Routes]:
    """Yield the samples of a slime or miles rollout dump; one without routes is uncovered."""
    content = load_restricted(path)
    samples = content.get("samples") if isinstance(content, Mapping) else None
    if not isinstance(samples, list) or not samples:
        raise _foreign(path, 'a dictionary with a list "samples"', type(content).__name__)
    for number, sample in enumerate(samples):
        if not isinstance(sample, Mapping) or "tokens" not in sample:
            raise _foreign(f"{path}, sample {number}", 'a dictionary with "tokens"', type(sample))
        num_tokens = len(sample["tokens"])
        ids = next((sample[key] for key in ROUTES_KEYS if sample.get(key) is not None), None)
        if ids is None:
            yield _uncovered(shape, max(0, num_tokens - 1))
            continue
        if len(ids) != num_tokens - 1:
            raise RoutesError(
                "the routes of a sample belong to other tokens",
                expected=f"{num_tokens - 1} rows for {num_tokens} tokens",
                got=len(ids),
                where=f"sample {number}",
            )
        yield from_wide(np.asarray(ids), shape)


def read_sglang_responses(path: str | os.PathLike[str], shape: MoEShape) -> Iterator[Routes]:
    """Yield the routes of `/generate`'s responses: stock or compact payloads."""
    for number, response in _json_objects(path):
        meta = response.get("meta_info") or {}
        try:
            num_tokens = int(meta["prompt_tokens"]) + int(meta["completion_tokens"])
        except (KeyError, TypeError, ValueError) as error:
            raise _foreign(
                f"{path}, response {number}", "meta_info with the token counts", list(response)
            ) from error
        data = payload.from_base64(meta.get(payload.FIELD))
        is_compact = data[: len(payload.MAGIC)] == payload.MAGIC
        # The request is not in the file, so the payload itself tells where it starts.
        start = payload.decode_compact(data)[1] if is_compact else 0
        routes = payload.decode(meta, num_tokens=num_tokens, shape=shape, start=start)
        # A response to a delta request lacks the rows before it.
        yield concatenate([_uncovered(shape, start), routes]) if start else routes


READERS: dict[str, Callable[[str | os.PathLike[str], MoEShape], Iterator[Routes]]] = {
    "rollout": read_rollout_dump,
    "sglang": read_sglang_responses,
}


def export_rollout_dump(
    table: RouteTable, target: str | os.PathLike[str], tokens: Iterable[Sequence[int]]
) -> None:
    """Write a slime or miles rollout dump: int32 [T, all layers, K] per sample, dense layers zero.

    Args:
        table: Every row must be covered: those tools know no missing rows.
        target: The .pt file.
        tokens: The token ids of each sequence, in the table's order.

    Raises:
        DataError: Uncovered rows, other tokens, or a target that cannot be written.
    """
    samples: list[dict[str, Any]] = []
    for number, ids in enumerate(tokens):
        routes = table.sequence(number)
        if len(ids) != routes.num_rows + 1:
            raise DataError(
                "the tokens are not those of the routes",
                expected=f"{routes.num_rows + 1} tokens",
                got=len(ids),
                where=f"sequence {number}",
            )
        wide_TLK = torch.from_numpy(to_wide(routes))
        samples.append({"tokens": list(ids), "index": number, ROUTES_KEYS[0]: wide_TLK})
    if len(samples) != table.num_sequences:
        raise DataError(
            "the tokens are of fewer sequences than the routes",
            expected=table.num_sequences,
            got=len(samples),
        )
    with writing(target, "the rollout dump", DataError), atomic_write(target) as partial:
        torch.save({"rollout_id": 0, "samples": samples}, partial)


def export_sglang(table: RouteTable, target: str | os.PathLike[str]) -> None:
    """Write stock SGLang's payloads as JSON lines: what a stock server would have answered.

    Raises:
        DataError: Uncovered rows, or a target that cannot be written.
    """
    with (
        writing(target, "the responses", DataError),
        atomic_write(target) as partial,
        open(partial, "w", encoding="utf-8") as file,
    ):
        for routes in table.sequences():
            meta = {
                "prompt_tokens": routes.num_rows + 1,
                "completion_tokens": 0,
                payload.FIELD: base64.b64encode(to_wide(routes).tobytes()).decode(),
            }
            file.write(json.dumps({"text": "", "meta_info": meta}) + "\n")


def _uncovered(shape: MoEShape, num_rows: int) -> Routes:
    shape_TLK = (num_rows, len(shape.layers), shape.top_k)
    return Routes(
        expert_ids_TLK=np.zeros(shape_TLK, compact_dtype(shape.num_experts)),
        covered_T=np.zeros(num_rows, np.bool_),
        layers=shape.layers,
        num_experts=shape.num_experts,
    )


def _json_objects(path: str | os.PathLike[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the objects of a JSON-lines file, or of one JSON list, with their numbers."""
    with open(path, encoding="utf-8") as file:
        head = file.read(1)
        file.seek(0)
        try:
            if head == "[":
                yield from enumerate(json.load(file), 1)
                return
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, json.loads(line)
        except ValueError as error:  # bad JSON and bad UTF-8
            raise _foreign(path, "JSON or JSON lines", error) from error


def _foreign(where: object, expected: str, got: object) -> DataError:
    return DataError("the file is of another format", expected=expected, got=got, where=where)
