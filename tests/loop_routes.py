"""Routes for a loop's samples, and the comparison of what it dispatched with them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from routing_replay.routes.routes import Routes
from routing_replay.routes.table import RouteTable

LAYERS, EXPERTS, TOP_K, LENGTH, MICRO = 4, 8, 2, 32, 2


def samples_of(witness) -> list[np.ndarray]:
    return [tokens.numpy() for batch in witness["tokens"] for tokens in batch]


def dispatched(witness, layer: int, microbatch: int, batch_size: int) -> np.ndarray:
    """bool [b, s, E] of one router call; Megatron's order is sequence-major."""
    map_TE = witness["maps"][layer][microbatch]
    return map_TE.reshape(-1, batch_size, EXPERTS).transpose(0, 1).numpy()


def own_routes(witness) -> list[Routes]:
    """What the routers of a job on one rank chose for each sample."""
    routes = []
    for microbatch, batch in enumerate(witness["tokens"]):
        maps = [dispatched(witness, layer, microbatch, len(batch)) for layer in range(LAYERS)]
        for row in range(len(batch)):
            ids = [np.nonzero(m[row])[1].reshape(LENGTH, TOP_K) for m in maps]
            routes.append(routes_of(np.stack(ids, 1)))
    return routes


def routes_of(ids_TLK) -> Routes:
    ids_TLK = np.ascontiguousarray(ids_TLK.astype(np.uint8))
    return Routes(expert_ids_TLK=ids_TLK, layers=tuple(range(LAYERS)), num_experts=EXPERTS)


def random_routes(number: int) -> list[Routes]:
    scores = np.random.default_rng(3).random((number, LENGTH, LAYERS, EXPERTS))
    return [routes_of(np.argsort(s, -1)[..., :TOP_K]) for s in scores]


def save(path: Path, routes, samples) -> str:
    # A fed token is one that has a successor: the tokens of a sequence are one more.
    tokens = [np.append(sample, 0) for sample in samples]
    RouteTable.from_routes(routes).with_tokens(tokens).save(path)
    return str(path)


def check_dispatch(witness, samples, routes, batches=None) -> int:
    """Compare every router call with the routes of its tokens; return the rows compared.

    Args:
        witness: A rank's.
        samples: Tokens of the samples that have routes.
        routes: Of these samples.
        batches: The rank's microbatches of whole samples, where it sees none itself.
    """
    by_tokens = {s.tobytes(): r for s, r in zip(samples, routes, strict=True)}
    batches, positions = batches or witness["tokens"], witness["positions"].numpy()
    rows = 0
    for layer, calls in witness["maps"].items():
        assert len(calls) == len(batches)
        for microbatch, batch in enumerate(batches):
            maps_BSE = dispatched(witness, layer, microbatch, len(batch))
            for map_SE, tokens in zip(maps_BSE, batch, strict=True):
                own = by_tokens.get(tokens.numpy().tobytes())
                if own is None:
                    continue
                ids_SK = own.expert_ids_TLK[positions, layer].astype(int)
                expected_SE = np.zeros_like(map_SE)
                np.put_along_axis(expected_SE, ids_SK, True, 1)
                assert (map_SE == expected_SE).all()
                rows += len(positions)
    return rows
