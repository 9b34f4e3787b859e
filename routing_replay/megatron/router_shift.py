"""How far the router has moved on the experts that the old policy took: RSPO's gamma, per token."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import torch
import torch.distributed as dist

from ..errors import ReplayError
from .observer import probabilities
from .replay import Replay
from .routers import RouterSeam
from .selection import LiveTopK


class RouterShift:
    """gamma = exp(-mean over layers and slots of |log router_theta(e) - log router_old(e)|).

    e are the experts of the old policy's pass: its own where it routed live, the replayed ones
    under replay. Tokens are known by their rows in the step's table, so the two passes may cut a
    batch differently as long as a rank sees its tokens and layers again.

        with shift.remembering(num_rows): ...      # around the old policy's pass, in a scope
        with shift.comparing(): ...                # around a pass of the current policy, in a scope
        gamma_R = shift.gamma()                    # collective

    Memory: a float32 and an id for each token, layer and slot of this rank.

    Source: RSPO (2510.23027v2), equation 11.
    """

    def __init__(self, replay: Replay):
        self._replay = replay
        self._old: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._sums_R = self._counts_R = torch.empty(0)

    @contextlib.contextmanager
    def remembering(self, num_rows: int) -> Iterator[None]:
        """Within: what the old policy's routers say about the experts that are taken.

        Args:
            num_rows: Rows of the step's table.
        """
        self._num_rows, self._parts = num_rows, {}
        with self._replay.watching(self._remember):
            yield
        self._old = {}
        for layer, parts in self._parts.items():
            rows, ids, logs = (torch.cat(columns) for columns in zip(*parts, strict=True))
            place_R = torch.full((num_rows,), -1, device=rows.device)
            place_R[rows] = torch.arange(len(rows), device=rows.device)
            self._old[layer] = place_R, ids, logs
        self._parts = {}

    @contextlib.contextmanager
    def comparing(self) -> Iterator[None]:
        """Within: the same tokens again, under the current policy."""
        device = next(iter(self._old.values()))[1].device if self._old else "cpu"
        self._sums_R = torch.zeros(self._num_rows, device=device)
        self._counts_R = torch.zeros(self._num_rows, device=device)
        with self._replay.watching(self._compare):
            yield

    def gamma(self) -> torch.Tensor:
        """float32 by row, over all ranks; nan where a layer has not seen the token twice."""
        both = torch.stack([self._sums_R, self._counts_R])
        if not self._replay.is_writer:
            both.zero_()  # tensor-parallel ranks hold the same tokens: one of them speaks
        if dist.is_initialized():
            dist.all_reduce(both)
        sums_R, counts_R = both
        num_layers = len(self._replay.shape.layers)
        gamma_R = (-sums_R / num_layers).exp()
        return torch.where(counts_R == num_layers, gamma_R, torch.nan)

    @torch.no_grad()
    def _remember(self, seam: RouterSeam, live: LiveTopK, ids_TK, rows_T: np.ndarray) -> None:
        tokens, rows = _known(rows_T, ids_TK.device)
        ids = ids_TK[tokens]
        self._parts.setdefault(seam.layer, []).append((rows, ids, _logs(seam, live, tokens, ids)))

    @torch.no_grad()
    def _compare(self, seam: RouterSeam, live: LiveTopK, ids_TK, rows_T: np.ndarray) -> None:
        if seam.layer not in self._old:
            raise ReplayError(
                "the old policy's pass was not remembered",
                expected="`with shift.remembering(num_rows)` around a pass over the same layers",
                where=f"layer {seam.layer}",
            )
        place_R, old_ids, old_logs = self._old[seam.layer]
        tokens, rows = _known(rows_T, ids_TK.device)
        places = place_R[rows]
        logs = _logs(seam, live, tokens, old_ids[places])
        moved = (logs - old_logs[places]).abs().mean(dim=1)
        is_known = places >= 0
        self._sums_R[rows] += torch.where(is_known, moved, 0.0)
        self._counts_R[rows] += is_known.float()


def _known(rows_T: np.ndarray, device) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens of the router call that have a row, and their rows."""
    tokens = np.flatnonzero(rows_T >= 0)
    return torch.from_numpy(tokens).to(device), torch.from_numpy(rows_T[tokens]).to(device)


def _logs(seam, live, tokens, ids) -> torch.Tensor:
    """Log-probs of the experts over all experts, before any renormalisation."""
    return probabilities(seam, live.scores_TE.detach()[tokens]).gather(1, ids).log().float()
