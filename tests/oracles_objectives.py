"""Cases for the tests of routing_replay.objectives, and naive oracles: floats and loops, token by
token.

`gradient(name, p, case)` is the closed form of the derivative of the objective (to be maximised) by
every token's log pi_theta. It shares no code with the package and uses no automatic
differentiation.
"""

import itertools
import math
import random
from dataclasses import dataclass, field

import torch

from routing_replay import objectives
from routing_replay.objectives import Denominators, LossInputs

# The ratios at which every closed form is checked, for r and for m.
GRID = (0.1, 0.79, 1.0, 1.28, 6.0)


@dataclass
class Case:
    """One step in one microbatch; lists over tokens, but `num_sequences`."""

    theta: list
    old: list
    mu: list
    advantage: list
    mask: list
    sequence: list
    num_sequences: int
    max_length: int = 16
    extra: dict = field(default_factory=dict)

    def members(self, t):
        """Tokens in the loss of the sequence of token t."""
        return [u for u, s in enumerate(self.sequence) if s == self.sequence[t] and self.mask[u]]

    def counted(self):
        return [t for t in range(len(self.theta)) if self.mask[t]]

    def r(self, t):
        return math.exp(self.theta[t] - self.old[t])

    def m(self, t):
        return math.exp(self.old[t] - self.mu[t])

    def w(self, t):
        return math.exp(self.theta[t] - self.mu[t])


def case_on_the_grid() -> Case:
    """All (A, r, m) of the grid in sequences of five, random ones, one of length 1, one empty,
    masked tokens.
    """
    rng = random.Random(0)
    rows = []
    for a, (i, m) in itertools.product((-1.0, 0.0, 1.0), enumerate(GRID)):
        sequence = int(a + 1) * len(GRID) + i
        rows += [(sequence, a, math.log(r), math.log(m)) for r in GRID]
    for sequence in range(15, 21):
        a = rng.gauss(0, 1)
        # Small moves, so that sequence-level regions and second moments keep something.
        rows += [(sequence, a, rng.gauss(0, 0.1), rng.gauss(0, 0.1)) for _ in range(7)]
    rows.append((21, 1.0, 0.1, -0.1))
    # exp(-3) = 0.05: mu reaches 0.5 and pi_theta 0.3 at the ends of the grid, all below 1.
    old = [-3.0 + rng.uniform(-0.01, 0.01) for _ in rows]
    case = Case(
        theta=[o + row[2] for o, row in zip(old, rows, strict=True)],
        old=old,
        # A relative jitter of 1e-6: M2PO ranks tokens by |log m|, and ties have no defined order.
        mu=[o - row[3] * rng.uniform(1, 1 + 1e-6) for o, row in zip(old, rows, strict=True)],
        advantage=[row[1] for row in rows],
        mask=[n % 11 != 3 for n in range(len(rows))],
        sequence=[row[0] for row in rows],
        num_sequences=23,
    )
    # Three likely tokens; every other time one of them is the sampled token itself.
    n = range(len(rows))
    case.extra = {
        "shift": [rng.uniform(0.5, 1.0) for _ in n],
        "uniform": [rng.random() for _ in n],
        "sampled": [7 for _ in n],
        "ids": [[1, 2, 7 if t % 2 else 3] for t in n],
        "topk_mu": [[math.log(0.1), math.log(0.2), case.mu[t] if t % 2 else -3.0] for t in n],
        "topk_theta": [
            [math.log(0.12), math.log(0.1), case.theta[t] if t % 2 else -2.5] for t in n
        ],
    }
    return case


def inputs_of(case: Case, dtype=torch.float64, **changes) -> LossInputs:
    def tensor(values):
        return torch.tensor(values, dtype=dtype)

    given = {
        "logp_theta_T": tensor(case.theta).requires_grad_(),
        "logp_old_T": tensor(case.old),
        "logp_mu_T": tensor(case.mu),
        "advantages_T": tensor(case.advantage),
        "mask_T": torch.tensor(case.mask, dtype=torch.bool),
        "sequence_T": torch.tensor(case.sequence, dtype=torch.int64),
        "num_sequences": case.num_sequences,
        "denominators": Denominators(
            num_sequences=case.num_sequences,
            num_tokens=sum(case.mask),
            max_length=case.max_length,
        ),
        "router_shift_T": tensor(case.extra["shift"]),
        "uniform_T": tensor(case.extra["uniform"]),
        "sampled_ids_T": torch.tensor(case.extra["sampled"], dtype=torch.int64),
        "topk_ids_TK": torch.tensor(case.extra["ids"], dtype=torch.int64).reshape(-1, 3),
        "topk_logp_mu_TK": tensor(case.extra["topk_mu"]).reshape(-1, 3),
        "topk_logp_theta_TK": tensor(case.extra["topk_theta"]).reshape(-1, 3),
    }
    return LossInputs(**(given | changes))


