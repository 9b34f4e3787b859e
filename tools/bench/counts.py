"""Seconds that counting tokens per sequence, layer and expert adds to the building of a table.

    python -m tools.bench.counts --tokens 65_536 --lengths 128 2048 16_384

builds a table of routes (48 layers, top-8 of 128 experts) with and without its counts, in turns,
and prints the difference for a million tokens, of the compiled loop and of numpy; beside it the
decoding of the same payloads.
"""

from __future__ import annotations

from collections.abc import Sequence
from unittest import mock

import numpy as np

from routing_replay.routes import columns, counts, payload
from routing_replay.routes.routes import Routes
from routing_replay.routes.table import RouteTable

from .paired import finish, parse, parser, spread, take_turns, timed

LAYERS, EXPERTS, TOP_K = 48, 128, 8
QUICK = {"tokens": 512, "lengths": [64], "rounds": 2}


def random_routes(num_rows: int, seed: int) -> Routes:
    """Return random distinct experts of each row and layer."""
    generator = np.random.default_rng(seed)
    stride = EXPERTS // TOP_K  # each slot draws from its own range of experts
    ids_TLK = generator.integers(0, stride, (num_rows, LAYERS, TOP_K), np.uint8)
    ids_TLK += np.arange(TOP_K, dtype=np.uint8) * np.uint8(stride)
    return Routes(expert_ids_TLK=ids_TLK, layers=tuple(range(LAYERS)), num_experts=EXPERTS)


def measure(num_tokens: int, length: int, rounds: int) -> dict[str, object]:
    """Return seconds for a million tokens: counting, building with counts, decoding."""
    sequences = [random_routes(length, seed) for seed in range(max(1, num_tokens // length))]
    data = [payload.encode(routes) for routes in sequences]
    million = 1e6 / (len(sequences) * length)

    def build() -> RouteTable:
        return RouteTable.from_routes(sequences)

    def build_without() -> RouteTable:
        with mock.patch.object(columns, "count_covered", return_value=0):
            return RouteTable.from_routes(sequences)

    def build_with_numpy() -> RouteTable:
        with mock.patch.object(counts, "_compiled", return_value=None):
            return RouteTable.from_routes(sequences)

    variants = {
        "with": timed(build),
        "numpy": timed(build_with_numpy),
        "without": timed(build_without),
        "decode": timed(lambda: [payload.decode_compact(one) for one in data]),
    }
    times = take_turns(variants, rounds)

    def added(name: str) -> list[float]:
        pairs = zip(times[name], times["without"], strict=True)
        return [million * (with_counts - without) for with_counts, without in pairs]

    return {
        "counting": spread(added("with")),
        "counting with numpy": spread(added("numpy")),
        "building": spread([million * seconds for seconds in times["with"]]),
        "decoding": spread([million * seconds for seconds in times["decode"]]),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    made = parser(__doc__)
    made.add_argument("--tokens", type=int, default=65_536, help="rows of a table")
    made.add_argument("--lengths", type=int, nargs="+", default=[128, 2048, 16_384])
    made.add_argument("--rounds", type=int, default=5)
    arguments = parse(made, argv, QUICK)
    figures = {}
    print("seconds for a million tokens: median [quartiles]")
    for length in arguments.lengths:
        figures[str(length)] = measure(arguments.tokens, length, arguments.rounds)
        line = ", ".join(f"{name} {value}" for name, value in figures[str(length)].items())
        print(f"{length:6d} rows a sequence: {line}")
    finish("counts", arguments, figures)


if __name__ == "__main__":
    main()
