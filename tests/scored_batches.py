"""Batches with scored arms whose gaps are known, without an engine."""

import numpy as np
import torch
from safetensors.torch import save_file

from routing_replay.analysis.arms import ScoredArms, Scores
from routing_replay.routes.routes import Routes
from routing_replay.routes.table import RouteTable

SEQUENCES, TOKENS, LAYERS = 48, 16, (0, 1, 2, 3)
# k3 of a gap whose log-probs differ by normal noise of this size is half its square: 1.1e-5 here.
HEALTHY = 4.7e-3
# Gap of each arm: 0.05 gives a k3 of 1.25e-3.
PLANTED = 0.05


def write_batch(folder, seed=0):
    """A batch of random log-probs and routes; every label was sampled."""
    generator = torch.Generator().manual_seed(seed)
    shape = (SEQUENCES * TOKENS,)
    columns = {
        "input_ids_N": torch.randint(0, 9, shape, generator=generator),
        "labels_N": torch.randint(0, 9, shape, generator=generator),
        "mask_N": torch.ones(shape, dtype=torch.bool),
        "logp_mu_N": -torch.rand(shape, generator=generator),
        "lengths_S": torch.full((SEQUENCES,), TOKENS + 1),
    }
    save_file(columns, folder / "batch.safetensors")
    table_of(seed).save(folder / "routes.safetensors")
    return columns["logp_mu_N"]


def table_of(seed, num_changed=0):
    """Routes of the batch; the first `num_changed` rows of layer 2 take other experts."""
    scores = np.random.default_rng(seed).random((SEQUENCES * TOKENS, len(LAYERS), 8))
    ids = scores.argsort(-1)[..., :2].astype(np.uint8)
    ids[:num_changed, 2] = (ids[:num_changed, 2] + 1) % 8
    sequences = [
        Routes(expert_ids_TLK=part, layers=LAYERS, num_experts=8)
        for part in np.split(ids, SEQUENCES)
    ]
    return RouteTable.from_routes(sequences)


def scored(folder, gaps, seed=0, excess=0.0):
    """Arms with the given gaps to mu: the standard deviation of log pi - log mu.

    The difference of one arm to the next is what the factor adds; all arms share one noise, as a
    smaller gap is part of the larger one.
    """
    mu_N = write_batch(folder, seed)
    generator = torch.Generator().manual_seed(seed + 100)
    noise_N = torch.randn(mu_N.shape, generator=generator)
    # Normal noise has E[exp(x)] = exp(s^2 / 2): mu could sample every token.
    arms = ScoredArms(folder, {"checkpoint": "a"})
    for name, gap in gaps.items():
        logp_N = mu_N + gap * noise_N - gap**2 / 2
        surprise_N = torch.randn(mu_N.shape, generator=generator) * 0.05
        entropy_N = -logp_N + excess + surprise_N
        arms.add(name, Scores(logp_N=logp_N, entropy_N=entropy_N))
    return arms
