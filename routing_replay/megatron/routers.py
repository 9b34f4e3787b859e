"""The routers of a model, and the object that stands at each router's replay seam.

Megatron reads `TopKRouter.router_replay` at call time and asks it for the top-k (megatron-core 0.16
and later). We assign our own object there: no flag, no global list, no monkey-patch.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.moe.router import TopKRouter
from torch.utils.hooks import RemovableHandle

from ..errors import PreflightError, ReplayError
from ..routes.shape import MoEShape
from . import patch_routing
from .layout import router_order
from .routing_call import Routed, RoutingCall
from .selection import LiveTopK, Selection


class RouterSeam:
    """Stands in `TopKRouter.router_replay`: identity of the router, and who selects for it.

    Args:
        entry: The stock router, its chunk and layer.
        select: Called as `select(seam, live)` for every top-k of the router.
    """

    def __init__(self, entry: RouterEntry, select: Callable[[RouterSeam, LiveTopK], Selection]):
        self.router = entry.router
        self.chunk = entry.chunk
        self.layer = entry.layer
        self.layer_number = entry.layer + 1  # 1-based: Megatron sets it on replay objects, too
        self.name = entry.name
        self._select = select
        self._weights_hook: RemovableHandle | None = None
        self._stock = entry.router.router_replay
        self._stock_config = entry.router.config

    def install(self) -> None:
        self.router.router_replay = self

    def remove(self) -> None:
        self.router.router_replay = self._stock
        if self._weights_hook is not None:
            self._weights_hook.remove()
            self._weights_hook = None

    def weigh_by(self, weigh: Callable[[RouterSeam, torch.Tensor], torch.Tensor]) -> None:
        """Let `weigh(seam, weights_TE)` return the combine weights, after the router is done.

        A hook on the router's output: in the forward, in a recomputation, and whichever kernel
        routed.
        """

        def after_router(router: TopKRouter, arguments: Any, routed: Routed) -> Routed:
            return weigh(self, routed[0]), routed[1]

        # First of all hooks: a placement of experts reorders the columns behind it.
        self._weights_hook = self.router.register_forward_hook(after_router, prepend=True)

    @property
    def is_fused(self) -> bool:
        """Whether the stock router selects in a fused kernel, which asks no seam."""
        return bool(self._stock_config.moe_router_fusion)

    def unfuse(self) -> None:
        """Route through the seam, on a copy of the shared configuration."""
        # Megatron reads router.config at call time, and all layers share one configuration.
        if self.is_fused:
            self.router.config = copy.copy(self._stock_config)
            self.router.config.moe_router_fusion = False

    def restore_fusion(self) -> None:
        self.router.config = self._stock_config

    def take_over(self, route: Callable[[RouterSeam, RoutingCall], Routed]) -> None:
        """Let `route` answer the router's whole call; what lies around it stays Megatron's."""

        def routed(logits: torch.Tensor, topk: int, **options: Any) -> Routed:
            return route(self, RoutingCall.of(logits, topk, options))

        patch_routing.install(self.router, routed)

    def hand_back(self) -> None:
        """The router's calls are Megatron's again."""
        patch_routing.remove(self.router)

    def get_replay_topk(
        self,
        scores: torch.Tensor,
        topk: int,
        num_groups: int | None = None,
        group_topk: int | None = None,
        default_compute_topk: Any = None,
    ) -> Selection:
        """Select for Megatron; its signature is unchanged from 0.16.1 on."""
        return self._select(
            self, LiveTopK(scores, topk, num_groups, group_topk, default_compute_topk)
        )

    def require_idle_stock(self, where: str) -> None:
        """Raise ReplayError if Megatron's own replay is switched on: one of the two would lose."""
        action = getattr(self._stock, "router_replay_action", None)
        if action is not None:
            raise ReplayError(
                "Megatron's own routing replay is switched on inside a scope",
                expected="no RouterReplay action while routing_replay records or replays",
                got=action,
                where=where,
                fix="Drop --moe-enable-routing-replay, or clear its action before the scope",
            )

    def stock(self, live: LiveTopK) -> Selection:
        """Select as without us: by Megatron's own replay object if it has one, else by top-k."""
        if self._stock is None:
            return live()
        return self._stock.get_replay_topk(
            live.scores_TE, live.top_k, live.num_groups, live.group_top_k, live.stock
        )


