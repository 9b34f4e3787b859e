"""The attachment to a model: seams at its routers, hooks on its chunks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from .. import kernels
from ..config import ReplayConfig
from ..errors import ConfigError, ReplayError
from ..routes.shape import MoEShape
from . import patch_expert_bias as expert_bias
from . import patch_routing, preflight
from .captured import ChunkBuffers, buffers_of, is_graph_capturing
from .dispatch import DispatchCheck
from .passes import ForwardPass, LivePass
from .patch_dispatch_sizes import KnownSizes
from .ranks import RankGrid
from .replaying_pass import ReplayingPass
from .routers import (
    ChunkRouters,
    RouterEntry,
    RouterSeam,
    config_of,
    describe_model,
    find_routers,
    require_own_forward,
)
from .routing_call import LiveLogits, Routed, RoutingCall
from .selection import LiveTopK, Selection
from .step import Step
from .tracking import PassTracker
from .watching import RouterCall, Watcher
from .weights import WeightReplay


class Attachment:
    """Seams and hooks on one model; outside an open step the model is stock.

    Args:
        model_chunks: All chunks of this rank.
        config: Replay settings.

    Attributes:
        shape: Layers of all pipeline stages, number of experts, top-k.
        chunks: Routers of each model chunk.
        weights: How the rollout's combine weights are replayed; None: the router's own are taken.
        grid: Ranks that hold other tokens or layers of this rank's table.
        step: The open one, or None.
        watcher: Sees the router calls of announced forwards, or None.

    Raises:
        PreflightError: Replay would be wrong under the model's configuration.
        ReplayError: The model is attached already.
    """

    def __init__(self, model_chunks: Sequence[torch.nn.Module], config: ReplayConfig):
        self.step: Step | None = None
        self.watcher: Watcher | None = None
        entries = find_routers(model_chunks)
        if any(isinstance(entry.router.router_replay, RouterSeam) for entry in entries):
            raise ReplayError(
                "routing replay is attached to this model already",
                expected="one attach for a model",
                fix="Use the first handle, or call its .remove() before attaching again",
            )
        model_config = _config_of(model_chunks, entries)
        preflight.require(model_config, config)
        self._model_config, self._model_chunks = model_config, model_chunks
        self.shape: MoEShape = describe_model(entries, model_config, model_chunks)
        self.grid = RankGrid.of_megatron()
        self.device = next(model_chunks[0].parameters()).device
        self.weights: WeightReplay | None = None
        if config.replays_weights:
            passes_gradient = config.weights == "straight_through"
            self.weights = WeightReplay.of(model_config, passes_gradient)
        self._has_kernel = config.kernel
        if config.kernel:
            kernels.require_device(self.device)
        self._has_split_sequences = bool(model_config.sequence_parallel)
        self._tracker = PassTracker(self._begin)
        self._has_captured = config.captured_routers
        self._seams = self._install(entries, model_chunks)
        self._tracker.watch(model_chunks)
        # Fixed here: a pass must not search the module tree.
        self.chunks = [self._routers_of(chunk) for chunk in range(len(model_chunks))]
        self._is_removed = False

    @property
    def is_writer(self) -> bool:
        """Whether this rank records: without sequence parallelism tensor ranks see equal tokens."""
        if not self._seams or self._has_split_sequences:
            return True
        return bool(self._seams[0].router.tp_group.rank() == 0)

    def open(self, step: Step) -> None:
        """Let the step select.

        Raises:
            ReplayError: Another step is open, or the handle was removed.
        """
        if self._is_removed:
            raise ReplayError("routing replay was removed from this model", fix="attach() again")
        if self.step is not None:
            raise ReplayError(
                "a scope is open already",
                expected="recording and replaying one after the other",
                fix="Use replaying(table, record_live=True) to do both in one pass",
            )
        self.step = step
        if step.dispatch is not None:
            step.dispatch.install()
        for seam in self._seams:
            if not self._has_kernel:
                seam.unfuse()
            elif not self._has_captured:
                seam.take_over(self._route)

    def close(self) -> None:
        """Make the model stock again; a late recomputation of a closed pass raises."""
        # First the model, then the passes: whatever raises below, the model is stock.
        for seam in self._seams:
            seam.restore_fusion()
            if not self._has_captured:
                seam.hand_back()
        for buffers in self._buffers:
            buffers.reset()
        if self.step is not None:
            if self.step.dispatch is not None:
                self.step.dispatch.remove()
            self.step.close()
        self.step = None
        self._tracker.forget()

    def dispatch_check(self, expected_MLE: np.ndarray) -> DispatchCheck:
        """Return what compares the dispatched tokens of a scope with its plan.

        Raises:
            ConfigError: A configuration under which experts get tokens that nobody counts.
        """
        padding = ("moe_router_padding_for_quantization", "moe_router_padding_for_fp8")
        is_padded = any(getattr(self._model_config, name, False) for name in padding)
        shape = (len(self.shape.layers), self.shape.num_experts)
        if self._has_captured or is_padded or expected_MLE.shape[1:] != shape:
            raise ConfigError(
                "the dispatched tokens cannot be compared with this plan",
                expected=f"counts [microbatches, {shape[0]}, {shape[1]}], routers that no CUDA "
                "graph captures, experts whose tokens are not padded",
                got=f"counts {expected_MLE.shape}, captured_routers={self._has_captured}, "
                f"padded={is_padded}",
                fix="Replay without dispatch=",
            )
        return DispatchCheck(expected_MLE, self.shape.layers, self._model_chunks, self._tracker)

    def known_sizes(self, sizes_MDLE: np.ndarray) -> KnownSizes:
        """Return what gives the dispatchers of a scope the sizes of their messages.

        Raises:
            ConfigError: A dispatcher that cannot be given them, or sizes of another model.
        """
        self.dispatch_check(sizes_MDLE.sum(1))
        return KnownSizes(sizes_MDLE, self.shape.layers, self._model_chunks, self._tracker)

    def leave_forward(self) -> None:
        """The announced microbatch is over, with an exception or without."""
        self._tracker.leave_forward()

    def remove(self) -> None:
        """Take everything off the model; calling it twice does nothing.

        Raises:
            ReplayError: A step is open: its backward would route live, unnoticed.
        """
        if self.step is not None:
            raise ReplayError(
                "routing replay is removed in mid-step",
                expected="no open scope",
                fix="Leave `with replay.replaying(...)` or `recording(...)` first",
            )
        self._tracker.remove()
        for seam in self._seams:
            expert_bias.remove(seam.router)
            seam.hand_back()
            seam.remove()
        self._seams = []
        self._is_removed = True

    def _install(
        self, entries: Sequence[RouterEntry], model_chunks: Sequence[torch.nn.Module]
    ) -> list[RouterSeam]:
        seams = [RouterSeam(entry, self._select) for entry in entries]
        self._buffers: list[ChunkBuffers] = []
        if self._has_captured:
            self._buffers = buffers_of(seams, model_chunks)
        for entry in entries:  # may refuse, on the first: nothing is left half attached
            expert_bias.install(entry.router, is_active=lambda: self.step is not None)
            if self._has_kernel:
                patch_routing.require(entry.router)
            if self.weights is not None:
                require_own_forward(entry)
        for seam in seams:
            seam.install()
            # Nobody says when Megatron captures, and a graph keeps what it found then.
            if self._has_kernel and self._has_captured:
                seam.take_over(self._route)
            if self.weights is not None:
                seam.weigh_by(self._weigh)
        return seams

    def _routers_of(self, chunk: int) -> ChunkRouters:
        seams = [seam for seam in self._seams if seam.chunk == chunk]
        is_split = bool(seams) and self._has_split_sequences
        group = seams[0].router.tp_group if is_split else None
        return ChunkRouters(
            chunk=chunk,
            layers=tuple(seam.layer for seam in seams),
            tp_size=1 if group is None else group.size(),
            tp_rank=0 if group is None else group.rank(),
            device=self.device,
            is_unfused=any(seam.is_fused for seam in seams),
            is_captured=self._has_captured,
        )

    def _begin(self, chunk: int) -> ForwardPass | None:
        if self.step is None:
            return None
        begun = self.step.begin(chunk)
        static = self._buffers[chunk].get(len(begun.rows_T)) if self._buffers else None
        if static is not None:
            begun.begin_static(static)
        return begun

    def _select(self, seam: RouterSeam, live: LiveTopK) -> Selection:
        if self._has_captured and is_graph_capturing():
            return self._buffers[seam.chunk].select(seam, live)
        forward_pass, is_recompute = self._tracker.find()
        if forward_pass is not None:
            selection = forward_pass.select(seam, live, is_recompute)
            if not is_recompute:
                self._show(seam, live, selection[1], forward_pass)
            return selection
        if self.step is None:
            return seam.stock(live)
        raise ReplayError(
            "a router ran outside every announced microbatch of its scope",
            expected="routers run inside a forward of the attached chunks, or its recomputation",
            where=f"layer {seam.layer} ({seam.name}), rank {this_rank()}",
            fix="Attach to the modules that forward_step_func calls",
        )

    def _route(self, seam: RouterSeam, call: RoutingCall) -> Routed:
        """Answer a router's whole call: in the kernel where routes are replayed."""
        if self._has_captured and is_graph_capturing():
            return self._buffers[seam.chunk].route(seam, call)
        forward_pass, is_recompute = self._tracker.find()
        if not isinstance(forward_pass, ReplayingPass):
            # A live forward may take the fused kernel; anything else must come by the seam, which
            # records it or says what is wrong.
            return call.stock(may_fuse=self.step is None or isinstance(forward_pass, LivePass))
        routed, ids_TK = forward_pass.route(seam, call, is_recompute)
        if not is_recompute:
            self._show(seam, LiveLogits(call), ids_TK, forward_pass)
        return routed

    def _weigh(self, seam: RouterSeam, probs_TE: torch.Tensor) -> torch.Tensor:
        forward_pass, _ = self._tracker.find()
        return probs_TE if forward_pass is None else forward_pass.weigh(seam.layer, probs_TE)

    def _show(
        self, seam: RouterSeam, live: LiveTopK, ids_TK: torch.Tensor, forward_pass: ForwardPass
    ) -> None:
        dispatch = None if self.step is None else self.step.dispatch
        if dispatch is not None and forward_pass.is_counted:
            dispatch.see_live(seam.layer, ids_TK, forward_pass)
        if self.watcher is not None and len(forward_pass.rows_T):
            call = RouterCall(seam=seam, live=live, ids_TK=ids_TK.long(), forward_pass=forward_pass)
            self.watcher.see(call)


def _config_of(model_chunks: Sequence[torch.nn.Module], entries: Sequence[RouterEntry]) -> Any:
    if entries:
        return entries[0].router.config
    return config_of(model_chunks)  # a stage without routed layers


def this_rank() -> int:
    """Return the rank of this process, for messages."""
    return dist.get_rank() if dist.is_initialized() else 0
