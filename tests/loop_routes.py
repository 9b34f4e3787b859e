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


def own_routes(*ranks) -> list[Routes]:
    """What the decoder's routers chose for each sample; the ranks share every sample."""
    layers = sorted(layer for layer in ranks[0]["maps"] if layer != "mtp")
    routes = []
    for microbatch, batch in enumerate(ranks[0]["tokens"]):
        ids_BTLK = np.empty((len(batch), LENGTH, len(layers), TOP_K), np.uint8)
        for rank in ranks:
            for index, layer in enumerate(layers):
                maps_BSE = dispatched(rank, layer, microbatch, len(batch))
                ids = np.nonzero(maps_BSE)[-1].reshape(len(batch), -1, TOP_K)
                ids_BTLK[:, rank["positions"].numpy(), index] = ids
        routes += [routes_of(ids_TLK, layers) for ids_TLK in ids_BTLK]
    return routes


def routes_of(ids_TLK, layers=range(LAYERS)) -> Routes:
    ids_TLK = np.ascontiguousarray(ids_TLK.astype(np.uint8))
    return Routes(expert_ids_TLK=ids_TLK, layers=tuple(layers), num_experts=EXPERTS)


def random_routes(number: int, layers=range(LAYERS)) -> list[Routes]:
    scores = np.random.default_rng(3).random((number, LENGTH, len(layers), EXPERTS))
    return [routes_of(np.argsort(s, -1)[..., :TOP_K], layers) for s in scores]


def save(path: Path, routes, samples) -> str:
    # A fed token is one that has a successor: the tokens of a sequence are one more.
    tokens = [np.append(sample, 0) for sample in samples]
    RouteTable.from_routes(routes).with_tokens(tokens).save(path)
    return str(path)


def check_dispatch(witness, samples, routes, batches=None) -> int:
    """Compare every call of a decoder's router with the routes of its tokens; return the rows.

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
        if layer == "mtp":
            continue
        assert len(calls) == len(batches)
        for microbatch, batch in enumerate(batches):
            maps_BSE = dispatched(witness, layer, microbatch, len(batch))
            for map_SE, tokens in zip(maps_BSE, batch, strict=True):
                own = by_tokens.get(tokens.numpy().tobytes())
                if own is None:
                    continue
                ids_SK = own.expert_ids_TLK[positions, own.layers.index(layer)].astype(int)
                expected_SE = np.zeros_like(map_SE)
                np.put_along_axis(expected_SE, ids_SK, True, 1)
                assert (map_SE == expected_SE).all()
                rows += len(positions)
    return rows
