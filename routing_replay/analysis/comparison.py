"""Compare two sets of routes for the same tokens: by layer, position and origin.

It reads memory maps in blocks of rows, so the files may be larger than memory.
"""

from __future__ import annotations

import heapq
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from ..errors import DataError, TableError, reading
from ..metrics.agreement import NO_LAYER, log_router_probs, router_kl
from ..routes.origin import Origin
from ..routes.table import RouteTable
from .differences import Bucket, Comparison, LayerDifference, TokenDifference
from .explanation import explain_layer

# A block's comparisons (rows x K bytes) stay in a core's second-level cache.
BLOCK_ROWS = 1 << 16
Decoder = Callable[[int, int], str]


@dataclass
class _Tally:
    """Running sums over the blocks."""

    matches_L: np.ndarray  # shared slots
    exact_L: np.ndarray
    first_L: np.ndarray
    buckets: dict[tuple[str, str], list[int]] = field(default_factory=dict)
    worst: list[tuple[int, int, int]] = field(default_factory=list)
    num_rows: int = 0
    num_differing: int = 0


def compare_tables(
    first: RouteTable,
    second: RouteTable,
    *,
    num_worst: int = 10,
    decode: Decoder | None = None,
) -> Comparison:
    """Compare the routes of the same tokens.

    Args:
        first: Taken as the reference (a rollout, say); gives the origins.
        second: Of the same model and with the same sequences.
        num_worst: Tokens to name.
        decode: (sequence, position) to the token's text; see `token_decoder`.

    Raises:
        TableError: Other models, or sequences of other lengths.
    """
    second.check_shape(first.shape)
    if not np.array_equal(first.offsets_S1, second.offsets_S1):
        lengths = [np.diff(t.offsets_S1)[:6].tolist() for t in (first, second)]
        raise TableError(
            "the tables hold other sequences",
            expected=f"{first.num_sequences} sequences with rows {lengths[0]}...",
            got=f"{second.num_sequences} with {lengths[1]}...",
            where=second.where,
            fix="Compare the routes of one batch",
        )
    num_layers = len(first.shape.layers)
    zeros = np.zeros(num_layers, np.int64)
    tally = _Tally(matches_L=zeros.copy(), exact_L=zeros.copy(), first_L=zeros.copy())
    for start in range(0, first.num_rows, BLOCK_ROWS):
        _add_block(tally, first, second, start, num_worst)
    return _finish(tally, first, second, decode)


def _add_block(
    tally: _Tally, first: RouteTable, second: RouteTable, start: int, num_worst: int
) -> None:
    stop = min(start + BLOCK_ROWS, first.num_rows)
    both_B = first.covered_T[start:stop] & second.covered_T[start:stop]
    if not both_B.any():
        return
    top_k = first.shape.top_k
    # int32: layers x slots of one token; small enough to stay in the cache.
    shared_B = np.zeros(stop - start, np.int32)
    num_differing_B = np.zeros(stop - start, np.uint8)
    first_B = np.full(stop - start, NO_LAYER, np.uint8)
    for index in range(len(first.shape.layers)):
        matches_B = shared_experts(
            first.expert_ids_LTK[index, start:stop], second.expert_ids_LTK[index, start:stop]
        )
        differs_B = (matches_B < top_k) & both_B
        tally.matches_L[index] += int(matches_B.sum(where=both_B, dtype=np.int64))
        tally.exact_L[index] += int(np.count_nonzero(both_B)) - int(np.count_nonzero(differs_B))
        shared_B += matches_B
        num_differing_B += differs_B
        first_B[differs_B & (first_B == NO_LAYER)] = index
    tally.num_rows += int(np.count_nonzero(both_B))
    tally.num_differing += int(np.count_nonzero(num_differing_B))
    tally.first_L += np.bincount(first_B[num_differing_B > 0], minlength=len(tally.first_L))
    rows_B = np.flatnonzero(both_B)
    _add_buckets(tally, first, start + rows_B, shared_B[rows_B], num_differing_B[rows_B] > 0)
    _keep_worst(tally, start, num_differing_B, first_B, num_worst)


def shared_experts(ids_BK: np.ndarray, other_BK: np.ndarray) -> np.ndarray:
    """Return how many experts both rows hold, uint8 [B]; ids within a row are distinct."""
    # Slot first makes each comparison one pass over contiguous bytes: K * K of them beat a sort.
    ids_KB, other_KB = np.ascontiguousarray(ids_BK.T), np.ascontiguousarray(other_BK.T)
    matches_B = np.zeros(ids_KB.shape[1], np.uint8)
    for slot_B in ids_KB:
        for other_B in other_KB:
            matches_B += slot_B == other_B
    return matches_B


def _add_buckets(
    tally: _Tally,
    table: RouteTable,
    rows_R: np.ndarray,
    shared_R: np.ndarray,
    differs_R: np.ndarray,
) -> None:
    sequence_R = np.searchsorted(table.offsets_S1, rows_R, side="right") - 1
    position_R = rows_R - table.offsets_S1[sequence_R]
    # Powers of two: differences grow with the length of the context, not with each token.
    keys = {
        "position": np.frexp(position_R.astype(np.float64))[1],
        "origin": table.origin_T[rows_R],
    }
    for kind, key_R in keys.items():
        key_R = key_R.astype(np.int64)
        rows = np.bincount(key_R)
        shared = np.bincount(key_R, shared_R)
        differing = np.bincount(key_R, differs_R)
        for key in np.flatnonzero(rows):
            name = _position_name(key) if kind == "position" else Origin(key).name.lower()
            sums = tally.buckets.setdefault((kind, name), [0, 0, 0])
            for i, values in enumerate((rows, shared, differing)):
                sums[i] += int(values[key])


