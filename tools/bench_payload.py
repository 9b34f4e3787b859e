"""Bytes and speed of payloads: stock's int32, ours with ids, ours with gates.

    python -m tools.bench_payload [--rows 32768] [--layers 48] [--experts 128] [--top-k 8]

All kinds take turns, round after round; figures are medians. The last line compares the search for
doubled experts, the dearest check of `Routes`, with its plain form in the same rounds.
"""

import argparse
import base64
import statistics
import time

import numpy as np

from routing_replay.payload import FIELD, decode, encode
from routing_replay.routes import Routes, compact_dtype, has_duplicates

ROUNDS = 9


def random_routes(arguments):
    """Distinct experts drawn from few choices: fast to make, and no easier to check."""
    random = np.random.default_rng(0)
    choices = np.argsort(random.random((4096, arguments.experts)), -1)[:, : arguments.top_k]
    picks_TL = random.integers(0, len(choices), (arguments.rows, arguments.layers))
    ids_TLK = choices.astype(compact_dtype(arguments.experts))[picks_TL]
    return with_gates(ids_TLK, range(arguments.layers), arguments.experts)


def with_gates(ids_TLK, layers, num_experts):
    gates_TLK = np.full(ids_TLK.shape, 1 / ids_TLK.shape[2], np.float16)
    layers = tuple(layers)
    return Routes(
        expert_ids_TLK=ids_TLK, layers=layers, num_experts=num_experts, gate_probs_TLK=gates_TLK
    )


def long_version(routes, num_rows=32768):
    """The same rows again and again, until they are as many as a long rollout's."""
    repeats = -(-num_rows // routes.num_rows)
    ids_TLK = np.tile(routes.expert_ids_TLK, (repeats, 1, 1))[:num_rows]
    return with_gates(ids_TLK, routes.layers, routes.num_experts)


def payloads_of(routes):
    """What each kind of server would send, as (bytes, function that makes them)."""
    ids = Routes(
        expert_ids_TLK=routes.expert_ids_TLK, layers=routes.layers, num_experts=routes.num_experts
    )
    wide_TLK = np.zeros((routes.num_rows, routes.layers[-1] + 1, routes.top_k), np.int32)

    def stock():
        wide_TLK[:, list(routes.layers)] = routes.expert_ids_TLK
        return wide_TLK.tobytes()

    return {"stock": stock, "ids": lambda: encode(ids), "gates": lambda: encode(routes)}


def speeds(routes):
    """For each kind: bytes, and GB of ids per second encoded and decoded (base64 included)."""
    kinds, times = payloads_of(routes), {}
    data = {kind: make() for kind, make in kinds.items()}
    texts = {kind: base64.b64encode(data[kind]).decode() for kind in kinds}
    for _ in range(ROUNDS):
        for kind, make in kinds.items():
            meta_info, num_tokens = {FIELD: texts[kind]}, routes.num_rows + 1
            times.setdefault((kind, "encode"), []).append(seconds(make))
            times.setdefault((kind, "decode"), []).append(
                seconds(lambda m=meta_info, n=num_tokens: decode(m, num_tokens=n, model=routes))
            )
    gigabytes = routes.expert_ids_TLK.nbytes / 1e9
    return {
        kind: {
            "bytes": len(data[kind]),
            **{
                way: gigabytes / statistics.median(times[kind, way]) for way in ("encode", "decode")
            },
        }
        for kind in kinds
    }


def seconds(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def plain_duplicates(ids_TLK):
    """The obvious form, over all rows at once."""
    doubled_TL = np.zeros(ids_TLK.shape[:-1], np.bool_)
    for shift in range(1, ids_TLK.shape[-1]):
        doubled_TL |= (ids_TLK[..., shift:] == ids_TLK[..., :-shift]).any(-1)
    return doubled_TL


def main():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=32768)
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--top-k", type=int, default=8)
    routes = random_routes(parser.parse_args())
    found = speeds(routes)
    print("| payload | bytes | of stock's | encode GB/s | decode GB/s |")
    print("| --- | --- | --- | --- | --- |")
    for kind, values in found.items():
        share = values["bytes"] / found["stock"]["bytes"]
        row = f"| {kind} | {values['bytes']} | {share:.4f} "
        print(row + f"| {values['encode']:.2f} | {values['decode']:.2f} |")
    ids_TLK, ratios = routes.expert_ids_TLK, []
    for _ in range(ROUNDS):
        plain_s = seconds(lambda: plain_duplicates(ids_TLK))
        ratios.append(plain_s / seconds(lambda: has_duplicates(ids_TLK)))
    low, middle, high = statistics.quantiles(ratios, n=4)
    print(f"doubled experts: {middle:.1f}x ({low:.1f} to {high:.1f}) the speed of the plain form")


if __name__ == "__main__":
    main()
