"""How far the router has moved on the experts that the old policy took: RSPO's gamma, per token."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import torch
import torch.distributed as dist

from ..errors import ReplayError
from .passes import ForwardPass
from .ranks import reduce
from .replay import Replay
from .routers import RouterSeam
from .selection import LiveTopK, probabilities
from .transfers import compact_dtype, to_device, to_host
from .watching import RouterCall


class RouterShift:
    """gamma = exp(-mean over layers and slots of |log router_theta(e) - log router_old(e)|).

    e are the experts of the old policy's pass: its own where it routed live, the replayed ones
    under replay. Tokens are known by their rows in the step's table, so the two passes may cut a
    batch differently as long as a rank sees its tokens and layers again.

        with shift.remembering(num_rows): ...      # around the old policy's pass, in a scope
        with shift.comparing(): ...                # around a pass of the current policy, in a scope
        gamma_R = shift.gamma()                    # collective

    Memory: a float32 and a compact id for each token, layer and slot of this rank, on the host; on
    the device those of one microbatch.

    Source: RSPO (2510.23027v2), equation 11.
    """

    def __init__(self, replay: Replay):
        self._replay = replay
        self._num_rows = 0
        self._memory: dict[int, _ChunkMemory] = {}
        self._sums_R = self._counts_R = torch.empty(0)

    @contextlib.contextmanager
    def remembering(self, num_rows: int) -> Iterator[None]:
        """Within: keep the old policy's log-probs of the experts that are taken.

        Args:
            num_rows: Rows of the step's table.
        """
        self._num_rows = num_rows
        recorder = _Recorder(self._replay.shape.num_experts)
        with self._replay.watching(recorder):
            yield
        self._memory = recorder.finish(num_rows)

    @contextlib.contextmanager
    def comparing(self) -> Iterator[None]:
        """Within: compare the current policy's log-probs of the same experts."""
        comparer = _Comparer(self._memory, self._num_rows)
        with self._replay.watching(comparer):
            yield
        self._sums_R, self._counts_R = comparer.sums_R, comparer.counts_R

    def gamma(self) -> torch.Tensor:
        """Return float32 by row; nan where a layer has not seen the token twice; collective.

        Rows of another data-parallel rank's sequences are nan: that rank has them.
        """
        both = torch.stack([self._sums_R, self._counts_R])
        if not self._replay.is_writer:
            both.zero_()  # tensor-parallel ranks hold the same tokens: one of them is summed
        reduce(both, dist.ReduceOp.SUM, self._replay.table_groups)
        sums_R, counts_R = both
        num_layers = len(self._replay.shape.layers)
        gamma_R = (-sums_R / num_layers).exp()
        return torch.where(counts_R == num_layers, gamma_R, torch.nan)


class _ChunkMemory:
    """The old policy's log-probs of one chunk's routers, on the host.

    Args:
        layers: Of the chunk.
        rows_M: Rows of the tokens.
        ids_LMK: Experts that they took.
        logs_LMK: float32 log-probs of these experts.
        num_rows: Rows of the step's table.
    """

    def __init__(
        self,
        layers: tuple[int, ...],
        rows_M: np.ndarray,
        ids_LMK: np.ndarray,
        logs_LMK: np.ndarray,
        num_rows: int,
    ):
        self.layers = layers
        self.ids_LMK, self.logs_LMK = ids_LMK, logs_LMK
        # Four bytes per row, once for all layers: a step has less than 2**31 tokens.
        self.index_R = np.full(num_rows, -1, np.int32)
        self.index_R[rows_M] = np.arange(len(rows_M), dtype=np.int32)


class _PassBuffers:
    """One pass while it is remembered: ids and log-probs of all its layers on the device."""

    def __init__(self, one: ForwardPass, device: torch.device, top_k: int, dtype: torch.dtype):
        self.forward_pass = one
        self.tokens_M, self.rows_M = _tokens_with_rows(one)
        self.tokens_on_device_M = to_device(self.tokens_M, device)
        shape = (len(one.layers), len(self.tokens_M), top_k)
        self.ids_LMK = torch.empty(shape, dtype=dtype, device=device)
        self.logs_LMK = torch.empty(shape, dtype=torch.float32, device=device)

    def move_to_host(self) -> None:
        self.ids_LMK, self.logs_LMK = to_host(self.ids_LMK), to_host(self.logs_LMK)


