"""Files of other tools to ours, and back: one sequence at a time, so they may exceed the memory.

| kind | what it is | direction |
| --- | --- | --- |
| `rollout` | slime's and miles' `--save-debug-rollout-data` (.pt) | both |
| `routers` | miles' `rank0_routing_replay.pt`: a list of routers of microbatches [T, K] | import |
| `trace` | Megatron's RouterTracer (`router_trace_rank{r}.jsonl`) | import |
| `sglang` | responses of `/generate` as JSON or JSON lines | both |
| `vllm` | responses with `choices` as JSON or JSON lines | import |

The .pt files are pickles. They are read by torch's restricted unpickler, which builds tensors,
numpy arrays and plain Python values and refuses everything else: no code of a file ever runs.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch

from ..errors import DataError, PayloadError, RoutesError
from . import payload
from .routes import Routes, compact_dtype, concatenate
from .shape import MoEShape
from .spool import RouteSpool
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
    source: str | os.PathLike,
    target: str | os.PathLike,
    model: MoEShape,
    *,
    step: int | None = None,
    first_layer: int = 0,
) -> RouteTable:
    """Read another tool's file and write ours.

    Args:
        kind: A key of `READERS`.
        source: The file.
        target: Our file; written under a temporary name, then renamed.
        model: Layers, experts and top-k; most formats do not say them.
        step: "trace": which step; the first if None.
        first_layer: "trace": the global index of the layer that it calls 0. In hook mode a
            RouterTracer counts the layers of its pipeline stage from 0; in inference mode from 1.

    Returns:
        The written table, memory-mapped.

    Raises:
        DataError: Unreadable, of another format, or a pickle that wants to run code.
        RoutesError, PayloadError: Content that cannot be true.
    """
    readers = {
        "rollout": lambda: read_rollout_dump(source, model),
        "routers": lambda: read_router_lists(source, model),
        "trace": lambda: read_router_trace(source, model, step, first_layer),
        "sglang": lambda: read_sglang_responses(source, model),
        "vllm": lambda: read_vllm_responses(source, model),
    }
    if kind not in readers:
        raise DataError("unknown kind of file", expected=", ".join(readers), got=repr(kind))
    origin = "rollout" if kind in ("rollout", "sglang", "vllm") else "training"
    with RouteSpool(model, Path(target)) as spool:
        try:
            for routes in readers[kind]():
                spool.add(routes)
        except OSError as error:
            raise DataError("the file cannot be read", got=error, where=source) from error
        except (RoutesError, PayloadError) as error:
            where = f"sequence {spool.num_sequences} of {source}"
            raise DataError("routes that cannot be true", got=error, where=where) from error
        spool.finish(origin)
    return RouteTable.open(target, verify=False)


def load_restricted(path: str | os.PathLike):
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


def read_rollout_dump(path: str | os.PathLike, model: MoEShape) -> Iterator[Routes]:
    """The samples of a slime or miles rollout dump; samples without routes become uncovered."""
    content = load_restricted(path)
    samples = content.get("samples") if isinstance(content, Mapping) else None
    if not isinstance(samples, list) or not samples:
        raise _foreign(path, 'a dictionary with a list "samples"', type(content).__name__)
    for number, sample in enumerate(samples):
        num_tokens = len(sample["tokens"])
        ids = next((sample[key] for key in ROUTES_KEYS if sample.get(key) is not None), None)
        if ids is None:
            yield _uncovered(model, max(0, num_tokens - 1))
            continue
        if len(ids) != num_tokens - 1:
            raise RoutesError(
                "a sample whose routes are of other tokens",
                expected=f"{num_tokens - 1} rows for {num_tokens} tokens",
                got=len(ids),
                where=f"sample {number}",
            )
        yield _from_array(np.asarray(ids), model)


def read_router_lists(path: str | os.PathLike, model: MoEShape) -> Iterator[Routes]:
    """miles' routing dump; each microbatch becomes one sequence."""
    routers = load_restricted(path)
    if not isinstance(routers, list) or not all(isinstance(r, list) for r in routers):
        raise _foreign(path, "a list of routers, each a list of microbatches", type(routers))
    counts = {len(router) for router in routers}
    if len(routers) != len(model.layers) or len(counts) != 1:
        raise _foreign(
            path,
            f"{len(model.layers)} routers with equally many microbatches",
            f"{len(routers)} routers with {sorted(counts)}",
        )
    for microbatch in zip(*routers, strict=True):
        yield _from_array(np.stack([np.asarray(ids_TK) for ids_TK in microbatch], 1), model)


