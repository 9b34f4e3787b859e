"""Processor time of the rollout client: for each request, and for each token with its routes.

    python -m tools.bench.client [--requests 4096] [--servers 32] [--prompt 512] [--layers 94]

The servers are stand-ins in a process of their own, so that only the client's time is counted. They
hold every request of a batch until all have come, as a batch of long responses does. Each row is a
process of its own: batches without routes tell what a request costs, few long answers what a token
costs, at each capture level. Time is processor time of all threads, which other work on the machine
disturbs less than the clock.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from routing_replay.rollout import ClientOptions, Completion, GenerateRequest, RolloutClient
from routing_replay.rollout.requests import answer_of
from routing_replay.routes.routes import Routes, compact_dtype

from .paired import finish, parse, parser, run_apart

MICRO = 1e-6
WARM_UP_REQUESTS = 16
LENGTH = re.compile(rb"content-length: (\d+)")
LEVELS = ("off", "ids", "gates")


def random_routes(arguments: argparse.Namespace) -> Routes:
    """Return an answer's routes: distinct experts, and gates at the capture level of that name."""
    shape_TLK = (arguments.prompt + arguments.tokens - 1, arguments.layers, arguments.top_k)
    stride = arguments.experts // arguments.top_k
    first_TL1 = np.random.default_rng(0).integers(0, stride, (*shape_TLK[:2], 1))
    ids_TLK = (first_TL1 + np.arange(arguments.top_k) * stride).astype(
        compact_dtype(arguments.experts)
    )
    has_gates = arguments.capture == "gates"
    return Routes(
        expert_ids_TLK=ids_TLK,
        layers=tuple(range(arguments.layers)),
        num_experts=arguments.experts,
        gate_probs_TLK=np.full(shape_TLK, 1 / (2 * arguments.top_k), np.float16)
        if has_gates
        else None,
    )


def answer_bytes(arguments: argparse.Namespace) -> bytes:
    """Return the JSON of an answer of `tokens` tokens at a capture level."""
    num_tokens = arguments.tokens
    routes = None
    if arguments.capture != "off":
        routes = random_routes(arguments)
    completion = Completion(
        output_ids=list(range(1000, 1000 + num_tokens)),
        # Log-probs as a server writes them: floats with all their digits.
        mu_logprobs=-np.random.default_rng(0).random(num_tokens, np.float32),
        routes=routes,
        finish_reason="length",
        weight_version="0",
        cached_tokens=0,
        num_retractions=0,
    )
    return json.dumps(answer_of(completion, 0)).encode()


async def serve(arguments: argparse.Namespace) -> None:
    """Answer on one port for each server; print the ports, and end with the standard input."""
    content = answer_bytes(arguments)
    reply = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(content) + content
    control = b'HTTP/1.1 200 OK\r\nContent-Length: 17\r\n\r\n{"success": true}'
    arrived, everyone = 0, asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal arrived, everyone
        while line := await reader.readline():
            length = LENGTH.search((await reader.readuntil(b"\r\n\r\n")).lower())
            await reader.readexactly(int(length.group(1)) if length else 0)
            if b"/generate" in line:
                batch, arrived = everyone, arrived + 1
                if arrived == WARM_UP_REQUESTS or arrived == WARM_UP_REQUESTS + arguments.requests:
                    everyone.set()
                    everyone = asyncio.Event()
                await batch.wait()
                writer.write(reply)
            else:
                writer.write(control)
            await writer.drain()

    backlog = arguments.requests
    servers = [
        await asyncio.start_server(answer, "127.0.0.1", 0, backlog=backlog)
        for _ in range(arguments.servers)
    ]
    ports = [server.sockets[0].getsockname()[1] for server in servers]
    print(json.dumps({"ports": ports, "bytes": len(content)}), flush=True)
    await asyncio.to_thread(sys.stdin.read)


