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
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
import torch.distributed as dist

from ..config import ReplayConfig
from ..errors import ConfigError, ReplayError
from ..metrics.agreement import LayerAgreement
from ..metrics.typed import Metric, all_reduce
from ..routes.shape import MoEShape
from ..routes.step_routes import StepRoutes
from .attachment import Attachment, this_rank
from .dispatch import DispatchCheck
from .patch_dispatch_sizes import KnownSizes
from .receipt import Receipt
from .recording import Recording
from .routers import shape_of_configuration
from .soft import ReplaceRate, SoftRule
from .step import Sampling, Step
from .watching import Watcher

# Whose routes a mode replays, as tables name it.
SOURCES = {"R2": "training", "R3": "rollout"}


def attach(
    model_chunks: torch.nn.Module | Sequence[torch.nn.Module], config: ReplayConfig | None = None
) -> Replay:
    """Attach routing replay to this rank's model chunks; collective over the pipeline group.

    Args:
        model_chunks: What Megatron's get_model returned (wrapped or not), all chunks of this rank.
        config: Mode and metrics; `ReplayConfig()` if None. Mode `disabled` leaves the model
            untouched and makes every scope a no-op, so that a loop needs no case of its own.

    Returns:
        A handle: use it as a context manager or call `.remove()`.

    Raises:
        ConfigError: The mode is `auto`: only the loop knows its number of mini-batches.
        PreflightError: A configuration under which replay would be wrong; cause and fix are named.
        ReplayError: The model is attached already.
    """
    chunks = [model_chunks] if isinstance(model_chunks, torch.nn.Module) else list(model_chunks)
    config = config or ReplayConfig()
    if config.mode == "auto":
        raise ConfigError(
            "the replay mode auto is not resolved",
            expected="disabled, R2 or R3",
            got="auto",
            fix="attach(chunks, config.resolve(num_mini_batches)), with global batch / mini batch",
        )
    if config.mode == "disabled":
        return Replay(shape_of_configuration(chunks), config)
    attachment = Attachment(chunks, config)
    return Replay(attachment.shape, config, attachment)


