"""Replay in routers that a CUDA graph captures: buffers at fixed addresses, filled beforehand.

A graph repeats kernels on the addresses of its capture and runs no Python. So what a captured
router selects must be decided by the contents of buffers: it always takes, token by token, the live
top-k or the ids of a buffer. Before a chunk's forward its buffers are filled, in the order of the
stream; afterwards every token is live again, as it is outside scopes. The graph counts its own
runs, and the receipt reads that counter.

Source: megatron-core 0.19.2, `transformer/cuda_graphs.py`. Both implementations ("local" and
"transformer_engine") run the captured function a few times before they capture it, under
`is_graph_capturing()`. The chunk's own hooks stay outside of the graphs of its layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from megatron.core.transformer.cuda_graphs import is_graph_capturing
from packaging.version import Version

from ..errors import PreflightError, ReplayError
from .preflight import installed_version
from .routers import RouterSeam
from .routing_call import Routed, RoutingCall
from .selection import LiveTopK, Selection
from .transfers import compact_dtype, to_host

# Older versions capture in other ways, which nobody has read for this.
OLDEST = Version("0.19")
ATTRIBUTE = "routing_replay_buffers"

__all__ = ["ChunkBuffers", "StaticRoutes", "buffers_of", "is_graph_capturing"]


class StaticRoutes:
    """What the captured routers of a chunk read and write, for one number of tokens.

    No attribute is ever assigned anew: graphs hold the addresses.

    Args:
        layers: Global layers of the chunk's routers.
        num_tokens: Of each router call, in a microbatch.
        top_k: Experts per token.
        num_experts: Of the model.
        device: Where the routers run.

    Attributes:
        ids_LTK: What replays, in the compact dtype.
        is_live_LT: Tokens that are selected anew; all of them between microbatches.
        chosen_LTK: What the last forward selected.
        calls_L: Runs of each router since the last `begin`.
    """

    def __init__(
        self,
        layers: tuple[int, ...],
        num_tokens: int,
        top_k: int,
        num_experts: int,
        device: torch.device,
    ):
        self.layers = layers
        shape_LTK = (len(layers), num_tokens, top_k)
        dtype = compact_dtype(num_experts)
        self.ids_LTK = torch.zeros(shape_LTK, dtype=dtype, device=device)
        self.is_live_LT = torch.ones(shape_LTK[:2], dtype=torch.bool, device=device)
        self.chosen_LTK = torch.zeros(shape_LTK, dtype=dtype, device=device)
        self.calls_L = torch.zeros(len(layers), dtype=torch.int32, device=device)

    def begin(
        self, ids_LTK: torch.Tensor | None = None, is_live_LT: torch.Tensor | None = None
    ) -> None:
        """A forward comes next: replay these ids where a token is not live; None: all live."""
        self.calls_L.zero_()
        if ids_LTK is not None and is_live_LT is not None:
            self.ids_LTK.copy_(ids_LTK)
            self.is_live_LT.copy_(is_live_LT)

    def end(self) -> torch.Tensor:
        """Route live again; returns `calls_L` on the host: synchronise before reading."""
        self.is_live_LT.fill_(True)
        return to_host(self.calls_L.clone())

    def select(self, layer: int, live: LiveTopK) -> Selection:
        """Return the selection of one router call that is captured, by Megatron's functions."""
        index = self.layers.index(layer)
        _, live_ids_TK = live()
        ids_TK = self.ids_LTK[index].long()
        ids_TK = torch.where(self.is_live_LT[index].unsqueeze(1), live_ids_TK, ids_TK)
        self._note(index, ids_TK)
        return live.scores_TE.gather(1, ids_TK), ids_TK

    def route(self, layer: int, call: RoutingCall) -> Routed:
        """Return weights and map of one router call that is captured, by the replay kernel."""
        index = self.layers.index(layer)
        # A copy that belongs to the graph: the backward reads it, when other forwards may have
        # filled the buffer; and the kernel writes the selection of live tokens into it.
        ids_TK = self.ids_LTK[index].clone()
        routed = call.replay(ids_TK, self.is_live_LT[index])
        self._note(index, ids_TK)
        return routed

    def _note(self, index: int, ids_TK: torch.Tensor) -> None:
        self.chosen_LTK[index].copy_(ids_TK)
        self.calls_L[index].add_(1)