def read_router_trace(
    path: str | os.PathLike, model: MoEShape, step: int | None = None, first_layer: int = 0
) -> Iterator[Routes]:
    """One step of a RouterTracer file; each microbatch becomes one sequence.

    The trace does not label microbatches: the n-th record of a layer is the n-th microbatch. With
    activation recomputation every layer is traced twice; trace a pass without it. The trace lists
    experts in ascending order, so the slots' order is lost.
    """
    place = {layer: i for i, layer in enumerate(model.layers)}
    waiting: list[list[np.ndarray]] = [[] for _ in model.layers]
    num_yielded = 0
    for number, record in _json_objects(path):
        if record.get("block", "decoder") != "decoder" or "top_indices" not in record:
            continue
        step = record["step"] if step is None else step
        if record["step"] != step:
            continue
        layer = record["layer"] + first_layer
        if layer not in place:
            raise _foreign(
                f"{path}, line {number}",
                f"one of the layers {model.layers}",
                f"layer {record['layer']} + {first_layer}",
            )
        waiting[place[layer]].append(np.asarray(record["top_indices"]))
        if all(waiting):  # the microbatch is complete as soon as its last layer is there
            yield _from_array(np.stack([queue.pop(0) for queue in waiting], 1), model)
            num_yielded += 1
    rest = {layer: len(waiting[i]) for layer, i in place.items() if waiting[i]}
    if rest or not num_yielded:
        raise _foreign(
            path,
            f"in step {step} equally many records of the layers {model.layers}",
            f"{num_yielded} whole microbatches, left over by layer: {rest}",
        )


def read_sglang_responses(path: str | os.PathLike, model: MoEShape) -> Iterator[Routes]:
    """Responses of SGLang's `/generate`: stock or compact payloads."""
    for number, response in _json_objects(path):
        meta = response.get("meta_info") or {}
        try:
            num_tokens = int(meta["prompt_tokens"]) + int(meta["completion_tokens"])
        except (KeyError, TypeError, ValueError) as error:
            raise _foreign(
                f"{path}, response {number}", "meta_info with the token counts", list(response)
            ) from error
        yield _sglang_routes(meta, num_tokens, model)


def read_vllm_responses(path: str | os.PathLike, model: MoEShape) -> Iterator[Routes]:
    """vLLM's responses; the prompt's length comes from `prompt_token_ids` or `usage`."""
    for number, response in _json_objects(path):
        usage, choices = response.get("usage") or {}, response.get("choices")
        if not choices:
            raise _foreign(f"{path}, response {number}", '"choices"', list(response))
        for choice in choices:
            prompt = response.get("prompt_token_ids") or choice.get("prompt_token_ids")
            num_prompt = len(prompt) if prompt else usage.get("prompt_tokens")
            tokens = choice.get("token_ids")
            if num_prompt is None or (tokens is None and len(choices) > 1):
                raise _foreign(
                    f"{path}, response {number}",
                    "token ids or, for one choice, usage",
                    sorted(choice),
                )
            num_output = len(tokens) if tokens is not None else usage["completion_tokens"]
            yield payload.decode_vllm(
                choice,
                num_tokens=num_prompt + num_output,
                model=model,
                num_prompt_tokens=num_prompt,
            )