class Replay:
    """The handle of an attached model; made by `attach`.

    In mode `disabled` nothing is attached: scopes do nothing, and recordings cover no row.

    Attributes:
        config: As passed to `attach`.
        shape: Layers of all pipeline stages, number of experts, top-k.
        receipt: Of the last scope that ended well; None before.
    """

    def __init__(self, shape: MoEShape, config: ReplayConfig, attachment: Attachment | None = None):
        self.config = config
        self.shape = shape
        self.receipt: Receipt | None = None
        self._attachment = attachment
        self._agreement: LayerAgreement | None = None
        self._replace_rate: ReplaceRate | None = None
        self._dispatch: DispatchCheck | KnownSizes | None = None

    @property
    def local_layers(self) -> tuple[int, ...]:
        """Layers that this rank routes, ascending; those of the shape in mode `disabled`."""
        if self._attachment is None:
            return self.shape.layers
        chunks = self._attachment.chunks
        return tuple(sorted(layer for routers in chunks for layer in routers.layers))

    def __enter__(self) -> Replay:
        return self

    def __exit__(self, *exception: object) -> None:
        if exception[0] is not None and self._attachment is not None:
            self._attachment.close()
        self.remove()

    def remove(self) -> None:
        """Make the model stock again; calling it twice does nothing.

        Raises:
            ReplayError: A scope is open: its backward would route live, unnoticed.
        """
        if self._attachment is not None:
            self._attachment.remove()

    @contextlib.contextmanager
    def recording(
        self,
        lengths: Sequence[int] | np.ndarray,
        is_partial: bool = False,
        is_shared: bool = True,
    ) -> Iterator[Recording]:
        """Within: live routing, recorded (R2). After: `recorded.table()`.

        Args:
            lengths: Tokens of each sequence of the step.
            is_partial: Rows that no microbatch names stay uncovered. Otherwise the table of a
                recording that missed some is an error: a dropped sequence would go unnoticed.
            is_shared: The lengths are those of all data-parallel ranks' sequences, alike on all
                ranks. False: of this data-parallel rank's own, alike on its tensor-, context- and
                pipeline-parallel ranks.
        """
        if self._attachment is None:
            recorded = self._new_recording(lengths, is_partial=True, is_shared=is_shared)
            yield recorded
            recorded.complete([])
            return
        recorded = self._new_recording(lengths, is_partial, is_shared)
        with self._open(self._new_step(recorded.num_rows, recording=recorded)):
            yield recorded

    @contextlib.contextmanager
    def replaying(
        self,
        table: StepRoutes,
        record_live: bool = False,
        is_shared: bool = True,
        layers: Iterable[int] | None = None,
        weight_version: int | None = None,
        has_weights: bool = True,
        dispatch: np.ndarray | None = None,
        sizes: np.ndarray | None = None,
    ) -> Iterator[Recording | None]:
        """Within: the table's routes (R3: the rollout's; R2: recorded ones).

        Args:
            table: The step's routes, of this model. Data-parallel ranks may bring different ones.
            record_live: Record the live routes of the same passes as well: yields the recording,
                whose rows are numbered as the table's. Costs one top-k per router.
            is_shared: Of that recording, as of `recording`.
            layers: Global indices of the layers that replay; the others route live. None: all.
            weight_version: Of the trained weights, for `soft_decay`; None: the table's newest.
            has_weights: False takes the router's own combine weights, whatever `config.weights`
                says.
            dispatch: int64 [M, L, E], how many tokens with routes this rank's group of experts gets
                in each microbatch of the scope (`StepPlan.dispatch`). The end of the scope compares
                it with what the experts got, collectively over the group; a difference is an error
                there on a CPU. On a GPU nothing waits: `metrics()` or the next scope raises it.
            sizes: Instead of `dispatch`, int64 [M, D, L, E], of each data-parallel rank of the
                group (`StepPlan.sizes`): Megatron's all-to-all dispatcher takes the sizes of its
                messages from here, without a gather and a wait in every layer. Every token needs a
                route. A difference from the routers' maps is an error as above.

        Raises:
            ConfigError: `layers` names a layer without a router, or `record_live` with captured
                routers.
            ReplayError: At the end: a layer or microbatch that was not replayed exactly once.
            TableError: The table belongs to another model.
        """
        # Rows that the table does not cover are announced as -1.
        lengths_S = np.diff(table.offsets_S1) + 1
        if self._attachment is None:
            scope = self.recording(lengths_S, is_shared=is_shared) if record_live else None
            with scope or contextlib.nullcontext() as recorded:
                yield recorded
            return
        self._check_source(table)
        table.check_shape(self.shape)
        only_layers = None if layers is None else self._known_layers(layers)
        recorded = None
        if record_live:
            self._require_calls("replaying(table, record_live=True)")
            recorded = self._new_recording(lengths_S, is_partial=True, is_shared=is_shared)
        soft = SoftRule.of(self.config, table, weight_version)
        step = self._new_step(table.num_rows, table, recorded, only_layers, soft)
        if dispatch is not None:
            self._require_whole_replay(soft, only_layers)
            step.dispatch = self._attachment.dispatch_check(np.asarray(dispatch))
        if sizes is not None:
            self._require_whole_replay(soft, only_layers)
            step.dispatch = self._attachment.known_sizes(np.asarray(sizes))
        step.weights = self._attachment.weights if has_weights else None
        with self._open(step):
            yield recorded

    @contextlib.contextmanager
    def microbatch(
        self,
        token_rows: torch.Tensor | np.ndarray,
        mask: torch.Tensor | np.ndarray | None = None,
    ) -> Iterator[None]:
        """Around one forward of one model chunk: whose tokens these are.

        Outside every scope it does nothing, so a forward_step_func needs no case of its own.

        Args:
            token_rows: int64 on the CPU, the local shape of `input_ids`; -1 routes live.
            mask: bool on the CPU, same shape: tokens that the metrics look at (the response,
                say). All, padding included, if None.

        Raises:
            ReplayError: Rows or mask that do not fit; or at the end, that no model chunk ran.
        """
        self.enter_microbatch(token_rows, mask)
        with self._leaving_microbatch():
            yield

    def enter_microbatch(
        self,
        token_rows: torch.Tensor | np.ndarray,
        mask: torch.Tensor | np.ndarray | None = None,
    ) -> None:
        """Announce the next forward where no `with` fits; arguments and errors as `microbatch`.

        `leave_microbatch` follows it. After an exception the scope's end cleans up.
        """
        if self._step is not None:
            self._step.enter(token_rows, mask)

    def leave_microbatch(self) -> None:
        """End what `enter_microbatch` began.

        Raises:
            ReplayError: No model chunk ran, or no microbatch was entered.
        """
        if self._attachment is not None and self._step is not None:
            self._attachment.leave_forward()
            self._step.leave()

    @contextlib.contextmanager
    def live(self) -> Iterator[None]:
        """Within a scope: a forward that routes live (an evaluation in the middle, say)."""
        if self._step is not None:
            self._step.enter_live()
        with self._leaving_microbatch():
            yield

    @contextlib.contextmanager
    def watching(self, watcher: Watcher) -> Iterator[None]:
        """Around or within a scope: `watcher.see` gets each router call of an announced forward.

        Raises:
            ConfigError: Routers are captured by CUDA graphs: they make no call.
        """
        if self._attachment is None:
            yield
            return
        self._require_calls("watching")
        before, self._attachment.watcher = self._attachment.watcher, watcher
        try:
            yield
        finally:
            self._attachment.watcher = before

    def metrics(self, group: dist.ProcessGroup | None = None) -> dict[str, Metric]:
        """Return receipt and agreement of the last scope, over all ranks; collective.

        Mode `disabled` has no metrics.

        Data-parallel ranks may have replayed different tables: rows are compared only among the
        ranks that work on the same sequences.

        Args:
            group: Process group of the sums; the world if None. It must hold, with a rank, all
                ranks of the same data-parallel rank.

        Raises:
            ReplayError: No scope has ended well: nothing was replayed, and nothing recorded.
        """
        if self._attachment is None:
            return {}
        if self.receipt is None:
            raise ReplayError(
                "there is nothing to report: nothing was replayed or recorded yet",
                expected="a scope that ended: replay.replaying(table) or replay.recording(lengths)",
                fix="Open it around the schedule; without it replay.microbatch() does nothing",
            )
        self._settle()
        is_nccl = dist.is_initialized() and dist.get_backend(group) == "nccl"
        device = self._attachment.device if is_nccl else "cpu"
        metrics = all_reduce(self.receipt.metrics(), group, device)
        if self._agreement is not None:
            table_groups = self._attachment.grid.table
            metrics |= self._agreement.reduced(group, device, table_groups)
        if self._replace_rate is not None:
            metrics |= all_reduce(self._replace_rate.metrics(), group, device)
        return metrics

    @property
    def is_writer(self) -> bool:
        """Whether this rank speaks for its tokens: tensor-parallel ranks may hold the same ones."""
        return self._attachment is None or self._attachment.is_writer

    @property
    def table_groups(self) -> tuple[dist.ProcessGroup, ...]:
        """Axes of the ranks that work on the same sequences; empty for a rank alone."""
        return () if self._attachment is None else self._attachment.grid.table

    @property
    def _step(self) -> Step | None:
        return None if self._attachment is None else self._attachment.step

    @contextlib.contextmanager
    def _open(self, step: Step) -> Iterator[None]:
        assert self._attachment is not None, "a disabled handle opens no step"
        self._settle()
        self._attachment.open(step)
        try:
            yield
            self.receipt = step.finish()
            self._dispatch = step.dispatch
            if self._attachment.device.type == "cpu":
                self._settle()
            self._agreement = step.sampling.agreement if step.sampling else None
            self._replace_rate = step.replace_rate
        finally:
            self._attachment.close()

    def _settle(self) -> None:
        """Raise what the last scope's comparison with its plan found."""
        dispatch, self._dispatch = self._dispatch, None
        if dispatch is not None:
            dispatch.settle(this_rank())

    def _require_whole_replay(
        self, soft: SoftRule | None, only_layers: frozenset[int] | None
    ) -> None:
        """Raise ConfigError where not every row of the table is dispatched as it says."""
        if soft is not None or only_layers is not None:
            raise ConfigError(
                "a plan counts every row of the table in every layer",
                expected="dispatch= without soft replay and without layers=",
                fix="Replay without dispatch=",
            )

    @contextlib.contextmanager
    def _leaving_microbatch(self) -> Iterator[None]:
        step = self._step
        try:
            yield
        except BaseException:
            if step is not None and self._attachment is not None:
                step.microbatch = None
                self._attachment.leave_forward()
            raise
        if step is not None:
            self.leave_microbatch()

    def _new_recording(
        self, lengths: Sequence[int] | np.ndarray, is_partial: bool, is_shared: bool
    ) -> Recording:
        return Recording(
            self.shape,
            lengths,
            None if self._attachment is None else self._attachment.grid,
            is_writer=self.is_writer,
            is_partial=is_partial,
            is_shared=is_shared,
        )

    def _new_step(
        self,
        num_rows: int,
        table: StepRoutes | None = None,
        recording: Recording | None = None,
        only_layers: frozenset[int] | None = None,
        soft: SoftRule | None = None,
    ) -> Step:
        assert self._attachment is not None, "a disabled handle opens no step"
        sampling = None
        if table is not None and self.config.agreement_every:
            agreement = LayerAgreement(
                self.shape.layers,
                num_rows=table.num_rows,
                has_gates=table.keeps_gates,
                has_logits=table.keeps_logits,
                device=self._attachment.device,
            )
            sampling = Sampling(
                agreement=agreement,
                every=self.config.agreement_every,
                max_tokens=self.config.agreement_tokens,
            )
        return Step(
            chunks=self._attachment.chunks,
            num_experts=self.shape.num_experts,
            num_rows=num_rows,
            rank=this_rank(),
            table=table,
            only_layers=only_layers,
            recording=recording,
            sampling=sampling,
            soft=soft,
            replace_rate=None
            if soft is None
            else ReplaceRate(self.shape.layers, self.shape.top_k, self._attachment.device),
        )

    def _require_calls(self, what: str) -> None:
        if self.config.captured_routers:
            raise ConfigError(
                f"{what} sees no router that a CUDA graph runs",
                expected="routers that are called in every forward",
                got="captured_routers=True",
                fix="Leave moe_router out of --cuda-graph-modules, and captured_routers off",
            )

    def _known_layers(self, layers: Iterable[int]) -> frozenset[int]:
        named = frozenset(layers)
        unknown = sorted(named - set(self.shape.layers))
        if unknown:
            raise ConfigError(
                "layers to replay that have no router",
                expected=f"some of {list(self.shape.layers)}",
                got=unknown,
            )
        return named

    def _check_source(self, table: StepRoutes) -> None:
        source = SOURCES[self.config.mode]
        if table.source != source:
            raise ReplayError(
                f"mode {self.config.mode} replays the {source} engine's routes",
                expected=f"a table of source {source!r}",
                got=repr(table.source),
                where=table.where,
                fix="R2: record first, with replay.recording(lengths); R3: pass SGLang's routes",
            )
