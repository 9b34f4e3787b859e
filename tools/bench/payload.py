"""Bytes and speed of payloads: stock's int32, ours with ids, with combine weights, with gates.

    python -m tools.bench.payload [--rows 32768] [--layers 48] [--experts 128] [--top-k 8]

All kinds take turns; figures are medians. Below the table: what a server does when a request
finishes (its rows gathered from 8192 of its slots, and encoded) as a ratio to stock's gathering,
and the search for doubled experts, the most expensive check of `Routes`, against its plain form.
"""

from __future__ import annotations

import argparse
import base64
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from routing_replay.capture import REQUEST_KEY
from routing_replay.routes.origin import Origin
from routing_replay.routes.payload import FIELD, decode, encode
from routing_replay.routes.routes import Routes, compact_dtype, has_duplicates
from routing_replay.sglang.rows import collect
from routing_replay.sglang.slots import SlotRows

from .paired import finish, parse, parser, ratios, spread, take_turns, timed

Figures = dict[str, dict[str, float]]
LEVELS = ("ids", "weights", "gates")
# Rounds of every comparison.
ROUNDS = 15


def random_routes(arguments: argparse.Namespace) -> Routes:
    """Return distinct experts drawn from few choices: fast to make, and no easier to check."""
    random = np.random.default_rng(0)
    choices = np.argsort(random.random((4096, arguments.experts)), -1)[:, : arguments.top_k]
    picks_TL = random.integers(0, len(choices), (arguments.rows, arguments.layers))
    ids_TLK = choices.astype(compact_dtype(arguments.experts))[picks_TL]
    return with_values(ids_TLK, range(arguments.layers), arguments.experts)


def with_values(ids_TLK: np.ndarray, layers: Iterable[int], num_experts: int) -> Routes:
    """Return routes whose gates and weights are all equal."""
    equal = 1 / ids_TLK.shape[2]
    return Routes(
        expert_ids_TLK=ids_TLK,
        layers=tuple(layers),
        num_experts=num_experts,
        combine_weights_TLK=np.full(ids_TLK.shape, equal, np.float32),
        gate_probs_TLK=np.full(ids_TLK.shape, equal, np.float16),
    )