def export_rollout_dump(
    table: RouteTable, target: str | os.PathLike, tokens: Iterable[list[int]]
) -> None:
    """A slime or miles rollout dump: int32 [T - 1, all layers, K] per sample, dense layers zero.

    Args:
        table: Every row must be covered: those tools know no missing rows.
        target: The .pt file.
        tokens: The token ids of each sequence, in the table's order.
    """
    samples = []
    for number, ids in enumerate(tokens):
        routes = table.sequence(number)
        if len(ids) != routes.num_rows + 1:
            raise DataError(
                "the tokens are not those of the routes",
                expected=f"{routes.num_rows + 1} tokens",
                got=len(ids),
                where=f"sequence {number}",
            )
        wide = torch.from_numpy(_wide(routes))
        samples.append({"tokens": list(ids), "index": number, ROUTES_KEYS[0]: wide})
    if len(samples) != table.num_sequences:
        raise DataError(
            "one list of tokens per sequence", expected=table.num_sequences, got=len(samples)
        )
    torch.save({"rollout_id": 0, "samples": samples}, target)


def export_sglang(table: RouteTable, target: str | os.PathLike) -> None:
    """Stock SGLang's payloads as JSON lines: what a stock server would have answered."""
    with open(target, "w", encoding="utf-8") as file:
        for routes in table.sequences():
            meta = {
                "prompt_tokens": routes.num_rows + 1,
                "completion_tokens": 0,
                payload.FIELD: base64.b64encode(_wide(routes).tobytes()).decode(),
            }
            file.write(json.dumps({"text": "", "meta_info": meta}) + "\n")


def _wide(routes: Routes) -> np.ndarray:
    """int32 over all layers, as stock engines return it."""
    if not routes.covered_T.all():
        raise DataError(
            "the format knows no missing rows",
            expected="every row covered",
            got=f"{int((~routes.covered_T).sum())} rows that are not",
            fix="Drop the sequences with uncovered rows, or keep our format",
        )
    shape = (routes.num_rows, max(routes.layers) + 1, routes.top_k)
    wide_TLK = np.zeros(shape, np.int32)
    wide_TLK[:, list(routes.layers)] = routes.expert_ids_TLK
    return wide_TLK


def _sglang_routes(meta: Mapping, num_tokens: int, model: MoEShape) -> Routes:
    data = payload.from_base64(meta.get(payload.FIELD))
    is_compact = data[: len(payload.MAGIC)] == payload.MAGIC
    start = payload.decode_compact(data)[1] if is_compact else 0
    routes = payload.decode(meta, num_tokens=num_tokens, model=model, start=start)
    # A delta response knows nothing of the rows before it.
    return concatenate([_uncovered(model, start), routes]) if start else routes


def _from_array(ids_TLK: np.ndarray, model: MoEShape) -> Routes:
    # The decoder of plain arrays drops the dense layers, checks ids, and marks missing rows.
    return payload.decode_vllm({payload.FIELD: ids_TLK}, num_tokens=len(ids_TLK) + 1, model=model)


def _uncovered(model: MoEShape, num_rows: int) -> Routes:
    shape = (num_rows, len(model.layers), model.top_k)
    return Routes(
        expert_ids_TLK=np.zeros(shape, compact_dtype(model.num_experts)),
        covered_T=np.zeros(num_rows, np.bool_),
        layers=model.layers,
        num_experts=model.num_experts,
    )


def _json_objects(path: str | os.PathLike) -> Iterator[tuple[int, dict]]:
    """Objects of a JSON-lines file, or of one JSON list or object, with their numbers."""
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
        except (ValueError, UnicodeDecodeError) as error:
            raise _foreign(path, "JSON or JSON lines", error) from error


def _foreign(where, expected, got) -> DataError:
    return DataError("a file of another format", expected=expected, got=got, where=where)
