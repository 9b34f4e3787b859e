"""Which expert-parallel rank holds which expert of a layer, and swaps that balance them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..errors import ConfigError

# Swaps of one layer: far more than any start needed (64 experts of 128 were the most).
MAX_SWAPS = 512
# Ranks of a layer that are searched for a swap before it ends.
MAX_ATTEMPTS = 4
# Of a lower load of the two ranks of a swap, beside a lower load of the busiest rank: where several
# ranks are about as busy, no single swap lowers the load of all of them.
PAIR_SHARE = 0.05


@dataclass(frozen=True, kw_only=True, eq=False)
class Placement:
    """Where the experts of each layer lie. Rank r holds the slots r * E / R .. (r + 1) * E / R.

    Invariant: every layer's slots hold each expert once.

    Args:
        experts_LE: int64; slot p of a layer holds the model's expert `experts_LE[layer, p]`.
        num_ranks: R, expert-parallel ranks.

    Raises:
        ConfigError: Ranks that do not divide the experts, or slots that are no permutation.
    """

    experts_LE: np.ndarray
    num_ranks: int

    def __post_init__(self) -> None:
        num_experts = self.experts_LE.shape[1]
        if self.num_ranks < 1 or num_experts % self.num_ranks:
            raise ConfigError(
                "the expert-parallel ranks do not divide the experts",
                expected=f"a divisor of {num_experts}",
                got=self.num_ranks,
            )
        if not (np.sort(self.experts_LE, axis=1) == np.arange(num_experts)).all():
            raise ConfigError(
                "a placement does not hold every expert of a layer once",
                expected=f"permutations of 0..{num_experts - 1}",
                got=self.experts_LE.tolist(),
            )

    @classmethod
    def natural(cls, num_layers: int, num_experts: int, num_ranks: int) -> Placement:
        """Return Megatron's own: expert e in slot e."""
        return cls(experts_LE=np.tile(np.arange(num_experts), (num_layers, 1)), num_ranks=num_ranks)

    @property
    def num_local(self) -> int:
        """Experts of a layer on one rank."""
        return int(self.experts_LE.shape[1]) // self.num_ranks

    @property
    def ranks_LE(self) -> np.ndarray:
        """The rank of each of the model's experts; int64 [L, E]."""
        ranks_LE: np.ndarray = np.argsort(self.experts_LE, axis=1) // self.num_local
        return ranks_LE

    def is_on_rank_ER(self, layer: int) -> np.ndarray:
        """Return whether an expert lies on a rank, as float32 0 or 1 [E, R]."""
        ranks_E = self.ranks_LE[layer]
        is_on_ER: np.ndarray = ranks_E[:, None] == np.arange(self.num_ranks)
        return is_on_ER.astype(np.float32)

    def num_moves(self, before: Placement) -> int:
        """Return how many experts change their rank from an earlier placement to this one."""
        return int((self.ranks_LE != before.ranks_LE).sum())


def swapped(loads_LME: np.ndarray, start: Placement, least_gain: float = 0.0) -> Placement:
    """Return a placement with less on the busiest ranks, by swaps of two experts at a time.

    Each swap takes an expert of the rank that is busiest most, and exchanges it with the expert
    elsewhere that lowers the sum over the microbatches of the busiest rank's load most; a share of
    what the two ranks gain counts as well. A layer ends when no swap gains, and goes back to the
    point at which its swaps paid most.

    Args:
        loads_LME: Tokens for each expert in each microbatch M (and group of experts).
        start: Where the experts lie now; moves are counted from here.
        least_gain: Load on the busiest ranks, summed over the microbatches, that a swap must save:
            the cost of moving two experts over the steps for which they stay.
    """
    experts_LE = start.experts_LE.copy()
    best_LE, loads_LME = experts_LE.copy(), loads_LME.astype(np.float32)
    # A gain below the rounding of float32 sums could swap two experts for ever.
    noise_L = 1e-6 * loads_LME.sum((1, 2))
    saved_L, most_saved_L = np.zeros(len(experts_LE)), np.zeros(len(experts_LE))
    active, attempt_L = np.arange(len(experts_LE)), np.zeros(len(experts_LE), np.int64)
    for _ in range(MAX_SWAPS):
        by_slot_LME = np.take_along_axis(loads_LME[active], experts_LE[active, None], axis=2)
        score_L, gain_L, slots_L2 = _best_swaps(by_slot_LME, start.num_ranks, attempt_L[active])
        gains_L = score_L > noise_L[active]
        swapped_L, slots_L2 = active[gains_L], slots_L2[gains_L]
        experts_LE[swapped_L[:, None], slots_L2] = experts_LE[swapped_L[:, None], slots_L2[:, ::-1]]
        # A swap may pay only together with the next one: the best of all prefixes is kept.
        saved_L[swapped_L] += gain_L[gains_L] - least_gain
        is_better_L = saved_L > most_saved_L
        best_LE[is_better_L] = experts_LE[is_better_L]
        most_saved_L = np.maximum(saved_L, most_saved_L)
        # Where the busiest rank has no swap that gains, the next busiest one may have.
        attempt_L[active] = np.where(gains_L, 0, attempt_L[active] + 1)
        active = active[attempt_L[active] < min(MAX_ATTEMPTS, start.num_ranks)]
        if not len(active):
            break
    return Placement(experts_LE=best_LE, num_ranks=start.num_ranks)


