"""Bytes and speed of payloads: stock's int32, ours with ids, ours with gates.

    python -m tools.bench.payload [--rows 32768] [--layers 48] [--experts 128] [--top-k 8]

All kinds take turns, round after round; figures are medians. Below the table: what a server does
when a request finishes (its rows gathered from 8192 of its slots, and encoded) as a ratio to
stock's gathering, and the search for doubled experts, the dearest check of `Routes`, against its
plain form.
"""

import argparse
import base64
import statistics
import time
from types import SimpleNamespace

import numpy as np
import torch

from routing_replay.capture import REQUEST_KEY
from routing_replay.routes.payload import FIELD, decode, encode
from routing_replay.routes.routes import Origin, Routes, compact_dtype, has_duplicates
from routing_replay.sglang.rows import collect
from routing_replay.sglang.slots import SlotRows

ROUNDS = 15


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
                seconds(
                    lambda m=meta_info, n=num_tokens: decode(m, num_tokens=n, shape=routes.shape)
                )
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


def collectors(routes, num_rows=8192):
    """What stock and our server do for a finished request of so many tokens."""
    ids_TLK, num_rows = routes.expert_ids_TLK[:num_rows], min(num_rows, routes.num_rows)
    slots = SlotRows(ids_TLK.shape, routes.num_experts, has_gates=True)
    slots.ids_NLK[:], slots.gates_NLK[:] = ids_TLK, routes.gate_probs_TLK[:num_rows]
    slots.stamp_N[:] = slots.stamps.stamp(Origin.DECODE, 0)
    stock_NLK = torch.from_numpy(ids_TLK.astype(np.int32))
    # Slots are as scattered as a radix tree leaves them.
    order = torch.from_numpy(np.random.default_rng(0).permutation(num_rows)).int()
    pool = SimpleNamespace(req_to_token=order[None])
    capturer = SimpleNamespace(
        slots=slots,
        layers=set(range(ids_TLK.shape[1])),
        num_experts=routes.num_experts,
        sampler=None,
    )

    def ours(level):
        return lambda: collect(capturer, finished(num_rows, level), pool)

    def stock():
        return stock_NLK[pool.req_to_token[0, : num_rows - 1].cpu().clone()]

    return {"stock": stock, "ids": ours("ids"), "gates": ours("gates")}


def finished(num_tokens, level):
    """The fields of SGLang's request that `collect` reads, under the names of all versions."""
    return SimpleNamespace(
        origin_input_ids=[0] * (num_tokens - 1),
        output_ids=[0],
        output_ids_through_stop=[0],
        req_pool_idx=0,
        kv=SimpleNamespace(req_pool_idx=0),
        routed_experts_start_len=0,
        sampling_params=SimpleNamespace(custom_params={REQUEST_KEY: level}),
    )


def ratios_of(calls, reference):
    """Time of each call as a ratio to the reference's, in the same round."""
    times = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            times[name].append(seconds(call))
    return {
        name: quartiles([a / b for a, b in zip(values, times[reference], strict=True)])
        for name, values in times.items()
        if name != reference
    }


def quartiles(ratios):
    low, middle, high = statistics.quantiles(ratios, n=4)
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


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
    for kind, ratio in ratios_of(collectors(routes), "stock").items():
        print(f"collection of {kind}: {ratio} of the time of stock's")
    ids_TLK = routes.expert_ids_TLK
    searches = {"plain": plain_duplicates, "ours": has_duplicates}
    calls = {name: (lambda search=search: search(ids_TLK)) for name, search in searches.items()}
    print(f"search for doubled experts: {ratios_of(calls, 'plain')['ours']} of the plain form's")


if __name__ == "__main__":
    main()