class ChunkBuffers:
    """The static routes of one model chunk, by number of tokens; they live as long as its routers.

    Graphs stay as they were captured, also when a handle is removed, and another attached.

    Args:
        layers: Global layers of the chunk's routers.
    """

    def __init__(self, layers: tuple[int, ...]):
        self.layers = layers
        self._by_tokens: dict[int, StaticRoutes] = {}

    def get(self, num_tokens: int) -> StaticRoutes | None:
        """Return the buffers for microbatches of this size; None if no graph has that size."""
        return self._by_tokens.get(num_tokens)

    def select(self, seam: RouterSeam, live: LiveTopK) -> Selection:
        """Answer a router's top-k while Megatron warms up or captures."""
        return self._for(seam, live.scores_TE, live.top_k).select(seam.layer, live)

    def route(self, seam: RouterSeam, call: RoutingCall) -> Routed:
        """Answer a router's whole call while Megatron warms up or captures, by the kernel."""
        return self._for(seam, call.logits_TE, call.top_k).route(seam.layer, call)

    def reset(self) -> None:
        """Route live: the scope is over."""
        for static in self._by_tokens.values():
            static.is_live_LT.fill_(True)

    def _for(self, seam: RouterSeam, values_TE: torch.Tensor, top_k: int) -> StaticRoutes:
        num_tokens, num_experts = values_TE.shape
        static = self._by_tokens.get(num_tokens)
        if static is not None:
            return static
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            # What is allocated now belongs to the graph's pool, whose memory is used again.
            raise ReplayError(
                "a router is captured without a warm-up: its replay has no buffers yet",
                expected="cuda_graph_warmup_steps of at least 1",
                where=f"layer {seam.layer}, {num_tokens} tokens",
                fix="Set --cuda-graph-warmup-steps 3, Megatron's default",
            )
        device = values_TE.device
        static = StaticRoutes(self.layers, num_tokens, top_k, num_experts, device)
        return self._by_tokens.setdefault(num_tokens, static)


def buffers_of(
    seams: Sequence[RouterSeam], model_chunks: Sequence[torch.nn.Module]
) -> list[ChunkBuffers]:
    """Return the buffers of each chunk: those that its graphs hold already, or new ones.

    Raises:
        PreflightError: This Megatron captures in another way, or its graphs exist and replay
            nothing.
    """
    if installed_version() < OLDEST:
        raise PreflightError(
            "captured routers are supported from a later megatron-core on",
            expected=f">= {OLDEST}",
            got=installed_version(),
            fix="Leave moe_router out of --cuda-graph-modules, or upgrade megatron-core",
        )
    return [
        _of_chunk([seam for seam in seams if seam.chunk == chunk], module)
        for chunk, module in enumerate(model_chunks)
    ]


def _of_chunk(seams: Sequence[RouterSeam], chunk: torch.nn.Module) -> ChunkBuffers:
    layers = tuple(seam.layer for seam in seams)
    existing = [getattr(seam.router, ATTRIBUTE, None) for seam in seams]
    if existing and existing[0] is not None:
        buffers: ChunkBuffers = existing[0]
        return buffers
    if seams and _has_graphs(chunk.modules()):
        raise PreflightError(
            "the model's CUDA graphs were captured before replay was attached",
            expected="attach(model_chunks, config) before the first training step",
            fix="Attach right after get_model, or delete the graphs and let Megatron capture anew",
        )
    buffers = ChunkBuffers(layers)
    for seam in seams:
        setattr(seam.router, ATTRIBUTE, buffers)
    return buffers


def _has_graphs(modules: Iterable[torch.nn.Module]) -> bool:
    """Whether a layer's graphs exist, of Transformer Engine or of Megatron itself."""
    return any(
        getattr(module, "cuda_graphs", None)
        or any(runner.cudagraph_created for runner in getattr(module, "cudagraph_runners", ()))
        for module in modules
    )
