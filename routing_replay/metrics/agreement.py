"""Agreement of two routers on the same tokens: per token, then per layer, without a host sync.

For one layer and one token, mu is the router distribution of the engine that selected the replayed
experts, and pi is the trainer's live one. The distribution of a router over its E experts is

    softmax routers             softmax of the logits over all experts
    sigmoid, sqrtsoftplus       the scores, without the expert bias, divided by their sum over ALL
                                experts (these routers define no distribution of their own; this
                                one is ours, and both sides must use it)

Experts are compared as sets, because a route has no order of slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from ..errors import ConfigError
from .typed import LayerMean, Mean, Metric, all_reduce

# Gates arrive as float16, rounded to nearest: at most half a unit of its 11-bit significand off.
GATE_ROUNDING = 2.0**-11
# Nothing smaller is representable in float16; a live probability of zero counts as this much.
SMALLEST_PROB = 2.0**-25
# One byte per table row holds the index of its first differing layer. A minimum merges the views of
# two pipeline stages: "seen, none differs" beats "not seen", and any layer beats both.
NO_LAYER, NOT_SEEN = 254, 255


def router_probs(
    values_TE: torch.Tensor, form: str, expert_bias_E: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the router distribution from the values that Megatron's top-k compares.

    Args:
        values_TE: What the selection saw.
        form: "logits" (softmax after top-k), "probs" (softmax before top-k) or "scores"
            (sigmoid, sqrtsoftplus: non-negative, any sum).
        expert_bias_E: Bias that was added to the scores for the selection only, if any.

    Returns:
        float32 [T, E], each row sums to 1.

    Raises:
        ConfigError: An unknown form.
    """
    values_TE = values_TE.detach().float()
    match form:
        case "logits":
            return values_TE.softmax(-1)
        case "probs":
            return values_TE
        case "scores":
            if expert_bias_E is not None:
                values_TE = values_TE - expert_bias_E.float()
            return values_TE / values_TE.sum(-1, keepdim=True).clamp_min(SMALLEST_PROB)
    raise ConfigError(
        "the form of the router's values is unknown",
        expected="logits, probs or scores",
        got=repr(form),
    )


def log_router_probs(logits_TE: torch.Tensor, score_function: str = "softmax") -> torch.Tensor:
    """Return the logarithm of the router distribution, from raw router logits; float64 [T, E].

    Args:
        logits_TE: Raw logits, before any score function or bias.
        score_function: "softmax", "sigmoid" or "sqrtsoftplus", as in Megatron.

    Raises:
        ConfigError: An unknown score function.
    """
    logits_TE = logits_TE.detach().double()
    if score_function == "softmax":
        return logits_TE.log_softmax(-1)
    if score_function == "sigmoid":
        log_scores_TE = torch.nn.functional.logsigmoid(logits_TE)
    elif score_function == "sqrtsoftplus":
        log_scores_TE = torch.nn.functional.softplus(logits_TE).log() / 2
    else:
        raise ConfigError(
            "the router's score function is unknown",
            expected="softmax, sigmoid or sqrtsoftplus",
            got=repr(score_function),
        )
    return log_scores_TE - log_scores_TE.logsumexp(-1, keepdim=True)


def overlap(ids_TK: torch.Tensor, other_ids_TK: torch.Tensor) -> torch.Tensor:
    """Return |A intersect B| / K per token, in 0..1. Each row must hold distinct experts."""
    # All pairs of slots: K is small, so K * K comparisons beat two sorts and any [T, E] map.
    shared_TKK = ids_TK.unsqueeze(-1) == other_ids_TK.unsqueeze(-2)
    return shared_TKK.any(-1).float().mean(-1)


def exact_match(ids_TK: torch.Tensor, other_ids_TK: torch.Tensor) -> torch.Tensor:
    """Return where both rows select the same set of experts; bool [T]."""
    return (ids_TK.unsqueeze(-1) == other_ids_TK.unsqueeze(-2)).any(-1).all(-1)


def margin(values_TE: torch.Tensor, live_ids_TK: torch.Tensor) -> torch.Tensor:
    """Return the distance from the weakest selected expert to the best left out; float32 [T].

    In the units that the selection compares: nats for logits, biased score for sigmoid routers.
    Near zero means that rounding decides. Negative only under group-limited routing, where a
    strong expert of a rejected group stays out. +inf where every expert is selected.
    """
    values_TE = values_TE.detach().float()
    weakest_T = values_TE.gather(1, live_ids_TK.long()).amin(-1)
    left_out_TE = values_TE.scatter(1, live_ids_TK.long(), -torch.inf)
    return weakest_T - left_out_TE.amax(-1)


def live_mass(probs_TE: torch.Tensor, ids_TK: torch.Tensor) -> torch.Tensor:
    """Return the live router's probability of the replayed experts together; [T] in 0..1.

    -log of it is KL(live router restricted to these experts || live router).
    """
    return probs_TE.gather(1, ids_TK.long()).sum(-1)