def simple_case(theta, old, mu, advantage, sequence=None) -> Case:
    n = len(theta)
    case = Case(theta, old, mu, advantage, [True] * n, sequence or [0] * n, 1)
    case.extra = {
        "shift": [1.0] * n,
        "uniform": [0.5] * n,
        "sampled": [7] * n,
        "ids": [[1, 2, 3]] * n,
        "topk_mu": [[-2.0, -3.0, -4.0]] * n,
        "topk_theta": [[-2.0, -3.0, -4.0]] * n,
    }
    return case


def gradient_of(name, inputs, **parameters):
    outputs = objectives.get(name, **parameters)(inputs)
    outputs.loss.backward()
    return -inputs.logp_theta_T.grad, outputs


def scale(aggregation, case, t, horizon=None):
    if aggregation == "token-mean":
        return 1 / len(case.counted())
    if aggregation == "seq-mean-token-sum":
        return 1 / case.num_sequences
    if aggregation == "seq-mean-token-mean":
        return 1 / case.num_sequences / len(case.members(t))
    assert aggregation == "seq-mean-token-sum-norm"
    return 1 / case.num_sequences / (horizon or case.max_length)


def gradient(name, p, case):
    """List over tokens; 0 outside the mask."""
    return [
        WEIGHTS[name](case, p, t) * scale(p.aggregation, case, t, p.horizon)
        if case.mask[t]
        else 0.0
        for t in range(len(case.theta))
    ]


def sign(x):
    return (x > 0) - (x < 0)


def inside(advantage, ratio, low, high):
    if advantage > 0 and high is not None and ratio > 1 + high:
        return 0.0
    if advantage < 0 and low is not None and ratio < 1 - low:
        return 0.0
    return 1.0


def binary_kl(p, q):
    return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))


def onward(case, t):
    return case.advantage[t] * (case.w(t) - 1) > 0


def _minirl(weight, masked=True):
    def of(case, p, t):
        mask = inside(case.advantage[t], case.r(t), p.eps_low, p.eps_high) if masked else 1.0
        return mask * weight(case, p, t) * case.advantage[t]

    return of


def _clip(case, p, t):
    return inside(case.advantage[t], case.r(t), p.eps_low, p.eps_high) * case.r(t)


def _ppo(case, p, t):
    a = case.advantage[t]
    if p.dual_clip is not None and a < 0 and case.r(t) > p.dual_clip:
        return 0.0
    return _clip(case, p, t) * a


def _cispo(case, p, t):
    weight = min(case.r(t), 1 + p.eps_high)
    if p.eps_low is not None:
        weight = max(weight, 1 - p.eps_low)
    return weight * case.advantage[t]


def _sapo(case, p, t):
    tau = p.tau_positive if case.advantage[t] > 0 else p.tau_negative
    s = 1 / (1 + math.exp(-tau * (case.r(t) - 1)))
    return 4 * s * (1 - s) * case.r(t) * case.advantage[t]


def _sequence_is(case, p, t):
    members = case.members(t)
    product = math.prod(case.w(u) for u in members)
    if p.cap is not None and product > p.cap:
        return 0.0
    # One weight for the sequence: the derivative is not shared among the tokens as a mean's is.
    return product * case.advantage[t] * len(members)


def _gspo(case, p, t):
    members = case.members(t)
    ratio = math.prod(case.r(u) for u in members) ** (1 / len(members))
    return inside(case.advantage[t], ratio, p.eps_low, p.eps_high) * ratio * case.advantage[t]


def _geometric(log_ratio):
    def of(case, p, t):
        a = sign(case.advantage[t])
        total = 0.0
        for u in case.members(t):
            log_r = log_ratio(case, p, u)
            bounded = max(-p.log_low, min(p.log_high, log_r))
            total += a * min(a * log_r, a * bounded)
        ratio = math.exp(total / len(case.members(t)))
        own = log_ratio(case, p, t)
        if (a > 0 and own > p.log_high) or (a < 0 and own < -p.log_low):
            return 0.0
        return ratio * case.advantage[t]

    return of


def _log_r(case, p, t):
    return case.theta[t] - case.old[t]


def _shifted(case, p, t):
    return _log_r(case, p, t) + math.log(max(case.extra["shift"][t], p.shift_min))


def _dppo_tv(case, p, t):
    rise = math.exp(case.theta[t]) - math.exp(case.mu[t])
    a = case.advantage[t]
    if (a > 0 and rise > p.delta_high) or (a < 0 and rise < -p.delta_low):
        return 0.0
    return min(case.w(t), p.cap) * a


def _dppo_kl(case, p, t):
    far = binary_kl(math.exp(case.mu[t]), math.exp(case.theta[t])) > p.delta
    return 0.0 if far and onward(case, t) else min(case.w(t), p.cap) * case.advantage[t]


