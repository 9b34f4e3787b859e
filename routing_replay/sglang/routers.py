"""The routers of the server's model, looked at once before the first request."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any

import torch

from ..capture import CaptureSettings
from ..errors import ServerError

logger = logging.getLogger(__name__)


def check_routers(model: torch.nn.Module, settings: CaptureSettings, architecture: str) -> None:
    """Raise unless every router that reports has a layer number of its own; log what they report.

    A model may report without a `TopK` module; one that never does ends at its first forward pass.

    Raises:
        ServerError: Two routers write the rows of one layer.
    """
    from sglang.srt.layers.moe.topk import TopK

    modules = [module for module in model.modules() if isinstance(module, TopK)]
    # The module's layer number: the configuration of SGLang 0.5.18 and 0.5.20 has none.
    routers = [router for router in modules if router.topk_config.allow_routed_experts_capture]
    counts = Counter(int(router.layer_id) for router in routers)
    shared = sorted(layer for layer, count in counts.items() if count > 1)
    if shared:
        raise ServerError(
            "two routers of the server's model have one layer number",
            expected="one router per layer",
            got=f"{counts[shared[0]]} routers in layer {shared[0]}",
            where=architecture,
            fix="Each would overwrite the rows of the other: roll out this model without routes",
        )
    _log(routers, settings)


def _log(routers: list[Any], settings: CaptureSettings) -> None:
    own = sorted(r.layer_id for r in routers if r.topk_config.custom_routing_function is not None)
    logger.info("routing_replay: %d routers of the model are SGLang's TopK", len(routers))
    if own and settings.has_gates:
        logger.warning(
            "routing_replay: layers %s report ids only: their routers have a function of their own",
            own,
        )
