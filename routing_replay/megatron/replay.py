"""`attach`: routing replay on the model chunks of a stock Megatron job.

    replay = attach(model_chunks, ReplayConfig(mode="R3"))
    with replay.replaying(table):
        # inside forward_step_func, on every pipeline stage:
        with replay.microbatch(token_rows):
            output = model(...)

Outside every scope the model is stock, bitwise.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
import torch.distributed as dist

from ..config import ReplayConfig
from ..errors import ReplayError
from ..metrics.agreement import LayerAgreement
from ..metrics.typed import Metric, all_reduce
from ..routes.table import RouteTable
from . import patch_expert_bias as expert_bias
from . import preflight
from .layout import as_rows, router_order
from .observer import AgreementSample
from .passes import LivePass, Pass, RecordingPass, ReplayingPass
from .receipt import Receipt
from .recording import Recording
from .routers import RouterSeam, describe_model, find_routers
from .scopes import Microbatch, Scope
from .selection import LiveTopK, Selection
from .tracking import PassTracker


def attach(
    model_chunks: torch.nn.Module | Sequence[torch.nn.Module], config: ReplayConfig | None = None
) -> Replay:
    """Attach routing replay to this rank's model chunks; collective over the pipeline group.

    Args:
        model_chunks: What Megatron's get_model returned (wrapped or not), all chunks of this rank.
        config: Mode and telemetry; `ReplayConfig()` if None.

    Returns:
        A handle: use it as a context manager or call `.remove()`.

    Raises:
        PreflightError: A configuration under which replay would be wrong; cause and fix are named.
        ReplayError: The model is attached already.
    """
    if isinstance(model_chunks, torch.nn.Module):
        model_chunks = [model_chunks]
    return Replay(list(model_chunks), config or ReplayConfig())


# (seam, live, ids_TK of the experts taken, rows_T of the tokens in the step's table)
Watch = Callable[[RouterSeam, LiveTopK, torch.Tensor, np.ndarray], None]


class Replay:
    """The handle of an attached model; made by `attach`.

    Attributes:
        config: As given.
        model: Layers of all pipeline stages, number of experts, top-k.
        receipt: Of the last scope that ended well; None before.
    """

    def __init__(self, model_chunks: list[torch.nn.Module], config: ReplayConfig):
        self.config = config
        self.receipt: Receipt | None = None
        self._chunks = model_chunks
        self._scope: Scope | None = None
        self._microbatch: Microbatch | None = None
        self._agreement: LayerAgreement | None = None
        self._watch: Watch | None = None
        self._tracker = PassTracker(self._begin)
        self._seams: list[RouterSeam] = []
        found = find_routers(model_chunks)
        if any(isinstance(item.router.router_replay, RouterSeam) for item in found):
            raise ReplayError(
                "routing replay is attached to this model already",
                expected="one attach for a model",
                fix="Use the first handle, or call its .remove() before attaching again",
            )
        self._model_config = _config_of(model_chunks, found)
        preflight.require(self._model_config, config)
        self.shape = describe_model(found, self._model_config, model_chunks)
        self._install(found)

    def __enter__(self) -> Replay:
        return self

    def __exit__(self, *exception) -> None:
        if exception[0] is not None:
            self._reset()
        self.remove()

    def remove(self) -> None:
        """Make the model stock again; calling it twice does nothing.

        Raises:
            ReplayError: A scope is open: its backward would route live, unnoticed.
        """
        if self._scope is not None:
            raise ReplayError(
                "routing replay is removed in mid-step",
                expected="no open scope",
                fix="Leave `with replay.replaying(...)` or `recording(...)` first",
            )
        self._tracker.remove()
        for seam in self._seams:
            expert_bias.remove(seam.router)
            seam.remove()
        self._seams = []

    @contextlib.contextmanager
    def recording(self, lengths: Sequence[int], is_partial: bool = False) -> Iterator[Recording]:
        """Within: live routing, recorded (R2). After: `recorded.table()`.

        Args:
            lengths: Rows of each sequence of the step, alike on all ranks: tokens - 1.
            is_partial: Rows that no microbatch names stay uncovered. Otherwise the table of a
                recording that missed some is an error: a dropped sequence would go unnoticed.
        """
        recorded = Recording(self.shape, lengths, self.is_writer, is_partial)
        with self._open(Scope(num_rows=recorded.num_rows, recorded=recorded)):
            yield recorded

    @contextlib.contextmanager
    def replaying(self, table: RouteTable, record_live: bool = False) -> Iterator[Recording | None]:
        """Within: the table's routes (R3: the rollout's; R2: recorded ones).

        Args:
            table: The step's routes, of this model.
            record_live: Record the live routes of the same passes as well: yields the recording,
                whose rows are numbered as the table's. Costs one top-k per router.

        Raises:
            ReplayError: At the end: a layer or microbatch that was not replayed exactly once.
            TableError: The table belongs to another model.
        """
        self._check_source(table)
        table.check_shape(self.shape)
        lengths = np.diff(table.offsets_S1)
        recorded = None
        if record_live:  # rows that the table does not cover are announced as -1
            recorded = Recording(self.shape, lengths, self.is_writer, is_partial=True)
        agreement = None
        if self.config.agreement_every:
            agreement = LayerAgreement(
                self.shape.layers,
                num_rows=table.num_rows,
                has_gates=table.gate_probs_LTK is not None,
                has_logits=table.logit_rows_N is not None,
                device=self._device,
            )
        scope = Scope(num_rows=table.num_rows, table=table, recorded=recorded, agreement=agreement)
        with self._open(scope):
            yield recorded

    @contextlib.contextmanager
    def microbatch(
        self, token_rows: torch.Tensor | np.ndarray, counts: torch.Tensor | None = None
    ) -> Iterator[None]:
        """Around one forward of one model chunk: whose tokens these are.

        Outside every scope it does nothing, so a forward_step_func needs no case of its own.

        Args:
            token_rows: int64 on the CPU, the local shape of `input_ids`; -1 routes live.
            counts: bool on the CPU, same shape: tokens that the metrics look at (the response,
                say). All, padding included, if None.
        """
        if self._scope is None:
            yield
            return
        rows_BS = as_rows(token_rows, self._scope.num_rows)
        counts_BS = None if counts is None else np.asarray(counts).reshape(rows_BS.shape)
        with self._announce(Microbatch(rows_BS=rows_BS, counts_BS=counts_BS)):
            yield

    @contextlib.contextmanager
    def live(self) -> Iterator[None]:
        """Within a scope: a forward that routes live (an evaluation in the middle, say)."""
        nothing = np.empty((0, 0), np.int64)
        with self._announce(Microbatch(rows_BS=nothing, counts_BS=None, is_live=True)):
            yield

    @contextlib.contextmanager
    def watching(self, watch: Watch) -> Iterator[None]:
        """Around or within a scope: `watch(seam, live, ids_TK, rows_T)` sees each router call of an
        announced forward, but no recomputation.
        """
        before, self._watch = self._watch, watch
        try:
            yield
        finally:
            self._watch = before

    def metrics(self, group=None) -> dict[str, Metric]:
        """Receipt and agreement of the last replaying scope, over all ranks; collective.

        Args:
            group: Process group; the world if None.

        Raises:
            ReplayError: No scope has ended well: nothing was replayed, and nothing recorded.
        """
        if self.receipt is None:
            raise ReplayError(
                "there is nothing to report: nothing was replayed or recorded yet",
                expected="a scope that ended: replay.replaying(table) or replay.recording(lengths)",
                fix="Open it around the schedule; without it replay.microbatch() does nothing",
            )
        device = self._device if _backend() == "nccl" else "cpu"
        found = all_reduce(self.receipt.metrics(), group, device)
        if self._agreement is not None:
            found |= self._agreement.reduced(group, device)
        return found

    # Scopes

    @contextlib.contextmanager
    def _open(self, scope: Scope) -> Iterator[None]:
        if not self._seams:
            raise ReplayError("routing replay was removed from this model", fix="attach() again")
        if self._scope is not None:
            raise ReplayError(
                "a scope is open already",
                expected="recording and replaying one after the other",
                fix="Use replaying(table, record_live=True) to do both in one pass",
            )
        self._scope = scope
        try:
            yield
            receipt = Receipt.of(scope.replayed_passes())
            scope.check_passes(len(self._chunks), _rank())
            receipt.check(_rank())
            if scope.recorded is not None:
                scope.recorded.complete(scope.passes)
            self.receipt, self._agreement = receipt, scope.agreement
        finally:
            self._reset()

    @contextlib.contextmanager
    def _announce(self, microbatch: Microbatch) -> Iterator[None]:
        if self._microbatch is not None:
            raise ReplayError("a microbatch is announced within another", fix="Do not nest them")
        self._microbatch = microbatch
        try:
            yield
            if not microbatch.chunks and self._scope is not None and not microbatch.is_live:
                raise ReplayError(
                    "a microbatch was announced but no model chunk ran",
                    expected="model(...) inside `with replay.microbatch(token_rows)`",
                    where=f"rank {_rank()}",
                    fix="Attach to the chunks that forward_step_func calls",
                )
        finally:
            self._microbatch = None
            self._tracker.leave_forward()

    def _reset(self) -> None:
        """No scope: stock again, and a late recomputation of a closed pass raises."""
        for p in self._scope.passes if self._scope else ():
            p.is_closed = True
            if isinstance(p, ReplayingPass):
                p.release()
        self._scope = self._microbatch = None
        self._tracker.forget()

    def _check_source(self, table: RouteTable) -> None:
        wanted = {"R2": "training", "R3": "rollout"}.get(self.config.mode)
        if wanted and table.source != wanted:
            raise ReplayError(
                f"mode {self.config.mode} replays the {wanted} engine's routes",
                expected=f"a table of source {wanted!r}",
                got=repr(table.source),
                where=table.where,
                fix="R2: record first, with replay.recording(lengths); R3: pass SGLang's routes",
            )

    # Hooks

    def _install(self, found) -> None:
        for item in found:
            # First what may refuse: the same for all routers, so nothing is left half attached.
            expert_bias.install(item.router, is_active=lambda: self._scope is not None)
            seam = RouterSeam(item.router, item.chunk, item.layer, item.name, self._select)
            if self.config.unset_router_fusion and item.router.config.moe_router_fusion:
                item.router.config = copy.copy(item.router.config)
                item.router.config.moe_router_fusion = False
            seam.install()
            self._seams.append(seam)
        self._tracker.watch(self._chunks)

    def _begin(self, chunk: int) -> Pass | None:
        if self._scope is None:
            return None
        microbatch = self._microbatch
        where = f"chunk {chunk}, rank {_rank()}"
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
        begun = self._new_pass(chunk, microbatch)
        self._scope.passes.append(begun)
        return begun

    def _new_pass(self, chunk: int, microbatch: Microbatch) -> Pass:
        scope, seams = self._scope, [s for s in self._seams if s.chunk == chunk]
        number = sum(p.chunk == chunk for p in scope.replayed_passes())
        common = {"number": number, "chunk": chunk, "layers": tuple(s.layer for s in seams)}
        if microbatch.is_live:
            return LivePass(**common, rows_T=np.empty(0, np.int64))
        common["rows_T"] = self._router_order(seams, microbatch.rows_BS)
        if microbatch.counts_BS is not None:
            common["counts_T"] = self._router_order(seams, microbatch.counts_BS)
        num_experts = self.shape.num_experts
        if scope.table is None:
            return RecordingPass(**common, num_experts=num_experts)
        return ReplayingPass(
            **common,
            table=scope.table,
            seams=seams,
            device=self._device,
            record_live=scope.recorded is not None,
            num_experts=num_experts,
            observer=self._observer(seams, number, common["rows_T"], common.get("counts_T")),
        )

    def _observer(self, seams, number, rows_T, counts_T) -> AgreementSample | None:
        every = self.config.agreement_every
        if not every or number % every or not seams:
            return None
        return AgreementSample(
            self._scope.agreement,
            self._scope.table,
            tuple(s.layer for s in seams),
            rows_T,
            counts_T,
            self.config.agreement_tokens,
            self._device,
        )

    def _router_order(self, seams: list[RouterSeam], values_BS: np.ndarray) -> np.ndarray:
        if not (seams and self._model_config.sequence_parallel):
            return router_order(values_BS, 1, 0)
        group = seams[0].router.tp_group
        return router_order(values_BS, group.size(), group.rank())

    def _select(self, seam: RouterSeam, live: LiveTopK) -> Selection:
        current, is_recompute = self._tracker.find()
        if current is not None:
            selection = current.select(seam, live, is_recompute)
            if self._watch is not None and not is_recompute and len(current.rows_T):
                self._watch(seam, live, selection[1], current.rows_T)
            return selection
        if self._scope is None:
            return seam.stock(live)
        raise ReplayError(
            "a router ran outside every announced microbatch of its scope",
            expected="routers run inside a forward of the attached chunks, or its recomputation",
            where=f"layer {seam.layer} ({seam.name}), rank {_rank()}",
            fix="Attach to the modules that forward_step_func calls",
        )

    @property
    def is_writer(self) -> bool:
        """Tensor-parallel ranks without sequence parallelism see the same tokens: one records."""
        if not self._seams or self._model_config.sequence_parallel:
            return True
        return self._seams[0].router.tp_group.rank() == 0

    @property
    def _device(self) -> torch.device:
        return next(self._chunks[0].parameters()).device


def _config_of(model_chunks, found):
    if found:
        return found[0].router.config
    for module in model_chunks[0].modules():  # a stage without routed layers
        if hasattr(module, "config"):
            return module.config
    raise ReplayError(
        "the model chunks carry no Megatron configuration", fix="Pass Megatron models"
    )


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _backend() -> str | None:
    return dist.get_backend() if dist.is_initialized() else None