def _position_name(exponent: int) -> str:
    first, last = (1 << exponent) // 2, (1 << exponent) - 1
    return str(first) if first == last else f"{first}-{last}"


def _keep_worst(
    tally: _Tally, start: int, num_differing_B: np.ndarray, first_B: np.ndarray, num_worst: int
) -> None:
    if not num_worst:
        return
    best = np.argsort(num_differing_B, kind="stable")[::-1][:num_worst]
    for b in best[num_differing_B[best] > 0]:
        entry = (int(num_differing_B[b]), -(start + int(b)), int(first_B[b]))
        if len(tally.worst) < num_worst:
            heapq.heappush(tally.worst, entry)
        else:
            heapq.heappushpop(tally.worst, entry)


def _finish(
    tally: _Tally, first: RouteTable, second: RouteTable, decode: Decoder | None
) -> Comparison:
    shape, num_rows = first.shape, max(1, tally.num_rows)
    kl_L = _exact_kl(first, second)
    layers = tuple(
        LayerDifference(
            layer=layer,
            overlap=int(tally.matches_L[i]) / (num_rows * shape.top_k),
            exact_match=int(tally.exact_L[i]) / num_rows,
            first_difference=int(tally.first_L[i]) / num_rows,
            router_kl=None if kl_L is None else float(kl_L[i]),
            explanation=explain_layer(first, second, i),
        )
        for i, layer in enumerate(shape.layers)
    )
    slots = len(shape.layers) * shape.top_k
    buckets = {
        kind: tuple(
            Bucket(
                name=name,
                num_rows=rows,
                overlap=shared / (rows * slots),
                any_layer_differs=differing / rows,
            )
            for (bucket_kind, name), (rows, shared, differing) in tally.buckets.items()
            if bucket_kind == kind
        )
        for kind in ("position", "origin")
    }
    return Comparison(
        first=first.where,
        second=second.where,
        num_rows=tally.num_rows,
        num_skipped=first.num_rows - tally.num_rows,
        overlap=float(np.mean([row.overlap for row in layers])) if layers else 1.0,
        exact_match=float(np.mean([row.exact_match for row in layers])) if layers else 1.0,
        any_layer_differs=tally.num_differing / num_rows,
        layers=layers,
        positions=buckets["position"],
        origins=buckets["origin"],
        worst=_named(tally.worst, first, decode),
    )


def _named(
    worst: list[tuple[int, int, int]], table: RouteTable, decode: Decoder | None
) -> tuple[TokenDifference, ...]:
    named = []
    for num_layers, negative_row, index in sorted(worst, reverse=True):
        sequence = int(np.searchsorted(table.offsets_S1, -negative_row, side="right")) - 1
        position = -negative_row - int(table.offsets_S1[sequence])
        named.append(
            TokenDifference(
                sequence=sequence,
                position=position,
                num_layers=num_layers,
                first_layer=table.shape.layers[index],
                text=decode(sequence, position) if decode else "",
            )
        )
    return tuple(named)


def _exact_kl(first: RouteTable, second: RouteTable) -> np.ndarray | None:
    """Mean KL(first || second) per layer over the rows whose logits both hold (softmax routers)."""
    columns = (first.logit_rows_N, second.logit_rows_N, first.logits_NLE, second.logits_NLE)
    rows_N, other_rows_N, logits_NLE, other_logits_NLE = columns
    if rows_N is None or other_rows_N is None or logits_NLE is None or other_logits_NLE is None:
        return None
    _, ours, theirs = np.intersect1d(rows_N, other_rows_N, assume_unique=True, return_indices=True)
    if not len(ours):
        return None
    sums_L = np.zeros(len(first.shape.layers))
    for mine, other in zip(ours, theirs, strict=True):
        log_mu_LE, log_pi_LE = (
            log_router_probs(torch.from_numpy(np.array(logits_LE)))
            for logits_LE in (logits_NLE[mine], other_logits_NLE[other])
        )
        sums_L += router_kl(log_mu_LE, log_pi_LE).numpy()
    return sums_L / len(ours)


def token_decoder(
    tokens_path: str | os.PathLike[str], decode_ids: Callable[[Sequence[int]], str]
) -> Decoder:
    """Return a function from (sequence, position) to the token's text.

    Args:
        tokens_path: As `read_token_lines` takes it.
        decode_ids: A tokenizer's `decode`.
    """
    sequences = read_token_lines(tokens_path)

    def decode(sequence: int, position: int) -> str:
        if sequence >= len(sequences) or position >= len(sequences[sequence]):
            return "?"
        return repr(decode_ids([sequences[sequence][position]]))

    return decode


def read_token_lines(path: str | os.PathLike[str]) -> list[list[int]]:
    """Return the token ids of each sequence from JSON lines: lists, or objects with "tokens".

    Raises:
        DataError: Unreadable, or a line that holds no token ids.
    """
    sequences = []
    with reading(path, "the file of tokens", DataError):
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            content = json.loads(line)
            ids = content["tokens"] if isinstance(content, dict) else content
            sequences.append([int(token) for token in ids])
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                "a line holds no token ids",
                expected='[1, 2, ...] or {"tokens": [1, 2, ...]}',
                got=line.strip()[:80],
                where=f"{path}, line {number}",
            ) from error
    return sequences
