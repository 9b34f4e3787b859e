"""What every router dispatched, seen by hooks that know nothing of replay."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megatron.core import parallel_state
from megatron.core.transformer.moe.router import TopKRouter


class Witness:
    """Compares every router's dispatch with what the tokens' ids demand.

    Args:
        chunks: This rank's model chunks.
        maps_VLE: bool; no expert for a token that may route live (padding is token 0).

    Attributes:
        num_rows: Dispatched rows so far that were demanded.
        num_wrong: Those that went elsewhere.
        num_live: Dispatched rows of other tokens, padding aside.
        num_short: Of those, rows that went to fewer experts than the router has to choose.
        seen_VLE: Where each token was dispatched last.
    """

    def __init__(self, chunks: Sequence[torch.nn.Module], maps_VLE: torch.Tensor):
        self.maps_VLE = maps_VLE
        self.seen_VLE = torch.zeros_like(maps_VLE)
        self.routers: list[TopKRouter] = []
        self.reset()
        self._ids = torch.empty(1, 0, dtype=torch.int64)  # [b, s] of the running forward
        self._is_cut = False
        for chunk in chunks:
            chunk.register_forward_pre_hook(self._see_tokens, with_kwargs=True)
            for module in chunk.modules():
                if isinstance(module, TopKRouter):
                    self.routers.append(module)
                    module.register_forward_hook(self._see_dispatch)

    def reset(self) -> None:
        self.num_rows = self.num_wrong = self.num_live = self.num_short = 0

    def demand_what_was_seen(self, last_tokens: Sequence[torch.Tensor]) -> None:
        """Demand from here on what every token got, the last ones of sequences aside.

        The routers are turned upside down: only replay can repeat their choices.
        """
        for token in last_tokens:
            self.seen_VLE[token] = False  # never fed by an engine: routes live
        self.maps_VLE = self.seen_VLE.clone()
        with torch.no_grad():
            for router in self.routers:
                router.weight.copy_(router.weight.flip(0))
        self.reset()

    def counts(self) -> dict[str, int]:
        return {
            "rows": self.num_rows,
            "wrong": self.num_wrong,
            "live": self.num_live,
            "short": self.num_short,
        }

    def _see_tokens(self, chunk, args, kwargs) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        self._ids = ids.values()[None] if ids.is_nested else ids
        self._is_cut = chunk_config(chunk).sequence_parallel

    def _local_tokens(self, num_rows: int) -> torch.Tensor:
        """The tokens of a router's rows."""
        size = parallel_state.get_tensor_model_parallel_world_size() if self._is_cut else 1
        tokens = self._ids.t().flatten()  # Megatron's order is sequence-major
        if len(tokens) != num_rows * size:
            # A framework need not pack what a pipeline stage does not embed.
            tokens = self._ids[self._ids > 0]
        if self._is_cut:
            tokens = tokens.chunk(size)[parallel_state.get_tensor_model_parallel_rank()]
        return tokens

    def _see_dispatch(self, router, args, output) -> None:
        dispatched_TE = output[1].reshape(-1, self.maps_VLE.shape[-1]).bool()
        tokens = self._local_tokens(len(dispatched_TE))
        expected_TE = self.maps_VLE[tokens, router.layer_number - 1]
        demanded_T = expected_TE.any(1)
        wrong_T = (dispatched_TE != expected_TE).any(1)
        self.num_rows += int(demanded_T.sum())
        self.num_wrong += int((wrong_T & demanded_T).sum())
        live_T = ~demanded_T & (tokens > 0)
        self.num_live += int(live_T.sum())
        self.num_short += int((live_T & (dispatched_TE.sum(1) < router.topk)).sum())
        self.seen_VLE[tokens, router.layer_number - 1] = dispatched_TE


def chunk_config(chunk):
    while not hasattr(chunk, "config"):
        chunk = chunk.module
    return chunk.config
