"""Routing replay in verl: what verl loads of us, in each of its processes.

    python -m verl.trainer.main_ppo ... \
        +ray_kwargs.ray_init.runtime_env.env_vars.ROUTING_REPLAY_MODE=R3

This module is an entry point of the group `verl.plugins`, which `import verl` imports. verl has no
other call to a plugin, so importing this module installs the adapter, if ROUTING_REPLAY_MODE asks
for it. Everything is done after the imports of verl's own modules: here nothing of it is loaded,
and an error is raised where verl does not swallow it.
"""

from __future__ import annotations

import base64
import importlib
import os
from collections.abc import AsyncIterator, Callable, Mapping
from types import ModuleType
from typing import Any

import numpy as np
import torch

from ..errors import PayloadError
from .patches import after_import, rebind

ENGINE = "verl.workers.engine.megatron.transformer_impl"
LOSSES = "verl.trainer.ppo.core_algos"
SERVER = "verl.workers.rollout.sglang_rollout.async_sglang_server"
TOKENIZER_MANAGER = "sglang.srt.managers.tokenizer_manager"


def install() -> None:
    """Take part in this process, once verl has imported what it is about."""
    after_import(ENGINE, lambda module: _module("verl_engine").register())
    after_import(LOSSES, lambda module: _module("verl_losses").register(module))
    after_import(SERVER, decode_routes)


def _module(name: str) -> Any:
    return importlib.import_module(f".{name}", __package__)


def decode_routes(server: ModuleType) -> None:
    """Let verl's SGLang server read the routes that SGLang returns.

    verl 0.9.1 expects a tensor in `meta_info["routed_experts"]`; SGLang has base64 text there since
    0.5.10. Delete this when verl decodes it.
    """
    manager = importlib.import_module(TOKENIZER_MANAGER).TokenizerManager

    def replacement(stock: Callable[..., AsyncIterator[Any]]) -> Callable[..., AsyncIterator[Any]]:
        async def generate_request(self: Any, *args: Any, **named: Any) -> AsyncIterator[Any]:
            async for output in stock(self, *args, **named):
                meta_info = output.get("meta_info", {}) if isinstance(output, dict) else {}
                if isinstance(meta_info.get("routed_experts"), str):
                    meta_info["routed_experts"] = routes_of(meta_info, self.model_config.hf_config)
                yield output

        return generate_request

    rebind(manager, "generate_request", replacement, ("obj",))


def routes_of(meta_info: Mapping[str, Any], hf_config: Any) -> torch.Tensor:
    """Return SGLang's own payload as int32 [T, all layers, K]; a row of zeros was not captured.

    Raises:
        PayloadError: Bytes of another model.
    """
    data = base64.b64decode(meta_info["routed_experts"])
    num_layers, top_k = hf_config.num_hidden_layers, hf_config.num_experts_per_tok
    if len(data) % (4 * num_layers * top_k):
        raise PayloadError(
            "the server's routes are of another shape",
            expected=f"rows of {num_layers} layers x {top_k} slots x 4 bytes",
            got=f"{len(data)} bytes",
            fix="Leave SGLang's own payload on in a server that verl starts",
        )
    ids_TLK = np.frombuffer(data, "<i4").reshape(-1, num_layers, top_k).copy()
    if meta_info.get("num_retractions"):
        # The rows are those of another forward pass, and SGLang cannot say which.
        ids_TLK[:] = 0
    return torch.from_numpy(ids_TLK)


# verl logs what a plugin raises at a level that nobody reads: a mode that does not exist is an
# error of the engine.
if os.environ.get("ROUTING_REPLAY_MODE", "disabled") != "disabled":
    install()
