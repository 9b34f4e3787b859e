"""What a training script saves about itself, whatever loop runs it; it knows nothing of adapters.

`Witness` keeps the tokens, what the routers dispatched, the losses and the trained weights.
`OwnLoop` is the same job without an adapter: rows by the number of a sample, a scope around the
loop's schedule.
"""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import torch
from loop_routes import LENGTH


class Witness:
    """Saves what happens in training microbatches; evaluation is not of interest."""

    def __init__(self, folder: str):
        self.folder = Path(folder)
        self.tokens: list[torch.Tensor] = []  # whole samples [b, s], before any slicing
        self.maps: dict[int | str, list[torch.Tensor]] = {}  # of layers, and of "mtp"
        self.losses: list[float] = []
        self.is_training = False
        self.model: torch.nn.Module | None = None
        self.positions: torch.Tensor | None = None

    def watch_routers(self) -> None:
        from megatron.core.transformer.moe.router import TopKRouter

        # Not `forward`: a router with an adapter (LoRA) is called by its parts.
        stock = TopKRouter.routing

        @functools.wraps(stock)
        def routing(router, *args, **kwargs):
            probs, routing_map = stock(router, *args, **kwargs)
            is_recompute = torch._C._current_graph_task_id() != -1
            if self.is_training and not is_recompute:
                is_mtp = getattr(router, "is_mtp_layer", False)  # they count from layer 1 again
                key = "mtp" if is_mtp else router.layer_number - 1
                self.maps.setdefault(key, []).append(routing_map.clone())
            return probs, routing_map

        TopKRouter.routing = routing

    def begin(self, model, tokens) -> None:
        """A forward of a chunk begins; `tokens` is None where the chunk sees none."""
        self.model, self.is_training = model, model.training
        if self.positions is None:  # not in the end: Bridge forgets the groups before
            self.positions = self._positions()
        if model.training and tokens is not None:
            self.tokens.append(tokens.clone())

    def loss(self, is_training, mask, output):
        """Megatron's loss function: total, number of tokens, what is logged."""
        total = (output.view(-1).float() * mask.reshape(-1).float()).sum()
        count = mask.sum().int()
        if is_training:
            self.losses.append(float(total))
        return total, count, {"lm loss": torch.stack([total.detach(), count.float()])}

    def save(self) -> None:
        state = {
            "tokens": self.tokens,
            "maps": self.maps,
            "losses": self.losses,
            "positions": self.positions,
            "weights": [p.detach().clone() for p in self.model.parameters()],
        }
        torch.save(state, self.folder / f"rank{torch.distributed.get_rank()}.pt")

    def _positions(self) -> torch.Tensor:
        """Positions of a sample that this rank's routers see, in their order."""
        import context_slices
        from megatron.core import parallel_state as ps

        rank, size = ps.get_context_parallel_rank(), ps.get_context_parallel_world_size()
        local = torch.from_numpy(context_slices.positions(rank, size, LENGTH, False))
        tensor = ps.get_tensor_model_parallel_world_size()
        return local.chunk(tensor)[ps.get_tensor_model_parallel_rank()]


class OwnLoop:
    """Replay by hand on one rank, whose samples come in the order of the table.

    Args:
        path: The table.
        loop: The imported module that gets the schedule by name.
    """

    def __init__(self, path: str, loop):
        from routing_replay.routes.table import RouteTable

        self.table = RouteTable.open(path)
        self.sample = 0
        self.replay = None
        stock = loop.get_forward_backward_func
        loop.get_forward_backward_func = lambda *a, **k: self.wrap(stock(*a, **k))

    def wrap(self, schedule):
        import routing_replay as rr

        def run(**named):
            if named["forward_only"]:
                return schedule(**named)
            if self.replay is None:
                self.replay = rr.attach(named["model"], rr.ReplayConfig(mode="R3"))
            with self.replay.replaying(self.table):
                return schedule(**named)

        return run

    def forward(self, model, tokens, *args, **kwargs):
        """The model's output, with the rows of the next samples."""
        if not model.training:
            return model(tokens, *args, **kwargs)
        numbers = range(self.sample, self.sample + len(tokens))
        self.sample += len(tokens)
        length = tokens.shape[1]
        rows = np.stack([self.table.rows(n, length + 1)[:length] for n in numbers])
        with self.replay.microbatch(rows):
            return model(tokens, *args, **kwargs)
