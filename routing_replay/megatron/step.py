"""What is open between the start of a `recording` or `replaying` block and its end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from ..errors import ReplayError
from ..metrics.agreement import LayerAgreement
from ..routes.step_routes import StepRoutes
from .dispatch import DispatchCheck
from .layout import as_mask, as_rows
from .observer import AgreementSample
from .passes import ForwardPass, LivePass, LiveRecord, RecordingPass
from .patch_dispatch_sizes import KnownSizes
from .receipt import Receipt
from .recording import Recording
from .replaying_pass import ReplayingPass
from .routers import ChunkRouters
from .soft import ReplaceRate, SoftRule
from .weights import WeightReplay


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Which tokens of a replaying step are compared with live routing.

    Args:
        agreement: Sums of the comparison.
        every: Microbatches of a chunk from one comparison to the next.
        max_tokens: Tokens of such a microbatch; 0 takes all.
    """

    agreement: LayerAgreement
    every: int
    max_tokens: int


@dataclass(kw_only=True)
class Microbatch:
    """What `replay.microbatch` announced, until the model has run."""

    rows_BS: np.ndarray
    mask_BS: np.ndarray | None = None
    is_live: bool = False
    chunks: set[int] = field(default_factory=set)


@dataclass(kw_only=True)
class Step:
    """One `recording` or `replaying` block: its passes, and at its end its receipt.

    Args:
        chunks: Routers of this rank's model chunks.
        num_experts: Of the model.
        num_rows: Rows that `token_rows` may name.
        rank: Of this process, for messages.
        table: What is replayed; None records.
        only_layers: Layers that replay it; None: all.
        recording: Where live routes go; None keeps none.
        sampling: Of the comparison with live routing; None compares nothing.
        weights: How the table's combine weights are replayed; None: the router's own are taken.
        soft: Which replayed experts stay; None: all.
        replace_rate: Counts those that do not; given with `soft`.
        dispatch: Compares what the experts get with a plan, or gives Megatron's dispatchers its
            sizes; None: neither.
    """

    chunks: Sequence[ChunkRouters]
    num_experts: int
    num_rows: int
    rank: int
    table: StepRoutes | None = None
    only_layers: frozenset[int] | None = None
    recording: Recording | None = None
    sampling: Sampling | None = None
    weights: WeightReplay | None = None
    soft: SoftRule | None = None
    replace_rate: ReplaceRate | None = None
    dispatch: DispatchCheck | KnownSizes | None = None
    passes: list[ForwardPass] = field(default_factory=list)
    microbatch: Microbatch | None = None

    def enter(
        self, token_rows: torch.Tensor | np.ndarray, mask: torch.Tensor | np.ndarray | None
    ) -> None:
        """Announce the microbatch whose forward comes next."""
        rows_BS = as_rows(token_rows, self.num_rows)
        mask_BS = None if mask is None else as_mask(mask, rows_BS.shape)
        self._enter(Microbatch(rows_BS=rows_BS, mask_BS=mask_BS))

    def enter_live(self) -> None:
        """Announce a forward that routes live."""
        self._enter(Microbatch(rows_BS=np.empty((0, 0), np.int64), is_live=True))

    def leave(self) -> None:
        """The announced microbatch is over.

        Raises:
            ReplayError: No model chunk ran, or none was announced.
        """
        microbatch, self.microbatch = self.microbatch, None
        if microbatch is None:
            raise ReplayError(
                "no microbatch was entered",
                expected="replay.enter_microbatch(token_rows) before replay.leave_microbatch()",
                where=f"rank {self.rank}",
            )
        if not microbatch.chunks and not microbatch.is_live:
            raise ReplayError(
                "a microbatch was announced but no model chunk ran",
                expected="model(...) inside `with replay.microbatch(token_rows)`",
                where=f"rank {self.rank}",
                fix="Attach to the chunks that forward_step_func calls",
            )

    def begin(self, chunk: int) -> ForwardPass:
        """Return the pass of a chunk's forward that begins now."""
        microbatch = self.microbatch
        where = f"chunk {chunk}, rank {self.rank}"
        if microbatch is None:
            raise ReplayError(
                "the model runs inside a scope, but no microbatch was announced",
                expected="with replay.microbatch(token_rows): model(...)",
                where=where,
                fix="Or replay.live() for a forward that shall route live",
            )
        if chunk in microbatch.chunks and not microbatch.is_live:
            raise ReplayError(
                "a model chunk ran twice in one microbatch",
                expected="one forward for each replay.microbatch(token_rows)",
                where=where,
                fix="Announce each forward; use replay.live() for extra ones",
            )
        microbatch.chunks.add(chunk)
        begun = self._new_pass(self.chunks[chunk], microbatch)
        self.passes.append(begun)
        return begun

    def finish(self) -> Receipt:
        """Return the receipt of a block that ended without an exception.

        Raises:
            ReplayError: A layer or microbatch did not run exactly once.
        """
        if any(chunk.is_captured for chunk in self.chunks) and torch.cuda.is_available():
            torch.cuda.synchronize()  # the counts of captured routers were only enqueued
        for one in self.counted_passes():
            one.count_captured()
        receipt = Receipt.of(self.counted_passes())
        self._require_whole_microbatches()
        receipt.check(self.rank)
        if self.dispatch is not None:
            self.dispatch.finish(sum(p.chunk == 0 for p in self.counted_passes()))
        if self.recording is not None:
            self.recording.complete(self.passes)
        return receipt

    def close(self) -> None:
        """Free what the passes hold; a late recomputation of one of them raises."""
        self.microbatch = None
        for forward_pass in self.passes:
            forward_pass.close()

    def counted_passes(self) -> list[ForwardPass]:
        """Those that the receipt accounts for: all but the live ones."""
        return [p for p in self.passes if p.is_counted]

    def _enter(self, microbatch: Microbatch) -> None:
        if self.microbatch is not None:
            raise ReplayError("a microbatch is announced within another", fix="Do not nest them")
        self.microbatch = microbatch

    def _require_whole_microbatches(self) -> None:
        passes = self.counted_passes()
        numbers = [sum(p.chunk == c.chunk for p in passes) for c in self.chunks]
        if not passes or min(numbers) != max(numbers):
            raise ReplayError(
                "not every model chunk ran for every microbatch of the scope",
                expected="the same number of microbatches, at least 1, for each chunk",
                got=f"{numbers} for chunks 0..{len(numbers) - 1}",
                where=f"rank {self.rank}",
                fix="Run the whole schedule inside the scope",
            )

    def _new_pass(self, routers: ChunkRouters, microbatch: Microbatch) -> ForwardPass:
        number = sum(p.chunk == routers.chunk for p in self.counted_passes())
        chunk, layers = routers.chunk, routers.layers
        if microbatch.is_live:
            rows_T = np.empty(0, np.int64)
            return LivePass(number=number, chunk=chunk, layers=layers, rows_T=rows_T)
        rows_T = routers.order(microbatch.rows_BS)
        mask_T = None if microbatch.mask_BS is None else routers.order(microbatch.mask_BS)
        record = None
        if self.recording is not None:
            record = LiveRecord(layers, self.num_experts)
        if self.table is None:
            assert record is not None, "a step replays, records, or both"
            return RecordingPass(
                number=number,
                chunk=chunk,
                layers=layers,
                rows_T=rows_T,
                mask_T=mask_T,
                record=record,
            )
        return ReplayingPass(
            number=number,
            chunk=chunk,
            layers=layers,
            rows_T=rows_T,
            mask_T=mask_T,
            record=record,
            table=self.table,
            only_layers=self.only_layers,
            num_experts=self.num_experts,
            device=routers.device,
            observer=self._observer(self.table, routers, number, rows_T, mask_T),
            is_unfused=routers.is_unfused,
            weights=self.weights,
            soft=self.soft,
            replace_rate=self.replace_rate,
        )

    def _observer(
        self,
        table: StepRoutes,
        routers: ChunkRouters,
        number: int,
        rows_T: np.ndarray,
        mask_T: np.ndarray | None,
    ) -> AgreementSample | None:
        sampling = self.sampling
        if sampling is None or number % sampling.every or not routers.layers:
            return None
        is_candidate_T = rows_T >= 0 if mask_T is None else (rows_T >= 0) & mask_T
        return AgreementSample(
            sampling.agreement,
            table,
            routers.layers,
            rows_T,
            is_candidate_T,
            max_tokens=sampling.max_tokens,
            device=routers.device,
        )