def _dppo_topk(case, p, t):
    mu = dict(zip(case.extra["ids"][t], case.extra["topk_mu"][t], strict=True))
    theta = dict(zip(case.extra["ids"][t], case.extra["topk_theta"][t], strict=True))
    if case.extra["sampled"][t] not in mu:
        mu["own"], theta["own"] = case.mu[t], case.theta[t]
    pairs = [(math.exp(mu[v]), math.exp(theta[v])) for v in mu]
    pairs.append((1 - sum(x for x, _ in pairs), 1 - sum(y for _, y in pairs)))
    if p.divergence == "tv":
        divergence = sum(abs(x - y) for x, y in pairs) / 2
    else:
        divergence = sum(x * math.log(x / y) for x, y in pairs)
    if divergence > p.delta and onward(case, t):
        return 0.0
    return min(case.w(t), p.cap) * case.advantage[t]


def _drpo(case, p, t):
    a = case.advantage[t]
    rise = math.exp(case.theta[t]) - math.exp(case.mu[t])
    return case.w(t) * (1 - sign(a * (case.w(t) - 1)) * abs(rise) / p.delta) * a


def _icepop(case, p, t):
    m = case.m(t)
    return (m if p.m_low <= m <= p.m_high else 0.0) * _clip(case, p, t) * case.advantage[t]


def _kpop(case, p, t):
    old, mu = math.exp(case.old[t]), math.exp(case.mu[t])
    kept = binary_kl(old, mu) <= p.phi and binary_kl(mu, old) <= p.phi
    weight = case.m(t) if p.weighted else 1.0
    return (weight if kept else 0.0) * _clip(case, p, t) * case.advantage[t]


def second_moment_kept(case, threshold):
    """Drop the largest square, one at a time, until the mean of the rest is below the threshold."""
    left = {t: (case.mu[t] - case.old[t]) ** 2 for t in case.counted()}
    while left and sum(left.values()) / len(left) >= threshold:
        del left[max(left, key=left.get)]
    return set(left)


def _m2po(case, p, t):
    kept = t in second_moment_kept(case, p.threshold)
    return case.r(t) * case.advantage[t] if kept else 0.0


def covariance(case):
    counted = case.counted()
    mean_logp = sum(case.theta[t] for t in counted) / len(counted)
    mean_advantage = sum(case.advantage[t] for t in counted) / len(counted)
    return {t: (case.theta[t] - mean_logp) * (case.advantage[t] - mean_advantage) for t in counted}


def _clip_cov(case, p, t):
    eligible = [
        u
        for u, c in covariance(case).items()
        if p.cov_low < c < p.cov_high
        and inside(case.advantage[u], case.r(u), p.eps_low, p.eps_high)
    ]
    chance = p.fraction * len(case.counted()) / max(len(eligible), 1)
    if t in eligible and case.extra["uniform"][t] < chance:
        return 0.0
    return _clip(case, p, t) * case.advantage[t]


def _kl_cov(case, p, t):
    ranked = sorted(case.counted(), key=covariance(case).get, reverse=True)
    highest = ranked[: max(1, int(p.fraction * len(ranked)))]
    penalty = p.beta * sign(_log_r(case, p, t)) if t in highest else 0.0
    return case.r(t) * case.advantage[t] - penalty


def _times(factor, weight):
    return lambda case, p, t: factor(case, p, t) * weight(case, p, t) * case.advantage[t]


def _capped_m(case, p, t):
    return case.m(t) if p.cap is None else min(case.m(t), p.cap)


WEIGHTS = {
    "minirl": _minirl(lambda case, p, t: min(case.w(t), p.cap)),
    "minirl_decoupled": _minirl(lambda case, p, t: min(case.m(t), p.cap) * case.r(t)),
    "minirl_length_norm": _minirl(lambda case, p, t: min(case.w(t), p.cap)),
    "minirl_no_is": _minirl(lambda case, p, t: min(case.r(t), p.cap)),
    "minirl_no_clip": _minirl(lambda case, p, t: min(case.w(t), p.cap), masked=False),
    "ppo": _ppo,
    "grpo": lambda case, p, t: _clip(case, p, t) * case.advantage[t],
    "dr_grpo": lambda case, p, t: _clip(case, p, t) * case.advantage[t],
    "dapo": lambda case, p, t: _clip(case, p, t) * case.advantage[t],
    "decoupled_ppo": _times(_capped_m, _clip),
    "reinforce_is": lambda case, p, t: min(case.w(t), p.cap or math.inf) * case.advantage[t],
    "cispo": _cispo,
    "sapo": _sapo,
    "sequence_is": _sequence_is,
    "gspo": _gspo,
    "gspo_token": _gspo,
    "dr_gspo": _gspo,
    "gmpo": _geometric(_log_r),
    "rspo": _geometric(_shifted),
    "dppo_tv": _dppo_tv,
    "dppo_kl": _dppo_kl,
    "dppo_topk": _dppo_topk,
    "drpo": _drpo,
    "icepop": _icepop,
    "kpop": _kpop,
    "m2po": _m2po,
    "clip_cov": _clip_cov,
    "kl_cov": _kl_cov,
}


def log_softmax(row):
    peak = max(row)
    norm = peak + math.log(sum(math.exp(z - peak) for z in row))
    return [z - norm for z in row]


def entropy(row):
    return -sum(math.exp(z) * z for z in log_softmax(row) if z > -math.inf)
