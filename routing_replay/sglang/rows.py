"""Which rows are true: the forward pass of each row of one request.

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

from dataclasses import dataclass

import numpy as np
import torch

from ..payload import encode
from ..routes import Origin, compact_dtype
from . import versions
from .capture import NOT_WRITTEN, unpack
from .settings import OURS, REQUEST_KEY

ATTRIBUTE = "routing_replay_rows"


@dataclass(frozen=True, kw_only=True)
class KeptRows:
    """Rows `start` and following of a request, as they left the device."""

    start: int
    packed_TLK: np.ndarray
    stamp_T: np.ndarray

    @property
    def stop(self) -> int:
        return self.start + len(self.stamp_T)


@dataclass(frozen=True, kw_only=True, eq=False)
class CollectedRows:
    """What `payload.encode` reads; the fields of `Routes`, not validated in the server's loop."""

    expert_ids_TLK: np.ndarray
    layers: tuple[int, ...]
    num_experts: int
    covered_T: np.ndarray
    gate_probs_TLK: np.ndarray | None
    router_logits: object | None
    origin_T: np.ndarray
    weight_version_T: np.ndarray

    @property
    def num_rows(self) -> int:
        return len(self.covered_T)

    @property
    def top_k(self) -> int:
        return self.expert_ids_TLK.shape[2]


def keep_prefill(batch, result) -> None:
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
    packed_TLK, stamp_T = output.topk.numpy(), output.stamp_T()
    at = 0
    for req, (start, num_rows) in zip(batch.reqs, output.extents, strict=False):
        rows = slice(at, at + num_rows)
        at += num_rows
        if req.return_routed_experts and not req.is_retracted:
            _keep(req, start, packed_TLK[rows], stamp_T[rows])


def keep_retracted(capturer, req, req_to_token_pool) -> None:
    """Keep all rows of a request that is about to lose its slots.

    Under overlap a step may be in flight; its token is thrown away and computed again, and so is
    its row: the rows end with the last token that was accepted.
    """
    if not req.return_routed_experts:
        return
    stop = len(req.origin_input_ids) + len(req.output_ids) - 1
    if not req.output_ids:
        # Nothing was sampled yet; the next prefill is the first whose log-probs count.
        setattr(req, ATTRIBUTE, [])
        return
    packed_TLK, stamp_T = _rows(capturer, req, req_to_token_pool, 0, stop)
    setattr(req, ATTRIBUTE, [KeptRows(start=0, packed_TLK=packed_TLK, stamp_T=stamp_T)])


def collect(capturer, req, req_to_token_pool) -> torch.Tensor:
    """What the request's answer carries: our payload, or stock's rows if it asked for those."""
    start = req.routed_experts_start_len
    stop = len(req.origin_input_ids) + len(req.output_ids_through_stop) - 1
    packed_TLK, stamp_T = _rows(capturer, req, req_to_token_pool, min(start, stop), stop)
    level = level_of(req)
    if level is None:
        return _stock_rows(capturer, packed_TLK, stamp_T)
    rows = _collected(capturer, packed_TLK, stamp_T, level)
    return torch.frombuffer(bytearray(encode(rows, start=min(start, stop))), dtype=torch.uint8)


def level_of(req) -> str | None:
    """The capture level that the request named; None for SGLang's own clients."""
    named = req.sampling_params.custom_params
    level = named.get(REQUEST_KEY) if isinstance(named, dict) else None
    return level if level in OURS else None


def _keep(req, start: int, packed_TLK: np.ndarray, stamp_T: np.ndarray) -> None:
    kept = getattr(req, ATTRIBUTE, None)
    if kept is None:
        kept = []
        setattr(req, ATTRIBUTE, kept)
    # Prefilled again after a retraction: what is known already came first.
    known = max((rows.stop for rows in kept), default=0) - start
    if known < len(stamp_T):
        new = slice(max(known, 0), None)
        start += new.start
        kept.append(KeptRows(start=start, packed_TLK=packed_TLK[new].copy(), stamp_T=stamp_T[new]))


def _rows(capturer, req, req_to_token_pool, start: int, stop: int):
    """Packed rows and stamps of [start, stop), from the slots and then from what was kept."""
    shape = (stop - start, capturer.num_layers, capturer.topk_size)
    pool_index = versions.req_pool_index(req)
    if pool_index is None or not req.output_ids:
        # Without slots, or ended before its prefill was complete: they hold anything.
        packed_TLK, stamp_T = np.zeros(shape, np.int32), np.full(shape[0], NOT_WRITTEN, np.int32)
    else:
        slots_T = req_to_token_pool.req_to_token[pool_index, start:stop].cpu().long()
        packed_TLK = capturer.host_cache.buffer[slots_T].numpy()
        stamp_T = capturer.stamps.stamp_N[slots_T.numpy()]
    for kept in getattr(req, ATTRIBUTE, ()):
        low, high = max(start, kept.start), min(stop, kept.stop)
        if low < high:
            there = slice(low - kept.start, high - kept.start)
            packed_TLK[low - start : high - start] = kept.packed_TLK[there]
            stamp_T[low - start : high - start] = kept.stamp_T[there]
    return packed_TLK, stamp_T


def _stock_rows(capturer, packed_TLK: np.ndarray, stamp_T: np.ndarray) -> torch.Tensor:
    ids_TLK = unpack(packed_TLK)[0] if capturer.settings.has_gates else packed_TLK
    return torch.from_numpy(np.where((stamp_T != NOT_WRITTEN)[:, None, None], ids_TLK, 0))


def _collected(capturer, packed_TLK, stamp_T, level: str) -> CollectedRows:
    layers = tuple(sorted(capturer.layers))
    packed_TLK = packed_TLK[:, list(layers)]
    gates_TLK = None
    ids_TLK = packed_TLK
    if capturer.settings.has_gates:
        ids_TLK, gates_TLK = unpack(packed_TLK)
    covered_T = stamp_T != NOT_WRITTEN
    if gates_TLK is None or level == "ids" or np.isnan(gates_TLK[covered_T]).any():
        gates_TLK = None
    else:
        gates_TLK[~covered_T] = 0
    ids_TLK = ids_TLK.astype(compact_dtype(capturer.num_experts))
    ids_TLK[~covered_T] = 0
    return CollectedRows(
        expert_ids_TLK=ids_TLK,
        layers=layers,
        num_experts=capturer.num_experts,
        covered_T=covered_T,
        gate_probs_TLK=gates_TLK,
        router_logits=None,
        origin_T=np.where(covered_T, capturer.stamps.origin(stamp_T), Origin.ABSENT),
        weight_version_T=capturer.stamps.weight_version(stamp_T),
    )