class _Recorder:
    """Watches the old policy's pass."""

    def __init__(self, num_experts: int):
        self._dtype = compact_dtype(num_experts)
        self._passes: dict[int, list[_PassBuffers]] = {}

    @torch.no_grad()
    def see(self, call: RouterCall) -> None:
        one = call.forward_pass
        of_chunk = self._passes.setdefault(one.chunk, [])
        if not of_chunk or of_chunk[-1].forward_pass is not one:
            if of_chunk:  # the chunk's forward before this one has ended
                of_chunk[-1].move_to_host()
            device, top_k = call.ids_TK.device, call.ids_TK.shape[1]
            of_chunk.append(_PassBuffers(one, device, top_k, self._dtype))
        buffers, index = of_chunk[-1], one.layers.index(call.seam.layer)
        ids_MK = call.ids_TK[buffers.tokens_on_device_M]
        buffers.ids_LMK[index].copy_(ids_MK)
        logs_MK = _logs(call.seam, call.live, buffers.tokens_on_device_M, ids_MK)
        buffers.logs_LMK[index].copy_(logs_MK)

    def finish(self, num_rows: int) -> dict[int, _ChunkMemory]:
        """Return the log-probs by chunk."""
        for of_chunk in self._passes.values():
            of_chunk[-1].move_to_host()
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # the copies to the host were only enqueued
        return {
            chunk: _ChunkMemory(
                buffers[0].forward_pass.layers,
                np.concatenate([b.rows_M for b in buffers]),
                np.concatenate([b.ids_LMK.numpy() for b in buffers], axis=1),
                np.concatenate([b.logs_LMK.numpy() for b in buffers], axis=1),
                num_rows,
            )
            for chunk, buffers in self._passes.items()
        }


class _Comparer:
    """Watches the current policy's pass, and sums how far its routers moved."""

    def __init__(self, memory: dict[int, _ChunkMemory], num_rows: int):
        self._memory = memory
        self.sums_R, self.counts_R = torch.zeros(2, num_rows)
        self._pass: ForwardPass | None = None

    @torch.no_grad()
    def see(self, call: RouterCall) -> None:
        if call.forward_pass is not self._pass:
            self._begin(call)
        index = call.forward_pass.layers.index(call.seam.layer)
        logs_MK = _logs(call.seam, call.live, self._tokens_M, self._ids_LMK[index].long())
        moved_M = (logs_MK - self._logs_LMK[index]).abs().mean(dim=1)
        self.sums_R[self._rows_M] += moved_M
        self.counts_R[self._rows_M] += 1

    def _begin(self, call: RouterCall) -> None:
        """Bring the old policy's side of a pass to the device, once for all layers."""
        one, device = call.forward_pass, call.ids_TK.device
        memory = self._memory.get(one.chunk)
        if memory is None or memory.layers != one.layers:
            raise ReplayError(
                "the old policy's pass was not remembered",
                expected="`with shift.remembering(num_rows)` around a pass over the same layers",
                where=f"layer {call.seam.layer}",
            )
        self.sums_R, self.counts_R = self.sums_R.to(device), self.counts_R.to(device)
        tokens_M, rows_M = _tokens_with_rows(one)
        index_M = memory.index_R[rows_M]
        is_known_M = index_M >= 0
        index_M = index_M[is_known_M]
        self._tokens_M = to_device(tokens_M[is_known_M], device)
        self._rows_M = to_device(rows_M[is_known_M], device)
        self._ids_LMK = to_device(memory.ids_LMK[:, index_M], device)
        self._logs_LMK = to_device(memory.logs_LMK[:, index_M], device)
        self._pass = one


def _tokens_with_rows(one: ForwardPass) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of a pass that have a row, and their rows."""
    tokens_M = np.flatnonzero(one.rows_T >= 0)
    return tokens_M, one.rows_T[tokens_M]


def _logs(
    seam: RouterSeam, live: LiveTopK, tokens_M: torch.Tensor, ids_MK: torch.Tensor
) -> torch.Tensor:
    """Log-probs of the experts over all experts, before any renormalisation."""
    return probabilities(seam, live.scores_TE.detach()[tokens_M]).gather(1, ids_MK).log().float()