@contextlib.contextmanager
def stand_ins(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Run the servers in a process of their own; yield their ports and the bytes of an answer."""
    command = [sys.executable, "-m", "tools.bench.client", "--serve", *flags(vars(arguments))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as it:
        assert it.stdin is not None and it.stdout is not None
        try:
            yield json.loads(it.stdout.readline())
        finally:
            it.stdin.close()


def measure(arguments: argparse.Namespace) -> dict[str, float]:
    """Return the client's processor seconds for a batch, after a small one that warms up."""
    with stand_ins(arguments) as servers:
        urls = [f"http://127.0.0.1:{port}" for port in servers["ports"]]
        most = max(arguments.requests, WARM_UP_REQUESTS)
        options = ClientOptions(max_in_flight=most, health_every_s=3600)
        client = RolloutClient(urls, options=options)
        prompt = list(range(arguments.prompt))
        requests = [GenerateRequest(input_ids=prompt, capture=arguments.capture)]
        client.generate(requests * WARM_UP_REQUESTS)
        before, started = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
        client.generate(requests * arguments.requests)
        seconds = time.perf_counter() - started
        after = resource.getrusage(resource.RUSAGE_SELF)
    user, system = after.ru_utime - before.ru_utime, after.ru_stime - before.ru_stime
    return {
        "requests": arguments.requests,
        "tokens": arguments.tokens,
        "answer_bytes": servers["bytes"],
        "processor_s": user + system,
        "system_s": system,
        "wall_s": seconds,
        "peak_rss_bytes": after.ru_maxrss * 1024.0,
    }


SIZES = {
    "requests": 4096,
    "servers": 32,
    "prompt": 512,
    "tokens": 1,
    "layers": 94,
    "experts": 128,
    "top-k": 8,
}


def flags(values: Mapping[str, Any]) -> list[str]:
    """Return the flags of one batch."""
    return [f"--{name}={values[name.replace('-', '_')]}" for name in (*SIZES, "capture")]


def raise_descriptor_limit() -> None:
    """Take all file descriptors that the system allows; a connection needs one on each side."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def rows(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Return what is measured: batches without routes, then long answers at each level."""
    empty = [{"requests": n, "tokens": 1, "capture": "off"} for n in arguments.batches]
    long = [
        {"requests": arguments.long_requests, "tokens": arguments.long_tokens, "capture": level}
        for level in arguments.levels
    ]
    return empty + long


def make_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    made = parser(__doc__)
    for name, default in SIZES.items():
        made.add_argument(f"--{name}", type=int, default=default)
    made.add_argument("--capture", default="off", help=argparse.SUPPRESS)
    made.add_argument("--batches", type=int, nargs="*", default=[1024, 4096])
    made.add_argument("--levels", nargs="*", default=LEVELS, choices=LEVELS)
    made.add_argument("--long-requests", type=int, default=48)
    made.add_argument("--long-tokens", type=int, default=8192)
    made.add_argument("--rounds", type=int, default=3)
    made.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    made.add_argument("--measure", action="store_true", help="measure one batch, and print JSON")
    return made


def main(argv: Sequence[str] | None = None) -> None:
    """Measure each batch in a process of its own."""
    quick = {"batches": [], "levels": ["ids"], "long_requests": 4, "long_tokens": 16}
    arguments = parse(make_parser(), argv, quick | {"servers": 2, "rounds": 1, "layers": 2})
    raise_descriptor_limit()
    if arguments.serve:
        asyncio.run(serve(arguments))
        return
    if arguments.measure:
        print(json.dumps(measure(arguments)))
        return
    print(
        "| capture | requests | answer tokens | answer bytes | processor s | of it system ", end=""
    )
    print("| us per request | us per token |\n| --- | --- | --- | --- | --- | --- | --- | --- |")
    figures = []
    for row in rows(arguments):
        command = [__spec__.name, "--measure", *flags(vars(arguments) | row)]
        runs = [run_apart(*command) for _ in range(arguments.rounds)]
        figure = min(runs, key=lambda run: run["processor_s"])
        figure["median_processor_s"] = statistics.median(run["processor_s"] for run in runs)
        figures.append(row | figure)
        each = figure["processor_s"] / row["requests"] / MICRO
        print(
            f"| {row['capture']} | {row['requests']} | {row['tokens']} "
            f"| {figure['answer_bytes']} | {figure['processor_s']:.2f} "
            f"(median {figure['median_processor_s']:.2f}) | {figure['system_s']:.2f} "
            f"| {each:.0f} | {each / row['tokens']:.2f} |",
            flush=True,
        )
    finish("client", arguments, {"batches": figures})


if __name__ == "__main__":
    main()