@dataclass(frozen=True, kw_only=True)
class RouterEntry:
    """A router of the live module tree.

    Args:
        router: The module.
        chunk: Index of its model chunk on this rank.
        layer: Global 0-based layer index.
        name: Module path, for messages.
    """

    router: TopKRouter
    chunk: int
    layer: int
    name: str


@dataclass(frozen=True, kw_only=True)
class ChunkRouters:
    """What a pass must know of one model chunk's routers.

    Args:
        chunk: Index of the model chunk on this rank.
        layers: Their global layers.
        tp_size: Ranks that share a sequence: 1 without sequence parallelism.
        tp_rank: This rank among them.
        device: Where the routers run.
        is_unfused: Their fused kernels are off inside scopes only.
        is_captured: A CUDA graph may run them.
    """

    chunk: int
    layers: tuple[int, ...]
    tp_size: int
    tp_rank: int
    device: torch.device
    is_unfused: bool = False
    is_captured: bool = False

    def order(self, values_BS: np.ndarray) -> np.ndarray:
        """Values per token of the microbatch, in the order of the routers' tokens."""
        return router_order(values_BS, self.tp_size, self.tp_rank)


def find_routers(model_chunks: Sequence[torch.nn.Module]) -> list[RouterEntry]:
    """Return all decoder routers of this rank's model chunks, by walking the live modules.

    MTP routers are left out: they number their layers from 1 again, and no engine returns routes
    for them. Routers built elsewhere and thrown away are not in the tree, so never returned.

    Raises:
        PreflightError: No router, a router without a layer number, or two of one layer.
    """
    entries = [
        _entry(chunk, name, module)
        for chunk, model in enumerate(model_chunks)
        for name, module in model.named_modules()
        if isinstance(module, TopKRouter) and not _is_mtp(name, module)
    ]
    if not entries and not _has_other_stages():
        raise PreflightError(
            "the model has no router that can replay",
            expected="megatron.core TopKRouter modules",
            got="none",
            fix="Pass the list of model chunks that get_model returned, of an MoE model",
        )
    _require_one_per_layer(entries)
    return entries


def _entry(chunk: int, name: str, router: TopKRouter) -> RouterEntry:
    if router.layer_number is None:
        raise PreflightError(
            "a router does not know its layer",
            expected="router.layer_number, set when the layer is built",
            where=f"chunk {chunk}, {name}",
        )
    return RouterEntry(router=router, chunk=chunk, layer=router.layer_number - 1, name=name)


def _require_one_per_layer(entries: Sequence[RouterEntry]) -> None:
    by_layer: dict[int, RouterEntry] = {}
    for entry in entries:
        first = by_layer.setdefault(entry.layer, entry)
        if first is not entry:
            raise PreflightError(
                "two routers claim one layer: part of the model was built twice",
                expected="one router per layer",
                got=f"{first.name} (chunk {first.chunk}) and {entry.name} (chunk {entry.chunk})",
                where=f"layer {entry.layer}",
                fix="Remove the module that is not used; only one of them would be replayed",
            )


def require_own_forward(entry: RouterEntry) -> None:
    """Raise PreflightError if hooks of the router never fire: its weights would not be replaced."""
    # Megatron-Bridge's LoRA keeps the router as `to_wrap`, and calls gating and routing itself.
    if entry.name.rpartition(".")[2] == "to_wrap":
        raise PreflightError(
            "weights cannot be replayed in a router with an adapter (LoRA)",
            expected="a router whose own forward runs",
            got=entry.name,
            where=f"layer {entry.layer}",
            fix="Leave the router out of the adapter's target modules, or replay ids alone",
        )