def replay_bias(
    probs_TE: torch.Tensor, replayed_ids_TK: torch.Tensor, live_ids_TK: torch.Tensor
) -> torch.Tensor:
    """Return -log(live mass on the replayed / on the live experts) in nats; [T].

    This is what replay adds to the mass that any top-k leaves out: zero for equal sets. It is not
    negative for routers that select by probability; an expert bias or groups can make it so.
    """
    kept_T = live_mass(probs_TE, live_ids_TK).clamp_min(SMALLEST_PROB)
    return (kept_T / live_mass(probs_TE, replayed_ids_TK).clamp_min(SMALLEST_PROB)).log()


def router_kl(log_mu_TE: torch.Tensor, log_pi_TE: torch.Tensor) -> torch.Tensor:
    """Return the exact KL(mu || pi) in nats from `log_router_probs`; float64 [T]."""
    return (log_mu_TE.exp() * (log_mu_TE - log_pi_TE)).sum(-1)


def router_kl_bound(gate_probs_TK: torch.Tensor, live_probs_TK: torch.Tensor) -> torch.Tensor:
    """Return a lower bound of KL(mu || pi) in nats from the selected experts' gates; float64 [T].

    Merging the other experts into one bucket can only lower a KL (data-processing inequality). The
    bucket's mass, 1 - sum of the gates, is known only up to the rounding of the gates. Of the
    possible values the one nearest to pi's is taken, so that rounding cannot raise the bound where
    the gates hold nearly all the mass. The gates' own rounding adds at most
    GATE_ROUNDING ** 2 / 2 = 1.2e-7 nats.

    Args:
        gate_probs_TK: mu's probability of each selected expert over all experts (float16).
        live_probs_TK: pi's probability of the same experts.
    """
    mu_TK, pi_TK = gate_probs_TK.double(), live_probs_TK.double().clamp_min(SMALLEST_PROB)
    kept_T = mu_TK.sum(-1)
    rest_pi_T = (1 - pi_TK.sum(-1)).clamp_min(SMALLEST_PROB)
    lowest_T = (1 - kept_T * (1 + GATE_ROUNDING)).clamp_min(0)
    highest_T = (1 - kept_T * (1 - GATE_ROUNDING)).clamp_min(0)
    rest_mu_T = rest_pi_T.clamp(lowest_T, highest_T)
    return _divergence(mu_TK, pi_TK).sum(-1) + _divergence(rest_mu_T, rest_pi_T)


def _divergence(mu: torch.Tensor, pi: torch.Tensor) -> torch.Tensor:
    # a log(a/b) - a + b: every term is >= 0, and the sum is the KL where both sides sum to 1.
    return torch.xlogy(mu, mu / pi) - mu + pi


@dataclass(frozen=True, kw_only=True)
class RouterView:
    """One router call of a replaying pass, with both selections.

    Args:
        replayed_ids_TK: Integer ids in 0..E-1 that were replayed; anything in range outside
            `valid_T`.
        live_ids_TK: The live router's own selection.
        values_TE: What the live selection compared (the seam's `scores`).
        probs_TE: The live router distribution, `router_probs` of the same values.
        valid_T: bool, the row is replayed and belongs to a token that counts.
        token_rows_T: int64 rows in the step's table; needed for the first differing layer.
        gate_probs_TK: float16, mu's probabilities of the replayed experts, if captured.
    """

    replayed_ids_TK: torch.Tensor
    live_ids_TK: torch.Tensor
    values_TE: torch.Tensor
    probs_TE: torch.Tensor
    valid_T: torch.Tensor
    token_rows_T: torch.Tensor | None = None
    gate_probs_TK: torch.Tensor | None = None


