"""One patch: the all-to-all dispatcher takes the sizes of its messages from a plan.

Megatron counts the tokens of each expert on the device, gathers the counts of all ranks, copies
them to the host and waits for that copy in every layer, because the messages of its all-to-all need
sizes on the host. A plan knows them before the step. With them the gather, the copy and the wait
are gone, in the forward and in a recomputation. What the routers select is still counted on the
device, and compared with the sizes at the end of the scope.

Upstream: megatron-core asks for no sizes. Written for `MoEAlltoAllTokenDispatcher` of 0.19; delete
this file if a version takes them.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

from ..errors import ConfigError, ReplayError
from .dispatch import require_planned_number, routed_modules
from .passes import ForwardPass
from .placement import order_of
from .preflight import installed_version
from .tracking import PassTracker
from .transfers import to_device, to_host

_RELEASE = (0, 19)
_SIGNATURE = ["self", "routing_map"]
_OPTIONS = (
    "moe_expert_capacity_factor",
    "moe_pad_expert_input_to_capacity",
    "moe_router_padding_for_quantization",
)


class KnownSizes:
    """Gives the dispatchers of this rank their sizes, and compares these with the routers' maps.

    Args:
        sizes_MDLE: int64, tokens that each data-parallel rank D of the group of experts sends to
            each expert: `StepPlan.sizes`.
        layers: Global indices of L.
        model_chunks: This rank's.
        tracker: Tells which pass runs.

    Raises:
        ConfigError: A dispatcher that cannot be given them.
    """

    def __init__(
        self,
        sizes_MDLE: np.ndarray,
        layers: Sequence[int],
        model_chunks: Sequence[torch.nn.Module],
        tracker: PassTracker,
    ):
        self._modules = routed_modules(model_chunks, layers)
        reason = why_not(model_chunks, layers)
        modules = self._modules.values()
        if not reason and any(m.token_dispatcher.ep_size != sizes_MDLE.shape[1] for m in modules):
            reason = f"sizes of {sizes_MDLE.shape[1]} data-parallel ranks"
        if reason:
            raise ConfigError(
                "the dispatcher cannot be given the sizes of a plan",
                expected="megatron-core 0.19, the alltoall dispatcher, expert parallelism over "
                "data-parallel ranks alone",
                got=reason,
                fix="Replay with dispatch= instead of sizes=",
            )
        self._rows = {layer: row for row, layer in enumerate(self._modules)}
        sizes_LMDE = sizes_MDLE.transpose(2, 0, 1, 3)
        self._sizes_LMDE = sizes_LMDE[[layers.index(layer) for layer in self._modules]]
        self._tracker = tracker
        device = next(model_chunks[0].parameters()).device
        shape = self._sizes_LMDE.shape
        self._wrong_LM = torch.zeros(shape[:2], dtype=torch.int64, device=device)
        self._result: torch.Tensor | None = None
        self._event: torch.cuda.Event | None = None

    @property
    def num_microbatches(self) -> int:
        return int(self._sizes_LMDE.shape[1])

    def install(self) -> None:
        """Give sizes from now on."""
        for layer, module in self._modules.items():
            dispatcher = module.token_dispatcher
            dispatcher.preprocess = functools.partial(self._preprocess, layer, module)

    def remove(self) -> None:
        """Let Megatron count again."""
        for module in self._modules.values():
            vars(module.token_dispatcher).pop("preprocess", None)

    def see_live(self, layer: int, ids_TK: torch.Tensor, forward_pass: ForwardPass) -> None:
        """Refuse a token without a route: its rank alone would know its experts.

        Raises:
            ReplayError: There is one.
        """
        live_T = np.flatnonzero(~forward_pass.promised(layer))
        if len(live_T):
            raise ReplayError(
                "a token routes live, but the dispatcher was given the sizes of a plan",
                expected="a route for every token of the microbatch, padding included",
                got=f"{len(live_T)} tokens without one",
                where=f"layer {layer}, {forward_pass.where}",
                fix="Pack sequences without padding, or replay with dispatch= instead of sizes=",
            )

    def finish(self, num_microbatches: int) -> None:
        """Fetch the comparison without waiting for it.

        Raises:
            ReplayError: The scope ran another number of microbatches than the plan has.
        """
        require_planned_number(num_microbatches, self.num_microbatches)
        self._result = to_host(self._wrong_LM)
        if self._wrong_LM.is_cuda:
            self._event = torch.cuda.Event()
            self._event.record()

    def settle(self, rank: int) -> None:
        """Read the result.

        Raises:
            ReplayError: Routers selected other experts than the sizes say.
        """
        if self._event is not None:
            self._event.synchronize()
        if self._result is None or not self._result.any():
            return
        row, microbatch = self._result.nonzero()[0].tolist()
        wrong, self._result = int((self._result != 0).sum()), None
        raise ReplayError(
            f"routers selected other experts than the plan's sizes say, in {wrong} of "
            f"{self._sizes_LMDE.shape[0] * self.num_microbatches} layers and microbatches",
            expected="the sizes of the table that is replayed",
            where=f"layer {list(self._modules)[row]}, microbatch {microbatch}, rank {rank}",
            fix="Feed each rank the microbatches of the plan, and the table that it was made of",
        )

    def _preprocess(self, layer: int, module: Any, routing_map: torch.Tensor) -> torch.Tensor:
        forward_pass, is_recompute = self._tracker.find()
        dispatcher: MoEAlltoAllTokenDispatcher = module.token_dispatcher
        is_planned = forward_pass is not None and forward_pass.is_counted
        if not is_planned or forward_pass.number >= self.num_microbatches:  # type: ignore[union-attr]
            return MoEAlltoAllTokenDispatcher.preprocess(dispatcher, routing_map)
        row, number = self._rows[layer], forward_pass.number  # type: ignore[union-attr]
        sizes_DE = self._sizes_LMDE[row, number]
        sizes_DE = sizes_DE[:, order_of(module, sizes_DE.shape[1])]
        own_E = sizes_DE[dispatcher.ep_rank]
        num_sent = routing_map.shape[0] * dispatcher.config.moe_router_topk
        if int(own_E.sum()) != num_sent:
            raise ReplayError(
                "the plan's sizes are of another number of tokens",
                expected=num_sent,
                got=int(own_E.sum()),
                where=f"layer {layer}, microbatch {number}",
                fix="Feed each rank the microbatches of the plan, without padding",
            )
        if not is_recompute:
            map_E = routing_map.sum(0)
            self._wrong_LM[row, number] += (map_E != to_device(own_E, map_E.device)).sum()
        return _give(dispatcher, sizes_DE, num_sent, routing_map.device)


def why_not(model_chunks: Sequence[torch.nn.Module], layers: Sequence[int]) -> str:
    """Return why the model's dispatchers cannot be given sizes; empty if they can."""
    if installed_version().release[:2] != _RELEASE:
        return f"megatron-core {installed_version()}"
    if list(inspect.signature(MoEAlltoAllTokenDispatcher.preprocess).parameters) != _SIGNATURE:
        return "another MoEAlltoAllTokenDispatcher.preprocess"
    if parallel_state.get_tensor_model_parallel_world_size() > 1:
        return "tensor parallelism"
    if parallel_state.get_context_parallel_world_size() > 1:
        return "context parallelism"
    for module in routed_modules(model_chunks, layers).values():
        dispatcher = module.token_dispatcher
        if type(dispatcher) is not MoEAlltoAllTokenDispatcher:
            return type(dispatcher).__name__
        if dispatcher.ep_size == 1 or dispatcher.tp_size > 1:
            return f"expert parallelism {dispatcher.ep_size}, expert tensor {dispatcher.tp_size}"
        options = [name for name in _OPTIONS if getattr(dispatcher.config, name, None)]
        if options:
            return ", ".join(options)
    return ""


def _give(
    dispatcher: Any, sizes_DE: np.ndarray, num_sent: int, device: torch.device
) -> torch.Tensor:
    """Fill in what `preprocess` computes; the tokens of the local experts, on the host."""
    num_local, first = dispatcher.num_local_experts, dispatcher.local_expert_indices[0]
    sizes_DN = np.ascontiguousarray(sizes_DE[:, first : first + num_local])
    dispatcher.num_out_tokens = num_sent
    dispatcher.input_splits = sizes_DE[dispatcher.ep_rank].reshape(-1, num_local).sum(1)
    dispatcher.output_splits = sizes_DN.sum(1)
    dispatcher.output_splits_tp = None  # read under expert tensor parallelism only
    if num_local > 1:
        is_fused = dispatcher.config.moe_permute_fusion  # its kernel reads them on the device
        chunks_DN = to_device(sizes_DN, device) if is_fused else torch.from_numpy(sizes_DN)
        dispatcher.num_global_tokens_per_local_expert = chunks_DN
    dispatcher.cuda_sync_point = "no_sync"
    return torch.from_numpy(sizes_DN.sum(0))