def _is_mtp(name: str, module: TopKRouter) -> bool:
    return "mtp" in name.split(".") or bool(getattr(module, "is_mtp_layer", False))


def _has_other_stages() -> bool:
    return (
        parallel_state.model_parallel_is_initialized()
        and parallel_state.get_pipeline_model_parallel_world_size() > 1
    )


def describe_model(
    entries: Sequence[RouterEntry], config: Any, model_chunks: Sequence[torch.nn.Module]
) -> MoEShape:
    """Return the layers of all pipeline stages, experts and top-k: a table must agree with them.

    Collective over the pipeline group.

    Raises:
        PreflightError: Stages claim the same layer, or the routers are not those of the
            configuration's MoE layers (orphan or doubled routers).
    """
    layers_here = sorted(entry.layer for entry in entries)
    stages: list[Any] = [layers_here]
    if _has_other_stages():
        group = parallel_state.get_pipeline_model_parallel_group()
        stages = [None] * dist.get_world_size(group)
        dist.all_gather_object(stages, layers_here, group=group)
    layers = sorted(layer for stage in stages for layer in stage)
    expected = moe_layers(config, _hybrid_pattern(model_chunks))
    if layers != expected:
        raise PreflightError(
            "the model's routers are not its MoE layers",
            expected=f"layers {expected}",
            got=f"layers {layers}",
            where=f"pipeline stages hold {stages}",
            fix="Pass all model chunks of this rank to attach, and only those",
        )
    return MoEShape(
        layers=tuple(layers), num_experts=config.num_moe_experts, top_k=config.moe_router_topk
    )


def _hybrid_pattern(model_chunks: Sequence[torch.nn.Module]) -> str | None:
    """Return the layer pattern of a HybridModel (MambaModel before 0.18); None for others."""
    for module in model_chunks[0].modules():
        for name in ("hybrid_layer_pattern", "hybrid_override_pattern"):  # 0.17 on; 0.16
            if getattr(module, name, None):
                return getattr(module, name)
    return None


def moe_layers(config: Any, hybrid_pattern: str | None = None) -> list[int]:
    """Return the global 0-based indices of the MoE layers.

    Args:
        config: Megatron's TransformerConfig: `num_layers` and `moe_layer_freq`.
        hybrid_pattern: Of a hybrid model, which ignores `moe_layer_freq`: `E` is an MoE layer,
            `|` parts pipeline stages, and MTP layers follow the first `/`.
    """
    if hybrid_pattern is not None:
        decoder = hybrid_pattern.split("/")[0].replace("|", "")
        return [i for i, kind in enumerate(decoder) if kind == "E"]
    frequency = getattr(config, "moe_layer_freq", 1)
    if isinstance(frequency, int):
        return [i for i in range(config.num_layers) if i % frequency == 0]
    return [i for i, is_moe in enumerate(frequency) if is_moe]


def shape_of_configuration(model_chunks: Sequence[torch.nn.Module]) -> MoEShape:
    """Return what the configuration says of the routed layers, without looking at a router."""
    config = config_of(model_chunks)
    if not config.num_moe_experts:
        return MoEShape(layers=(), num_experts=1, top_k=1)
    return MoEShape(
        layers=tuple(moe_layers(config, _hybrid_pattern(model_chunks))),
        num_experts=config.num_moe_experts,
        top_k=config.moe_router_topk,
    )


def config_of(model_chunks: Sequence[torch.nn.Module]) -> Any:
    """Return the Megatron configuration that the chunks carry.

    Raises:
        ReplayError: They carry none.
    """
    for module in model_chunks[0].modules():
        if hasattr(module, "config"):
            return module.config
    raise ReplayError(
        "the model chunks carry no Megatron configuration", fix="Pass Megatron models"
    )
