"""The rows of one request: each of the forward pass whose log-prob was returned.

SGLang keeps rows by KV slot. That is the truth for a cached prefix and for decoded tokens, and
fails where a request's slots stop being its own:

- when two requests prefill the same prompt, the radix tree keeps one copy, and the other's slots
  are replaced, although its log-probs came from its own forward pass;
- a retracted request loses its slots and is prefilled again, although the log-probs of the tokens
  sampled so far are those of the first passes;
- a cache on the host, or another server, fills slots without a forward pass: the row of a shared
  slot holds for a request only if it was computed for the same tokens (`prefixes`).

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
from ..routes.origin import Origin, is_covered
from ..routes.payload import parts_of
from ..routes.routes import RouterLogits, Routes, are_probabilities
from . import versions
from .prefixes import of_request
from .slots import KeptRows, SlotRows, Stamps

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
    slots_T = output.out_cache_loc.numpy()
    for req, (start, num_rows) in zip(batch.reqs, output.extents, strict=False):
        rows = slice(at, at + num_rows)
        if not req.is_retracted:
            _name(output.capturer.slots, req, slots_T[rows], start)
            if req.return_routed_experts:
                _keep(req, step.part(rows.start, rows.stop, shift=start - at))
        at = rows.stop
    if output.capturer.host_rows is not None:
        output.capturer.host_rows.settle()


def keep_retracted(capturer: Capturer, req: Any, req_to_token_pool: Any) -> None:
    """Keep all rows of a request that is about to lose its slots.

    Under overlap a step may be in flight; its token is thrown away and computed again, and so is
    its row: the rows end with the last token that was accepted.
    """
    name_output(capturer, req, req_to_token_pool)
    if not req.return_routed_experts:
        return
    stop = len(req.origin_input_ids) + len(req.output_ids) - 1
    if not req.output_ids or req.input_embeds is not None:
        # Nothing was sampled yet, or SGLang throws it away (prompts of embeddings): the next
        # prefill is the first whose log-probs count.
        setattr(req, ATTRIBUTE, [])
        return
    setattr(
        req, ATTRIBUTE, [_rows(capturer, req, req_to_token_pool, 0, stop, capturer.settings.level)]
    )


def name_output(capturer: Capturer, req: Any, req_to_token_pool: Any) -> None:
    """Name the rows of a request's output, which the radix tree is about to share.

    Under overlap the last token may be in flight, and is shared with the others.
    """
    pool_index = versions.req_pool_index(req)
    has_names = capturer.slots.has_names and req.input_embeds is None
    if pool_index is None or not req.output_ids or not has_names:
        return
    first, prefix_T = len(req.origin_input_ids), of_request(req)
    stop = len(prefix_T) - 1
    num_shared = stop + (versions.num_committed(req) > stop)
    slots_T = req_to_token_pool.req_to_token[pool_index, first:num_shared].cpu().long().numpy()
    capturer.slots.name(slots_T[: stop - first], prefix_T[first:stop])
    if num_shared > stop:
        capturer.slots.expect(int(slots_T[-1]), int(prefix_T[stop]))


def collect(capturer: Capturer, req: Any, req_to_token_pool: Any) -> torch.Tensor:
    """Return what the answer carries: our payload, or stock's rows for SGLang's own clients."""
    start = req.routed_experts_start_len
    stop = len(req.origin_input_ids) + len(req.output_ids_through_stop) - 1
    start = min(start, stop)
    level = level_of(req)
    rows = _rows(capturer, req, req_to_token_pool, start, stop, level or "ids")
    if level is None:
        return _stock_rows(rows)
    payload = bytearray().join(parts_of(_routes_of(capturer, rows, level), start))
    return torch.frombuffer(payload, dtype=torch.uint8)


def level_of(req: Any) -> str | None:
    """Return the capture level that the request names; None for SGLang's own clients."""
    named = req.sampling_params.custom_params
    level = named.get(REQUEST_KEY) if isinstance(named, dict) else None
    return level if level in OURS else None


def _name(slots: SlotRows, req: Any, slots_T: np.ndarray, start: int) -> None:
    """Name the rows that a request prefilled from position `start` on."""
    if slots.has_names and req.input_embeds is None:
        prefix_T = of_request(req)[start : start + len(slots_T)]
        slots.name(slots_T[: len(prefix_T)], prefix_T)


def _keep(req: Any, new: KeptRows) -> None:
    kept = getattr(req, ATTRIBUTE, None)
    if kept is None:
        kept = []
        setattr(req, ATTRIBUTE, kept)
    # Prefilled again after a retraction: the rows kept so far came first.
    stop = max((rows.stop for rows in kept), default=0)
    if stop < new.stop:
        kept.append(new if stop <= new.start else new.part(stop, new.stop))


def _rows(
    capturer: Capturer, req: Any, req_to_token_pool: Any, start: int, stop: int, level: str
) -> KeptRows:
    """Return the rows start .. stop - 1, kept with the request or read from its slots."""
    rows = _slot_rows(capturer, req, req_to_token_pool, start, stop, level)
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
    capturer: Capturer, req: Any, req_to_token_pool: Any, start: int, stop: int, level: str
) -> KeptRows:
    pool_index = versions.req_pool_index(req)
    slots = capturer.slots
    if pool_index is None or not req.output_ids:
        # It has no slots, or ended before its prefill was complete: they hold anything.
        return slots.lost(stop - start, start, Origin.ABORTED)
    slots_T = req_to_token_pool.req_to_token[pool_index, start:stop].cpu().long().numpy()
    settings = CaptureSettings(level=level)
    wanted = ["gates"] * settings.has_gates + ["weights"] * settings.has_weights
    rows, num_shared = slots.take(slots_T, start, wanted), len(req.origin_input_ids) - start
    if slots.has_names and num_shared > 0 and req.input_embeds is None:
        prefix_T = of_request(req)[start : start + num_shared]
        is_other_T = ~slots.is_of(slots_T[:num_shared], prefix_T)
        rows.stamp_T[:num_shared][is_other_T] = capturer.cause_of_others
    return rows


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
    ids_TLK[~is_covered(Stamps.origin(rows.stamp_T))] = 0
    return torch.from_numpy(ids_TLK)


def _routes_of(capturer: Capturer, rows: KeptRows, level: str) -> Routes:
    layers = sorted(capturer.layers)
    stamps, origin_T = capturer.slots.stamps, Stamps.origin(rows.stamp_T)
    covered_T = is_covered(origin_T)

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
        origin_T=origin_T,
        weight_version_T=stamps.weight_version(rows.stamp_T),
    )


def _logits_of(rows: KeptRows, layers: list[int], covered_T: np.ndarray) -> RouterLogits | None:
    if rows.logits is None:
        return None
    rows_N, values_NLE = rows.logits.rows_N - rows.start, rows.logits.values_NLE[:, layers]
    # nan: a router had no logits for that row.
    known_N = covered_T[rows_N] & ~np.isnan(values_NLE).any((1, 2))
    return RouterLogits(rows_N=rows_N[known_N], values_NLE=values_NLE[known_N])
