"""The rows of one request: each of the forward pass whose log-prob was returned.

SGLang keeps rows by KV slot. That is the truth for a cached prefix and for decoded tokens, and
fails where a request's slots stop being its own:

- when two requests prefill the same prompt, the radix tree keeps one copy, and the other's slots
  are replaced, although its log-probs came from its own forward pass;
- a retracted request loses its slots and is prefilled again, although the log-probs of the tokens
  sampled so far are those of the first passes.

So the rows of a request's own prefill, and all its rows when it is retracted, are kept with the
request. The first forward pass that computed a position keeps it: that is the one whose log-prob
was returned.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..capture import OURS, REQUEST_KEY, CaptureSettings
from ..routes.origin import Origin
from ..routes.payload import encode
from ..routes.routes import RouterLogits, Routes, are_probabilities
from . import versions
from .slots import NOT_WRITTEN, KeptRows

if TYPE_CHECKING:
    from .capturer import Capturer

# The attribute of SGLang's requests that holds their own rows.
ATTRIBUTE = "routing_replay_rows"


def keep_prefill(batch: Any, result: Any) -> None:
    """Keep the rows that the requests of a prefill batch computed themselves.

    Runs before SGLang processes the result: that inserts the prompts into the radix tree.
    """
    output = result.routed_experts_output
    if output is None:
        return
    if result.copy_done is not None:
        result.copy_done.synchronize()
    output.num_decode_rows = len(batch.decoding_reqs or ())
    output.finalize()
    result.routed_experts_output = None
    step, at = output.rows(), 0
    for req, (start, num_rows) in zip(batch.reqs, output.extents, strict=False):
        if req.return_routed_experts and not req.is_retracted:
            _keep(req, step.part(at, at + num_rows, shift=start - at))
        at += num_rows


def keep_retracted(capturer: Capturer, req: Any, req_to_token_pool: Any) -> None:
    """Keep all rows of a request that is about to lose its slots.

    Under overlap a step may be in flight; its token is thrown away and computed again, and so is
    its row: the rows end with the last token that was accepted.
    """
    if not req.return_routed_experts:
        return
    stop = len(req.origin_input_ids) + len(req.output_ids) - 1
    if not req.output_ids or req.input_embeds is not None:
        # Nothing was sampled yet, or SGLang throws it away (prompts of embeddings): the next
        # prefill is the first whose log-probs count.
        setattr(req, ATTRIBUTE, [])
        return
    setattr(req, ATTRIBUTE, [_rows(capturer, req, req_to_token_pool, 0, stop)])


def collect(capturer: Capturer, req: Any, req_to_token_pool: Any) -> torch.Tensor:
    """Return what the answer carries: our payload, or stock's rows for SGLang's own clients."""
    start = req.routed_experts_start_len
    stop = len(req.origin_input_ids) + len(req.output_ids_through_stop) - 1
    start = min(start, stop)
    rows = _rows(capturer, req, req_to_token_pool, start, stop)
    level = level_of(req)
    if level is None:
        return _stock_rows(rows)
    payload = encode(_routes_of(capturer, rows, level), start=start)
    return torch.frombuffer(bytearray(payload), dtype=torch.uint8)


def level_of(req: Any) -> str | None:
    """Return the capture level that the request names; None for SGLang's own clients."""
    named = req.sampling_params.custom_params
    level = named.get(REQUEST_KEY) if isinstance(named, dict) else None
    return level if level in OURS else None


def _keep(req: Any, new: KeptRows) -> None:
    kept = getattr(req, ATTRIBUTE, None)
    if kept is None:
        kept = []
        setattr(req, ATTRIBUTE, kept)
    # Prefilled again after a retraction: the rows kept so far came first.
    stop = max((rows.stop for rows in kept), default=0)
    if stop < new.stop:
        kept.append(new if stop <= new.start else new.part(stop, new.stop))