class LayerAgreement:
    """Sums and counts of a rank's layers over one step, all on the device.

    Every rank names all routed layers of the model and observes its own. Observe a (layer, token)
    once, and not in a recomputation, whose routes are the forward's.

    Args:
        layers: All routed layers of the model, global 0-based indices, ascending.
        num_rows: Rows of the step's table, for the first differing layer; 0 leaves that out.
        has_gates: Views will carry gate probabilities (`router_kl_bound`).
        has_logits: `observe_kl` will be called (`router_kl`).
        device: Where the router's tensors live.

    Raises:
        ConfigError: More layers than one byte can name.
    """

    def __init__(
        self,
        layers: Sequence[int],
        *,
        num_rows: int = 0,
        has_gates: bool = False,
        has_logits: bool = False,
        device: torch.device | str = "cpu",
    ):
        if len(layers) > NO_LAYER:
            raise ConfigError(
                "the model has too many routed layers",
                expected=f"at most {NO_LAYER}",
                got=len(layers),
            )
        self.layers = tuple(layers)
        self.statistics: tuple[str, ...] = (
            "overlap",
            "exact_match",
            "live_mass",
            "replay_bias",
            "margin",
        )
        self.statistics += ("router_kl_bound",) * has_gates + ("router_kl",) * has_logits
        self._index = {layer: index for index, layer in enumerate(self.layers)}
        shape = (len(self.layers), len(self.statistics))
        self._totals_LX = torch.zeros(shape, dtype=torch.float64, device=device)
        self._counts_LX = torch.zeros(shape, dtype=torch.float64, device=device)
        # A spare row takes what tokens outside `valid_T` write, so that no branch is needed.
        size = num_rows + 1 if num_rows else 0
        self._first_T = torch.full((size,), NOT_SEEN, dtype=torch.uint8, device=device)

    @torch.no_grad()
    def observe(self, layer: int, view: RouterView) -> None:
        """Add one router call: a fixed number of small kernels, no host sync."""
        match_T = exact_match(view.replayed_ids_TK, view.live_ids_TK)
        columns = [
            overlap(view.replayed_ids_TK, view.live_ids_TK),
            match_T,
            live_mass(view.probs_TE, view.replayed_ids_TK),
            replay_bias(view.probs_TE, view.replayed_ids_TK, view.live_ids_TK),
            margin(view.values_TE, view.live_ids_TK),
        ]
        if view.gate_probs_TK is not None:
            live_TK = view.probs_TE.gather(1, view.replayed_ids_TK.long())
            columns.append(router_kl_bound(view.gate_probs_TK, live_TK))
        values_TX = torch.stack([column.double() for column in columns], -1)
        # where, not a product: rows outside `valid_T` may hold nan.
        values_TX = torch.where(view.valid_T[:, None], values_TX, 0.0)
        index, width = self._index[layer], len(columns)
        self._totals_LX[index, :width] += values_TX.sum(0)
        self._counts_LX[index, :width] += view.valid_T.sum()
        if view.token_rows_T is not None and len(self._first_T):
            self._update_first(index, view.token_rows_T, view.valid_T, match_T)

    @torch.no_grad()
    def observe_kl(self, layer: int, kl_T: torch.Tensor, valid_T: torch.Tensor) -> None:
        """Add exact `router_kl` values of the tokens whose engine logits were captured."""
        cell = self._index[layer], self.statistics.index("router_kl")
        self._totals_LX[cell] += torch.where(valid_T, kl_T.double(), 0.0).sum()
        self._counts_LX[cell] += valid_T.sum()

    def _update_first(
        self, index: int, rows_T: torch.Tensor, valid_T: torch.Tensor, match_T: torch.Tensor
    ) -> None:
        # Rows are distinct within a call, except for the spare one: plain indexing is enough.
        rows_T = torch.where(valid_T, rows_T, len(self._first_T) - 1)
        first_T = torch.where(match_T, NO_LAYER, index).to(torch.uint8)
        self._first_T[rows_T] = torch.minimum(self._first_T[rows_T], first_T)

    def metrics(self) -> dict[str, Metric]:
        """Return this rank's `routing_replay/NAME` with their layers; not collective.

        A layer that this rank did not observe has count 0 and joins a reduction without effect.
        """
        return {
            f"routing_replay/{name}": LayerMean(
                layers=self.layers, total_L=self._totals_LX[:, x], count_L=self._counts_LX[:, x]
            )
            for x, name in enumerate(self.statistics)
        }

    def reduced(
        self,
        group: dist.ProcessGroup | None = None,
        device: torch.device | str | None = None,
        table_groups: Sequence[dist.ProcessGroup] | None = None,
    ) -> dict[str, Metric]:
        """Return the metrics over all ranks; collective: every rank of both groups must call it.

        Adds what only all stages together know, over the table rows that were observed:
        `any_layer_differs` (fraction), `first_differing_layer` (mean global index, of those that
        differ) and `first_difference` (per layer: the fraction whose first difference it is).

        Args:
            group: Process group of the sums; the world if None.
            device: Where the communication happens, as in `metrics.all_reduce`.
            table_groups: Groups whose product is the ranks that share one table, all pipeline
                stages of its tokens among them; the world if None, this rank alone if empty.
        """
        first_T = self._first_T[:-1]
        if len(first_T) and dist.is_available() and dist.is_initialized():
            first_T = first_T.to(device or "cpu")
            for table_group in (None,) if table_groups is None else table_groups:
                dist.all_reduce(first_T, op=dist.ReduceOp.MIN, group=table_group)
        # Ranks that share a table now hold equal sums, and equal copies do not change a mean.
        return all_reduce({**self.metrics(), **self._row_metrics(first_T)}, group, device)

    def _row_metrics(self, first_T: torch.Tensor) -> dict[str, Metric]:
        if not len(first_T):
            return {}
        histogram = torch.bincount(first_T.long(), minlength=NOT_SEEN + 1).double()
        differing_L = histogram[: len(self.layers)]
        seen, differing = histogram[:NOT_SEEN].sum(), differing_L.sum()
        layers_L = torch.tensor(self.layers, dtype=torch.float64, device=first_T.device)
        first_layer = Mean(total=(differing_L * layers_L).sum(), count=differing)
        return {
            "routing_replay/any_layer_differs": Mean(total=differing, count=seen),
            "routing_replay/first_differing_layer": first_layer,
            # The layers' shares add up to any_layer_differs: their mean says nothing.
            "routing_replay/first_difference": LayerMean(
                layers=self.layers,
                total_L=differing_L,
                count_L=seen.expand(len(self.layers)),
                has_mean=False,
            ),
        }
