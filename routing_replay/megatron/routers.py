"""Finding a model's routers, and the object that stands at each router's replay seam.

Megatron reads `TopKRouter.router_replay` at call time and asks it for the top-k (megatron-core 0.16
and later). We assign our own object there: no flag, no global list, no monkey-patch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.moe.router import TopKRouter

from ..errors import PreflightError, ReplayError
from ..routes.shape import MoEShape
from .selection import LiveTopK, Selection


class RouterSeam:
    """Stands in `TopKRouter.router_replay`: identity of the router, and who selects for it.

    Args:
        router: The stock router.
        chunk: Index of its model chunk on this rank.
        layer: Global 0-based layer index.
        name: Module path, for messages.
        select: Called as `select(seam, live)` for every top-k of the router.
    """

    def __init__(
        self,
        router: TopKRouter,
        chunk: int,
        layer: int,
        name: str,
        select: Callable[[RouterSeam, LiveTopK], Selection],
    ):
        self.router = router
        self.chunk = chunk
        self.layer = layer
        self.layer_number = layer + 1  # Megatron sets and shows this 1-based name
        self.name = name
        self._select = select
        self._stock = router.router_replay
        self._stock_config = router.config

    def install(self) -> None:
        self.router.router_replay = self

    def remove(self) -> None:
        self.router.router_replay = self._stock
        self.router.config = self._stock_config

    def get_replay_topk(
        self, scores, topk, num_groups=None, group_topk=None, default_compute_topk=None
    ) -> Selection:
        """Megatron's seam, unchanged from 0.16.1 on."""
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
        """What happens without us: Megatron's own replay object if it has one, else top-k."""
        if self._stock is None:
            return live()
        return self._stock.get_replay_topk(
            live.scores_TE, live.top_k, live.num_groups, live.group_top_k, live.stock
        )


@dataclass(frozen=True, kw_only=True)
class FoundRouter:
    """A router of the live module tree."""

    router: TopKRouter
    chunk: int
    layer: int
    name: str


def find_routers(model_chunks: Sequence[torch.nn.Module]) -> list[FoundRouter]:
    """All decoder routers of this rank's model chunks, by walking the live modules.

    MTP routers are left out: they number their layers from 1 again, and no engine returns routes
    for them. Routers built elsewhere and thrown away are not in the tree, so never found.

    Raises:
        PreflightError: No router, a router without a layer number, or two of one layer.
    """
    found: list[FoundRouter] = []
    for chunk, model in enumerate(model_chunks):
        for name, module in model.named_modules():
            if isinstance(module, TopKRouter) and not _is_mtp(name, module):
                if module.layer_number is None:
                    raise PreflightError(
                        "a router does not know its layer",
                        expected="router.layer_number, set when the layer is built",
                        where=f"chunk {chunk}, {name}",
                    )
                layer = module.layer_number - 1
                found.append(FoundRouter(router=module, chunk=chunk, layer=layer, name=name))
    if not found and not _has_other_stages():
        raise PreflightError(
            "the model has no router that can replay",
            expected="megatron.core TopKRouter modules",
            got="none",
            fix="Pass the list of model chunks that get_model returned, of an MoE model",
        )
    by_layer: dict[int, FoundRouter] = {}
    for item in found:
        other = by_layer.setdefault(item.layer, item)
        if other is not item:
            raise PreflightError(
                "two routers claim one layer: part of the model was built twice",
                expected="one router per layer",
                got=f"{other.name} (chunk {other.chunk}) and {item.name} (chunk {item.chunk})",
                where=f"layer {item.layer}",
                fix="Remove the module that is not used; only one of them would be replayed",
            )
    return found


def _is_mtp(name: str, module: TopKRouter) -> bool:
    return "mtp" in name.split(".") or bool(getattr(module, "is_mtp_layer", False))


def _has_other_stages() -> bool:
    return (
        parallel_state.model_parallel_is_initialized()
        and parallel_state.get_pipeline_model_parallel_world_size() > 1
    )


def describe_model(
    found: Sequence[FoundRouter], config, model_chunks: Sequence[torch.nn.Module]
) -> MoEShape:
    """Layers of all pipeline stages, experts and top-k: what a table must agree with.

    Collective over the pipeline group.

    Raises:
        PreflightError: Stages that claim the same layer, or layers that are not the ones which
            the configuration makes MoE layers (orphan or doubled routers).
    """
    ours = sorted(item.layer for item in found)
    stages = [ours]
    if _has_other_stages():
        group = parallel_state.get_pipeline_model_parallel_group()
        stages = [None] * dist.get_world_size(group)
        dist.all_gather_object(stages, ours, group=group)
    layers = sorted(layer for stage in stages for layer in stage)
    expected = moe_layers(config, _hybrid_pattern(model_chunks))
    if layers != expected:
        raise PreflightError(
            "the routers found are not the model's MoE layers",
            expected=f"layers {expected}",
            got=f"layers {layers}",
            where=f"pipeline stages hold {stages}",
            fix="Pass all model chunks of this rank to attach, and only those",
        )
    return MoEShape(
        layers=tuple(layers), num_experts=config.num_moe_experts, top_k=config.moe_router_topk
    )


def _hybrid_pattern(model_chunks: Sequence[torch.nn.Module]) -> str | None:
    """The pattern of HybridModel's (before 0.18 MambaModel's) layers; None for other models."""
    for module in model_chunks[0].modules():
        for name in ("hybrid_layer_pattern", "hybrid_override_pattern"):  # 0.17 on; 0.16
            if getattr(module, name, None):
                return getattr(module, name)
    return None


def moe_layers(config, hybrid_pattern: str | None = None) -> list[int]:
    """Global 0-based indices of the MoE layers.

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