def long_version(routes: Routes, num_rows: int = 32768) -> Routes:
    """Return the same rows, repeated to the length of a long rollout."""
    repeats = -(-num_rows // routes.num_rows)
    ids_TLK = np.tile(routes.expert_ids_TLK, (repeats, 1, 1))[:num_rows]
    return with_values(ids_TLK, routes.layers, routes.num_experts)


def payloads_of(routes: Routes) -> dict[str, Callable[[], bytes]]:
    """Return the function that makes each kind of server's bytes."""
    weights = replace(routes, gate_probs_TLK=None)
    gates, ids = (
        replace(routes, combine_weights_TLK=None),
        replace(weights, combine_weights_TLK=None),
    )
    wide_TLK = np.zeros((routes.num_rows, routes.layers[-1] + 1, routes.top_k), np.int32)

    def stock() -> bytes:
        wide_TLK[:, list(routes.layers)] = routes.expert_ids_TLK
        return wide_TLK.tobytes()

    ours = {"ids": ids, "weights": weights, "gates": gates}
    return {"stock": stock} | {kind: partial(encode, r) for kind, r in ours.items()}


def speeds(routes: Routes, rounds: int = ROUNDS) -> Figures:
    """Return bytes, and GB of ids per second encoded and decoded, of each kind."""
    kinds = payloads_of(routes)
    data = {kind: make() for kind, make in kinds.items()}

    def decoder(kind: str) -> Callable[[], object]:
        meta_info = {FIELD: base64.b64encode(data[kind]).decode()}
        return lambda: decode(meta_info, num_tokens=routes.num_rows + 1, shape=routes.shape)

    encoding = take_turns({kind: timed(make) for kind, make in kinds.items()}, rounds)
    decoding = take_turns({kind: timed(decoder(kind)) for kind in kinds}, rounds)
    gigabytes = routes.expert_ids_TLK.nbytes / 1e9
    return {
        kind: {
            "bytes": len(data[kind]),
            "encode": gigabytes / spread(encoding[kind]).median,
            "decode": gigabytes / spread(decoding[kind]).median,
        }
        for kind in kinds
    }


def collectors(routes: Routes, num_rows: int = 8192) -> dict[str, Callable[[], object]]:
    """Return what stock and our server do for a finished request of so many tokens."""
    ids_TLK, num_rows = routes.expert_ids_TLK[:num_rows], min(num_rows, routes.num_rows)
    assert routes.gate_probs_TLK is not None and routes.combine_weights_TLK is not None
    slots = SlotRows(ids_TLK.shape, routes.num_experts, ("gates", "weights"))
    slots.ids_NLK[:], slots.values["gates"][:] = ids_TLK, routes.gate_probs_TLK[:num_rows]
    slots.values["weights"][:] = routes.combine_weights_TLK[:num_rows]
    slots.stamp_N[:] = slots.stamps.stamp(Origin.DECODE, 0)
    stock_NLK = torch.from_numpy(ids_TLK.astype(np.int32))
    # Slots are as scattered as a radix tree leaves them.
    order = torch.from_numpy(np.random.default_rng(0).permutation(num_rows)).int()
    pool = SimpleNamespace(req_to_token=order[None])
    capturer: Any = SimpleNamespace(
        slots=slots,
        layers=set(range(ids_TLK.shape[1])),
        num_experts=routes.num_experts,
        sampler=None,
    )

    def ours(level: str) -> Callable[[], object]:
        req = finished(num_rows, level)
        return lambda: collect(capturer, req, pool)

    def stock() -> torch.Tensor:
        return stock_NLK[pool.req_to_token[0, : num_rows - 1].cpu().clone()]

    return {"stock": stock} | {level: ours(level) for level in LEVELS}


def finished(num_tokens: int, level: str) -> SimpleNamespace:
    """Return the fields of a request that `collect` reads, by the names of all versions."""
    return SimpleNamespace(
        origin_input_ids=list(range(num_tokens - 1)),
        input_embeds=None,
        output_ids=[0],
        output_ids_through_stop=[0],
        req_pool_idx=0,
        kv=SimpleNamespace(req_pool_idx=0),
        routed_experts_start_len=0,
        sampling_params=SimpleNamespace(custom_params={REQUEST_KEY: level}),
    )


def plain_duplicates(ids_TLK: np.ndarray) -> np.ndarray:
    """Search for doubled experts in the plain form, over all rows at once."""
    doubled_TL = np.zeros(ids_TLK.shape[:-1], np.bool_)
    for shift in range(1, ids_TLK.shape[-1]):
        doubled_TL |= (ids_TLK[..., shift:] == ids_TLK[..., :-shift]).any(-1)
    return doubled_TL


def main(argv: Sequence[str] | None = None) -> None:
    """Print the payloads' table and the two ratios below it."""
    made = parser(__doc__)
    made.add_argument("--rows", type=int, default=32768)
    made.add_argument("--layers", type=int, default=48)
    made.add_argument("--experts", type=int, default=128)
    made.add_argument("--top-k", type=int, default=8)
    made.add_argument("--rounds", type=int, default=ROUNDS)
    arguments = parse(made, argv, {"rows": 64, "layers": 2, "rounds": 1})
    routes = random_routes(arguments)
    figures: dict[str, Any] = {"payloads": speeds(routes, arguments.rounds)}
    print("| payload | bytes | of stock's | encode GB/s | decode GB/s |")
    print("| --- | --- | --- | --- | --- |")
    for kind, values in figures["payloads"].items():
        share = values["bytes"] / figures["payloads"]["stock"]["bytes"]
        row = f"| {kind} | {values['bytes']} | {share:.4f} "
        print(row + f"| {values['encode']:.2f} | {values['decode']:.2f} |")
    collecting = {name: timed(call) for name, call in collectors(routes).items()}
    figures["collection"] = ratios(take_turns(collecting, arguments.rounds), "stock")
    for kind in LEVELS:
        print(f"collection of {kind}: {figures['collection'][kind]} of the time of stock's")
    ids_TLK = routes.expert_ids_TLK
    searches = {
        "plain": timed(lambda: plain_duplicates(ids_TLK)),
        "ours": timed(lambda: has_duplicates(ids_TLK)),
    }
    figures["search"] = ratios(take_turns(searches, arguments.rounds), "plain")
    print(f"search for doubled experts: {figures['search']['ours']} of the plain form's")
    finish("payload", arguments, figures)


if __name__ == "__main__":
    main()
