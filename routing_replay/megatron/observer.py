"""Live against replayed routes, on a sample of a replaying pass's tokens."""

from __future__ import annotations

import numpy as np
import torch

from ..metrics.agreement import (
    LayerAgreement,
    RouterView,
    log_router_probs,
    router_kl,
)
from ..routes.step_routes import StepRoutes
from .routers import RouterSeam
from .selection import LiveTopK, probabilities
from .transfers import to_device


class AgreementSample:
    """The tokens of one microbatch on which live and replayed routes are compared.

    The sample is fixed on the host, evenly spaced, so that comparing costs one top-k over the
    sample and no sync. Tokens whose engine logits were captured are compared exactly as well.

    Args:
        agreement: Sums of the comparison.
        table: The replayed routes, perhaps with gates and logits.
        layers: Global layers of the chunk.
        rows_T: Rows of the tokens in router order.
        is_candidate_T: bool, replayed tokens that the metrics look at.
        max_tokens: Size of the sample; 0 takes all.
        device: Where the routers run.
    """

    def __init__(
        self,
        agreement: LayerAgreement,
        table: StepRoutes,
        layers: tuple[int, ...],
        rows_T: np.ndarray,
        is_candidate_T: np.ndarray,
        *,
        max_tokens: int,
        device: torch.device,
    ):
        self._agreement = agreement
        self._layers = layers
        tokens_C = np.flatnonzero(is_candidate_T)
        has_gates_C = table.has_gates(rows_T[tokens_C])
        has_gates = bool(has_gates_C.any())
        # A table may keep the gates of a sample only; then the tokens are chosen among these.
        tokens_M = evenly_spaced(tokens_C[has_gates_C] if has_gates else tokens_C, max_tokens)
        rows_M = rows_T[tokens_M]
        self._tokens_M = to_device(tokens_M, device)
        self._rows_M = to_device(rows_M, device)
        gates_LMK = table.gather_gates(layers, rows_M) if has_gates else None
        self._gates_LMK = None if gates_LMK is None else to_device(gates_LMK, device)
        self._valid_M = torch.ones(len(tokens_M), dtype=torch.bool, device=device)
        self._logits_LNE: torch.Tensor | None = None
        self._logit_tokens_N: torch.Tensor | None = None
        self._take_logits(table, rows_T, is_candidate_T, device)

    @torch.no_grad()
    def observe(self, seam: RouterSeam, live: LiveTopK, ids_TK: torch.Tensor) -> None:
        """Compare one router call; part of the forward pass, so nothing here waits."""
        index = self._layers.index(seam.layer)
        if len(self._tokens_M):
            scores_ME = live.scores_TE.detach()[self._tokens_M]
            view = RouterView(
                replayed_ids_TK=ids_TK[self._tokens_M],
                live_ids_TK=live.ids_of(self._tokens_M),
                values_TE=scores_ME,
                probs_TE=probabilities(seam, scores_ME),
                valid_T=self._valid_M,
                token_rows_T=self._rows_M,
                gate_probs_TK=None if self._gates_LMK is None else self._gates_LMK[index],
            )
            self._agreement.observe(seam.layer, view)
        if self._logits_LNE is not None and self._logit_tokens_N is not None:
            scores_NE = live.scores_TE.detach()[self._logit_tokens_N]
            log_pi_NE = probabilities(seam, scores_NE).double().log()
            score_function = seam.router.score_function
            log_mu_NE = log_router_probs(self._logits_LNE[index], score_function)
            valid_N = torch.ones_like(self._logit_tokens_N, dtype=torch.bool)
            self._agreement.observe_kl(seam.layer, router_kl(log_mu_NE, log_pi_NE), valid_N)

    def _take_logits(
        self,
        table: StepRoutes,
        rows_T: np.ndarray,
        is_candidate_T: np.ndarray,
        device: torch.device,
    ) -> None:
        """Keep the engine's logits of the microbatch's tokens, where it sampled them."""
        tokens_N = np.flatnonzero(is_candidate_T & table.has_logits(rows_T))
        if len(tokens_N):
            logits_LNE = table.gather_logits(self._layers, rows_T[tokens_N])
            self._logits_LNE = to_device(logits_LNE, device)
            self._logit_tokens_N = to_device(tokens_N, device)


def evenly_spaced(tokens_C: np.ndarray, max_tokens: int) -> np.ndarray:
    """Return at most `max_tokens` of the candidates, spread over all of them; 0 takes all."""
    if not max_tokens or len(tokens_C) <= max_tokens:
        return tokens_C
    return tokens_C[np.arange(max_tokens) * len(tokens_C) // max_tokens]