def _rows(capturer: Capturer, req: Any, req_to_token_pool: Any, start: int, stop: int) -> KeptRows:
    """Return the rows start .. stop - 1, kept with the request or read from its slots."""
    rows = _slot_rows(capturer, req, req_to_token_pool, start, stop)
    logits = [] if rows.logits is None else [rows.logits]
    for kept in getattr(req, ATTRIBUTE, ()):
        low, high = max(start, kept.start), min(stop, kept.stop)
        if low >= high:
            continue
        part, target = kept.part(low, high), slice(low - start, high - start)
        rows.ids_TLK[target] = part.ids_TLK
        rows.stamp_T[target] = part.stamp_T
        for name, values_TLK in rows.values.items():
            values_TLK[target] = part.values[name]
        if part.logits is not None:
            logits = [*_outside(logits, low, high), part.logits]
    return replace(rows, logits=_joined(logits) if logits else None)


def _slot_rows(
    capturer: Capturer, req: Any, req_to_token_pool: Any, start: int, stop: int
) -> KeptRows:
    pool_index = versions.req_pool_index(req)
    if pool_index is None or not req.output_ids:
        # It has no slots, or ended before its prefill was complete: they hold anything.
        return capturer.slots.unwritten(stop - start, start)
    slots_T = req_to_token_pool.req_to_token[pool_index, start:stop].cpu().long().numpy()
    return capturer.slots.take(slots_T, start)


def _outside(parts: list[RouterLogits], low: int, high: int) -> list[RouterLogits]:
    """Return the logits of the rows before `low` and from `high` on."""
    sides = ((0, low), (high, np.iinfo(np.int64).max))
    return [part.within(*side) for part in parts for side in sides]


def _joined(parts: list[RouterLogits]) -> RouterLogits:
    rows_N = np.concatenate([part.rows_N for part in parts])
    order_N = np.argsort(rows_N)
    values_NLE = np.concatenate([part.values_NLE for part in parts])
    return RouterLogits(rows_N=rows_N[order_N], values_NLE=values_NLE[order_N])


def _stock_rows(rows: KeptRows) -> torch.Tensor:
    """Return rows as SGLang sends them: all layers, int32, zero where none was written."""
    ids_TLK = rows.ids_TLK.astype(np.int32)
    ids_TLK[rows.stamp_T == NOT_WRITTEN] = 0
    return torch.from_numpy(ids_TLK)


def _routes_of(capturer: Capturer, rows: KeptRows, level: str) -> Routes:
    layers = sorted(capturer.layers)
    stamps, covered_T = capturer.slots.stamps, rows.stamp_T != NOT_WRITTEN

    def known(values_TLK: np.ndarray | None) -> np.ndarray | None:
        if values_TLK is None:
            return None
        if len(layers) < values_TLK.shape[1]:
            values_TLK = values_TLK.take(layers, axis=1)
        if not covered_T.all():
            values_TLK[~covered_T] = 0
        return values_TLK

    settings = CaptureSettings(level=level)
    gates_TLK = known(rows.values.get("gates")) if settings.has_gates else None
    weights_TLK = known(rows.values.get("weights")) if settings.has_weights else None
    # All or none: one router of the model's own leaves nan.
    has_gates = gates_TLK is not None and are_probabilities(gates_TLK)
    has_weights = weights_TLK is not None and bool(np.isfinite(weights_TLK).all())
    return Routes.unchecked(
        expert_ids_TLK=known(rows.ids_TLK),
        layers=tuple(layers),
        num_experts=capturer.num_experts,
        covered_T=covered_T,
        combine_weights_TLK=weights_TLK if has_weights else None,
        gate_probs_TLK=gates_TLK if has_gates else None,
        router_logits=_logits_of(rows, layers, covered_T) if level == "logits" else None,
        origin_T=np.where(covered_T, stamps.origin(rows.stamp_T), Origin.ABSENT),
        weight_version_T=stamps.weight_version(rows.stamp_T),
    )


def _logits_of(rows: KeptRows, layers: list[int], covered_T: np.ndarray) -> RouterLogits | None:
    if rows.logits is None:
        return None
    rows_N, values_NLE = rows.logits.rows_N - rows.start, rows.logits.values_NLE[:, layers]
    # nan: a router had no logits for that row.
    known_N = covered_T[rows_N] & ~np.isnan(values_NLE).any((1, 2))
    return RouterLogits(rows_N=rows_N[known_N], values_NLE=values_NLE[known_N])
