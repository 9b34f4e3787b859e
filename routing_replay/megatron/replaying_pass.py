"""The forward pass that replays the table's rows."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch

from ..errors import RoutesError
from ..routes.routes import has_duplicates
from ..routes.step_routes import StepRoutes
from .captured import StaticRoutes
from .passes import ForwardPass, LiveRecord, late_backward
from .routers import RouterSeam
from .routing_call import LiveLogits, Routed, RoutingCall
from .selection import LiveTopK, Selection, probabilities, select
from .soft import ReplaceRate, SoftRule, keep_plausible
from .transfers import compact_dtype, to_device
from .weights import WeightReplay, replace_weights


class Observer(Protocol):
    """Compares live with replayed routes during a replaying pass."""

    def observe(self, seam: RouterSeam, live: LiveTopK, ids_TK: torch.Tensor) -> None: ...


@dataclass(kw_only=True)
class ReplayingPass(ForwardPass):
    """Replays the table's rows; live selection for the tokens without one.

    Device memory: the microbatch's ids of the chunk's layers in the compact dtype, until the
    pass is released; one layer's slice is widened at use.

    Args:
        table: The routes.
        num_experts: Of the model.
        device: Where the routers run.
        only_layers: Layers that replay, the others route live; None: all replay.
        record: Keeps the live ids of the same pass; None keeps none.
        observer: Compares live with replayed routes; None compares nothing.
        is_unfused: The router's fused kernel comes back when the scope closes, so that a late
            recomputation would bypass us.
        weights: How the table's combine weights are replayed; None: the router's own are taken.
            A token of which an expert was replaced keeps the router's own as well.
        soft: Which replayed experts stay; None: all.
        replace_rate: Counts those that do not; given with `soft`.
    """

    table: StepRoutes
    num_experts: int
    device: torch.device
    only_layers: frozenset[int] | None = None
    record: LiveRecord | None = None
    observer: Observer | None = None
    is_unfused: bool = False
    weights: WeightReplay | None = None
    soft: SoftRule | None = None
    replace_rate: ReplaceRate | None = None
    _live_choices: dict[int, torch.Tensor] = field(default_factory=dict)
    _replayed_layers: set[int] = field(default_factory=set)
    _weighed_layers: set[int] = field(default_factory=set)
    _has_own_weights: dict[int, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        ids_LTK = self.table.gather(self.layers, self.rows_T)
        self._require_selections(ids_LTK)
        if ids_LTK.dtype == np.uint16:
            ids_LTK = ids_LTK.view(np.int16)
        self._ids_LTK: torch.Tensor | None = to_device(ids_LTK, self.device)
        self._weights_LTK: torch.Tensor | None = None
        if self.weights is not None:
            weights_LTK = self.weights.gather(self.table, self.layers, self.rows_T)
            self._weights_LTK = to_device(weights_LTK, self.device)
        live_F = np.flatnonzero(self.rows_T < 0)
        self._num_live = len(live_F)
        self._live_F = to_device(live_F, self.device) if len(live_F) else None

    @property
    def replays_weights(self) -> bool:
        return self.weights is not None

    def promised(self, layer: int) -> np.ndarray:
        return (self.rows_T >= 0) & self._is_replayed(layer)

    def num_replayed(self, layer: int) -> int:
        return len(self.rows_T) - self._num_live if layer in self._replayed_layers else 0

    def num_weighed(self, layer: int) -> int:
        return self.num_replayed(layer) if layer in self._weighed_layers else 0

    def recorded(self) -> Mapping[int, torch.Tensor]:
        return {} if self.record is None else self.record.by_layer()

    def select(self, seam: RouterSeam, live: LiveTopK, is_recompute: bool) -> Selection:
        self._count(seam, len(live.scores_TE), is_recompute)
        assert self._ids_LTK is not None, "a router ran after its pass was released"
        if not self._is_replayed(seam.layer):
            return self._select_live(seam, live, is_recompute)
        ids_TK = self._ids_LTK[self.layers.index(seam.layer)].long()
        # Soft replay left what the forward chose in the rows, live tokens' experts included.
        is_chosen = self.soft is not None and is_recompute
        if self._live_F is not None and not is_chosen:
            ids_MK = self._live_choice(seam.layer, live, self._live_F, is_recompute)
            ids_TK = ids_TK.index_copy(0, self._live_F, ids_MK)
        if not is_recompute:
            self._replayed_layers.add(seam.layer)
            self._look_at_live(seam, live, ids_TK)
            if self.soft is not None:
                ids_TK = self._keep_plausible(seam, live, ids_TK, self.soft)
        # The rollout's slots stay as the engine ordered them, alike in every pass. The trainer's
        # own take the order that a stock pass with gradients has, so that sums round alike; a
        # no-grad pass recorded them in the order that a stock pass without gradients has.
        keep_slots = self.table.source == "rollout" or not torch.is_grad_enabled()
        return select(live.scores_TE, ids_TK, keep_slots)

    def route(
        self, seam: RouterSeam, call: RoutingCall, is_recompute: bool
    ) -> tuple[Routed, torch.Tensor]:
        """Return weights and map of one router call, by the kernel, and the experts [T, K]."""
        self._count(seam, len(call.logits_TE), is_recompute)
        assert self._ids_LTK is not None, "a router ran after its pass was released"
        ids_TK = self._ids_LTK[self.layers.index(seam.layer)]
        # The forward leaves its selection of the live tokens in their rows: a recomputation
        # replays all of them (see _live_choice).
        is_replayed = self._is_replayed(seam.layer)
        is_live_T = (
            self._is_live_T if is_replayed else torch.ones_like(ids_TK[:, 0], dtype=torch.bool)
        )
        routed = call.replay(ids_TK, None if is_recompute else is_live_T)
        if not is_recompute and not is_replayed:
            if self.record is not None:
                self.record.put(seam.layer, ids_TK.long())
        elif not is_recompute:
            self._replayed_layers.add(seam.layer)
            if self.record is not None or self.observer is not None:
                self._look_at_live(seam, LiveLogits(call), ids_TK.long())
        return routed, ids_TK

    def begin_static(self, static: StaticRoutes) -> None:
        self._static = static
        is_live_LT = torch.zeros_like(static.is_live_LT)
        if self._is_live_T is not None:
            is_live_LT |= self._is_live_T
        for index, layer in enumerate(self.layers):
            if not self._is_replayed(layer):
                is_live_LT[index].fill_(True)
        static.begin(self._ids_LTK, is_live_LT)

    def weigh(self, layer: int, probs_TE: torch.Tensor) -> torch.Tensor:
        if self.weights is None or not self._is_replayed(layer):
            return probs_TE
        assert self._ids_LTK is not None and self._weights_LTK is not None, "the pass was released"
        index = self.layers.index(layer)
        self._weighed_layers.add(layer)
        return replace_weights(
            probs_TE,
            self._ids_LTK[index].long(),
            self._weights_LTK[index],
            self._takes_weights(layer),
            self.weights.passes_gradient,
        )

    def end_forward(self) -> None:
        super().end_forward()
        if self.record is not None:
            self.record.move_to_host()

    def release(self) -> None:
        self._ids_LTK = None
        self._weights_LTK = None
        self._live_F = None
        self._live_choices.clear()
        self._has_own_weights.clear()
        vars(self).pop("_ratio_T", None)
        vars(self).pop("_is_live_T", None)

    def begin_backward(self) -> None:
        if self.is_closed and self.is_unfused:
            raise late_backward(self.where)

    @functools.cached_property
    def _is_live_T(self) -> torch.Tensor | None:
        """Live tokens as a mask on the device; None for none."""
        if self._live_F is None:
            return None
        is_live_T = torch.zeros(len(self.rows_T), dtype=torch.bool, device=self.device)
        return is_live_T.index_fill_(0, self._live_F, True)

    def _see_captured(self, layer: int) -> None:
        if self._is_replayed(layer):
            self._replayed_layers.add(layer)

    def _is_replayed(self, layer: int) -> bool:
        return self.only_layers is None or layer in self.only_layers

    def _takes_weights(self, layer: int) -> torch.Tensor | None:
        """Tokens that take the table's weights, bool [T]; None for all."""
        has_own_T = self._has_own_weights.get(layer, self._is_live_T)
        return None if has_own_T is None else ~has_own_T

    @torch.no_grad()
    def _keep_plausible(
        self, seam: RouterSeam, live: LiveTopK, ids_TK: torch.Tensor, rule: SoftRule
    ) -> torch.Tensor:
        """Return the experts that the tokens take, and remember them for the recomputation."""
        assert self._ids_LTK is not None and self.replace_rate is not None, "given with `soft`"
        probs_TE = probabilities(seam, live.scores_TE.detach())
        live_TK = seam.stock(live)[1]
        ids_TK, is_kept_TK = keep_plausible(probs_TE, ids_TK, live_TK, rule, self._ratio_T)
        self._ids_LTK[self.layers.index(seam.layer)].copy_(ids_TK)
        self.replace_rate.add(seam.layer, is_kept_TK, self._is_counted_T)
        if self.weights is not None:
            has_own_T = ~is_kept_TK.all(1)
            is_live_T = self._is_live_T
            self._has_own_weights[seam.layer] = (
                has_own_T if is_live_T is None else has_own_T | is_live_T
            )
        return ids_TK

    @functools.cached_property
    def _ratio_T(self) -> torch.Tensor | None:
        """Ratio of each token on the device; None for the rule's."""
        assert self.soft is not None
        ratio_T = self.soft.ratio_of(self.table, self.rows_T)
        return None if ratio_T is None else to_device(ratio_T, self.device)

    @functools.cached_property
    def _is_counted_T(self) -> torch.Tensor:
        """Replayed tokens that the metrics look at, on the device."""
        is_counted_T = self.rows_T >= 0 if self.mask_T is None else (self.rows_T >= 0) & self.mask_T
        return to_device(is_counted_T, self.device)

    def _select_live(self, seam: RouterSeam, live: LiveTopK, is_recompute: bool) -> Selection:
        selection = seam.stock(live)
        if self.record is not None and not is_recompute:
            self.record.put(seam.layer, selection[1])
        return selection

    def _live_choice(
        self, layer: int, live: LiveTopK, live_F: torch.Tensor, is_recompute: bool
    ) -> torch.Tensor:
        """Ids of the live tokens. A recomputation takes the forward's: where sums round
        otherwise a near tie could flip, and the gradient would belong to other experts."""
        if is_recompute:
            return self._live_choices[layer].long()
        ids_MK = live.ids_of(live_F)
        self._live_choices[layer] = ids_MK.to(compact_dtype(self.num_experts))
        return ids_MK

    def _require_selections(self, ids_LTK: np.ndarray) -> None:
        """Check the rows where they are used: a table may have changed since it was built."""
        wrong_LT = has_duplicates(ids_LTK)
        if ids_LTK.max(initial=0) >= self.num_experts:
            wrong_LT |= (ids_LTK >= self.num_experts).any(axis=2)
        wrong_LT &= self.rows_T >= 0
        if not wrong_LT.any():
            return
        index, token = np.argwhere(wrong_LT)[0]
        raise RoutesError(
            "a row of the table is no selection of experts",
            expected=f"{ids_LTK.shape[2]} distinct experts below {self.num_experts}",
            got=ids_LTK[index, token].tolist(),
            where=f"row {self.rows_T[token]}, layer {self.layers[index]}, {self.table.where}",
            fix="Build tables with RouteTable.from_routes, which checks; change none afterwards",
        )

    def _look_at_live(self, seam: RouterSeam, live: LiveTopK, ids_TK: torch.Tensor) -> None:
        if self.record is not None:
            with torch.no_grad():
                self.record.put(seam.layer, seam.stock(live)[1])
        if self.observer is not None:
            self.observer.observe(seam, live, ids_TK)