def _best_swaps(
    by_slot_LME: np.ndarray, num_ranks: int, attempt_L: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each layer's best swap: its score [L], its gain on the busiest rank [L], its slots [L, 2].

    One of the slots is of the rank that is busiest most, or of the next one in later attempts.
    """
    num_layers, num_microbatches, num_experts = by_slot_LME.shape
    num_local = num_experts // num_ranks
    loads_LMR = by_slot_LME.reshape(*by_slot_LME.shape[:2], num_ranks, num_local).sum(3)
    layer_L = np.arange(num_layers)
    busiest_L = _busiest(loads_LMR)[layer_L, attempt_L]
    others_LMR = loads_LMR.copy()
    others_LMR[layer_L, :, busiest_L] = -np.inf
    elsewhere_LMR = _max_of_others(others_LMR)
    own_slots_LN = busiest_L[:, None] * num_local + np.arange(num_local)
    after_LNE = np.zeros((num_layers, num_local, num_experts), np.float32)
    pair_LNE, pair_LE = np.zeros_like(after_LNE), np.zeros((num_layers, num_experts), np.float32)
    for m in range(num_microbatches):
        load_LE = by_slot_LME[:, m]
        # [L, N, E]: what the busiest rank gains if it gives slot n for slot e.
        change_LNE = load_LE[:, None] - load_LE[layer_L[:, None], own_slots_LN][..., None]
        busiest_LNE = loads_LMR[layer_L, m, busiest_L][:, None, None] + change_LNE
        partner_LE = np.repeat(loads_LMR[:, m], num_local, axis=1)
        np.maximum(busiest_LNE, partner_LE[:, None] - change_LNE, out=busiest_LNE)
        pair_LNE += busiest_LNE
        pair_LE += np.maximum(partner_LE, loads_LMR[layer_L, m, busiest_L][:, None])
        rest_LE = np.repeat(elsewhere_LMR[:, m], num_local, axis=1)
        after_LNE += np.maximum(busiest_LNE, rest_LE[:, None], out=busiest_LNE)
    gain_LNE = np.subtract(loads_LMR.max(2).sum(1)[:, None, None], after_LNE, out=after_LNE)
    score_LNE = np.subtract(pair_LE[:, None], pair_LNE, out=pair_LNE)
    score_LNE *= PAIR_SHARE
    score_LNE += gain_LNE
    score_LNE[layer_L[:, None], :, own_slots_LN] = -np.inf  # no swap within the rank
    best_L = score_LNE.reshape(num_layers, -1).argmax(1)
    at_L = layer_L, best_L // num_experts, best_L % num_experts
    own_slot_L = own_slots_LN[layer_L, at_L[1]]
    return score_LNE[at_L], gain_LNE[at_L], np.stack([own_slot_L, at_L[2]], axis=1)


def _busiest(loads_LMR: np.ndarray) -> np.ndarray:
    """The ranks of each layer, first the one that holds up the others most; [L, R]."""
    excess_LMR = loads_LMR - loads_LMR.mean(2, keepdims=True)
    is_peak_LMR = loads_LMR == loads_LMR.max(2, keepdims=True)
    return np.argsort(-np.where(is_peak_LMR, excess_LMR, 0).sum(1), axis=1, kind="stable")


def _max_of_others(loads_LMR: np.ndarray) -> np.ndarray:
    """For each rank the largest load of the other ranks; -inf where there is none."""
    if loads_LMR.shape[2] == 1:
        return np.full_like(loads_LMR, -np.inf)
    second_LM2 = np.partition(loads_LMR, -2, axis=2)[..., -2:]
    is_peak_LMR = loads_LMR == second_LM2[..., 1:]
    return np.where(is_peak_LMR, second_LM2[..., :1], second_LM2[..., 1:])
