"""What the experts of a scope get, against what its plan says; the host waits for nothing.

Each rank counts on the device, in the forwards: the tokens that its experts get from all ranks of
their group, and the experts that its own tokens without routes select live. At the end of the scope
the live counts are summed over the group: what the experts got must be the plan's counts plus
these. The result is read once the device has come to it: at the next scope, or with the metrics.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch.utils.hooks import RemovableHandle

from ..errors import ReplayError
from .passes import ForwardPass
from .placement import experts_of
from .tracking import PassTracker
from .transfers import to_device, to_host


class DispatchCheck:
    """The counts of one scope on this rank.

    Args:
        expected_MLE: int64, tokens with routes that this rank's group of experts gets in each
            microbatch: `StepPlan.dispatch`.
        layers: Global indices of L.
        model_chunks: This rank's.
        tracker: Tells which pass runs.
    """

    def __init__(
        self,
        expected_MLE: np.ndarray,
        layers: Sequence[int],
        model_chunks: Sequence[torch.nn.Module],
        tracker: PassTracker,
    ):
        self._modules = routed_modules(model_chunks, layers)
        self._rows = {layer: row for row, layer in enumerate(self._modules)}
        self._expected_LME = expected_MLE.swapaxes(0, 1)[[layers.index(i) for i in self._modules]]
        self._tracker = tracker
        device = next(model_chunks[0].parameters()).device
        shape = self._expected_LME.shape
        num_local = {len(experts_of(module)) for module in self._modules.values()} or {0}
        self._live_LME = torch.zeros(shape, dtype=torch.int64, device=device)
        self._got_LMN = torch.zeros((*shape[:2], num_local.pop()), dtype=torch.int64, device=device)
        self._hooks: list[RemovableHandle] = []
        self._difference: torch.Tensor | None = None
        self._event: torch.cuda.Event | None = None

    @property
    def num_microbatches(self) -> int:
        return int(self._expected_LME.shape[1])

    def install(self) -> None:
        """Watch what the experts get."""
        for layer, module in self._modules.items():
            hook = module.experts.register_forward_pre_hook(self._hook_of(layer))
            self._hooks.append(hook)

    def remove(self) -> None:
        """Watch no more."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def see_live(self, layer: int, ids_TK: torch.Tensor, forward_pass: ForwardPass) -> None:
        """Count the experts of the tokens without routes of one router call."""
        live_T = np.flatnonzero(~forward_pass.promised(layer))
        if len(live_T) and forward_pass.number < self.num_microbatches:
            rows_T = to_device(live_T, ids_TK.device)
            ids_N = ids_TK.index_select(0, rows_T).reshape(-1).long()
            counts_E = self._live_LME[self._rows[layer], forward_pass.number]
            counts_E.scatter_add_(0, ids_N, torch.ones_like(ids_N))

    def finish(self, num_microbatches: int) -> None:
        """Compare; collective over the group of experts.

        Raises:
            ReplayError: The scope ran another number of microbatches than the plan has.
        """
        require_planned_number(num_microbatches, self.num_microbatches)
        if not self._modules:
            return
        group = parallel_state.get_expert_tensor_and_model_parallel_group()
        dist.all_reduce(self._live_LME, group=group)
        own_LN = torch.tensor([experts_of(module) for module in self._modules.values()])
        expected_LME = to_device(self._expected_LME.copy(), self._live_LME.device)
        index_LMN = to_device(own_LN.numpy(), self._live_LME.device)[:, None].expand_as(
            self._got_LMN
        )
        due_LMN = (expected_LME + self._live_LME).gather(2, index_LMN)
        self._difference = to_host(self._got_LMN - due_LMN)
        if self._got_LMN.is_cuda:
            self._event = torch.cuda.Event()
            self._event.record()

    def settle(self, rank: int) -> None:
        """Read the result.

        Raises:
            ReplayError: Experts got other tokens than the plan says.
        """
        if self._event is not None:
            self._event.synchronize()
        if self._difference is None or not self._difference.any():
            return
        layer, microbatch, slot = self._difference.nonzero()[0].tolist()
        name, module = list(self._modules.items())[layer]
        difference = int(self._difference[layer, microbatch, slot])
        wrong = int((self._difference != 0).any(2).sum())
        self._difference = None
        raise ReplayError(
            f"experts got other tokens than the plan says, in {wrong} of "
            f"{len(self._modules) * self.num_microbatches} layers and microbatches",
            expected="the counts of the plan and the tokens that route live",
            got=f"{difference:+d} tokens",
            where=f"layer {name}, microbatch {microbatch}, expert {experts_of(module)[slot]}, "
            f"rank {rank}",
            fix="Feed each rank the microbatches of the plan, and the table that it was made of",
        )

    def _hook_of(self, layer: int) -> Any:
        def before_experts(experts: torch.nn.Module, arguments: tuple[Any, ...]) -> None:
            forward_pass, is_recompute = self._tracker.find()
            if is_recompute or forward_pass is None or not forward_pass.is_counted:
                return
            if forward_pass.number < self.num_microbatches:
                counts_N = torch.as_tensor(arguments[1]).to(self._got_LMN, non_blocking=True)
                self._got_LMN[self._rows[layer], forward_pass.number] += counts_N

        return before_experts


def routed_modules(
    model_chunks: Sequence[torch.nn.Module], layers: Sequence[int]
) -> dict[int, Any]:
    """Return Megatron's MoELayers of this rank by their global layer."""
    routed = [
        module
        for chunk in model_chunks
        for module in chunk.modules()
        if hasattr(module, "token_dispatcher") and hasattr(module, "router")
    ]
    own = {module.router.layer_number - 1: module for module in routed}  # type: ignore[union-attr,operator]
    return {layer: own[layer] for layer in layers if layer in own}


def require_planned_number(num_microbatches: int, planned: int) -> None:
    """Raise ReplayError if a scope ran another number of microbatches than its plan."""
    if num_microbatches != planned:
        raise ReplayError(
            "the scope ran another number of microbatches than its plan",
            expected=planned,
            got=num_microbatches,
            fix="Run the plan's microbatches, in its order, in one scope",
        )
