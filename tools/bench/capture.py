"""What capture costs: rollouts with capture off, stock's, ours with ids, with
combine weights, with gates.

    python -m tools.bench.capture [--model CHECKPOINT] [--rounds 24] [-- --dtype bfloat16 ...]

Servers of the same checkpoint and options, two of each kind. They take turns in many short rounds,
each in another order, so that noise affects all of them alike. A ratio compares two kinds within
one round; the table holds their medians, the 95 % interval of each median (from order statistics:
no assumption on the noise) and the quartiles. The rows that compare a kind with itself show what
two equal processes differ by: no smaller cost can be seen. Processor time is that of all processes
of a server; on a shared machine it is the steadier of the two.

Without --model a random Qwen3-MoE of about 60 million parameters is made.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import math
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
from tqdm import tqdm

from recipes.model.tiny import tiny_config
from recipes.serving.server import Server, ServerOptions, launch
from routing_replay.rollout import RolloutClient, probe
from routing_replay.rollout.requests import GenerateRequest
from routing_replay.routes.payload import FIELD

from .paired import finish, parse, parser, spread
from .payload import long_version, speeds

Key = tuple[str, int]

CAPTURES = ("off", "stock", "ids", "weights", "gates")
# (a, b): the ratio a / b is what the table shows.
PAIRS = (
    *(("stock", "off"), ("ids", "off"), ("weights", "off"), ("gates", "off")),
    *(("ids", "stock"), ("weights", "stock"), ("gates", "stock")),
)


def make_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    made = parser(__doc__)
    made.add_argument("--model", help="Hugging Face checkpoint of an MoE model")
    made.add_argument("--rounds", type=int, default=24, help="measured rounds")
    made.add_argument("--copies", type=int, default=2, help="servers of each kind")
    made.add_argument("--requests", type=int, default=16, help="requests per round")
    made.add_argument("--prompt-tokens", type=int, default=32)
    made.add_argument("--new-tokens", type=int, default=64)
    made.add_argument("--vocabulary", type=int, default=512, help="prompts draw ids below it")
    made.add_argument("--threads", type=int, default=1, help="OMP threads of a server on a CPU")
    made.add_argument("server", nargs="*", help="further arguments of the servers, after --")
    return made


def write_model(folder: str) -> str:
    """Write a random Qwen3-MoE: 8 layers, 64 experts, top-8, hidden size 256."""
    import torch
    from transformers import Qwen3MoeForCausalLM

    config = tiny_config(
        layers=8,
        hidden=256,
        experts=64,
        top_k=8,
        vocab=512,
        expert_size=128,
        dense_size=512,
        max_position_embeddings=4096,
        initializer_range=0.06,
    )
    torch.manual_seed(0)
    Qwen3MoeForCausalLM(config).float().save_pretrained(folder)
    return folder


def requests_of(arguments: argparse.Namespace, capture: str, seed: int) -> list[GenerateRequest]:
    """Return fresh prompts for a round: a prefix hit would measure the cache."""
    random = np.random.default_rng(seed)
    sampling = {"temperature": 1.0, "max_new_tokens": arguments.new_tokens, "ignore_eos": True}
    prompts = random.integers(
        3, arguments.vocabulary, (arguments.requests, arguments.prompt_tokens)
    )
    return [
        GenerateRequest(input_ids=prompt.tolist(), sampling=sampling, capture=capture)
        for prompt in prompts
    ]


def measure(
    server: Server,
    client: RolloutClient,
    arguments: argparse.Namespace,
    capture: str,
    seed: int,
) -> tuple[float, float]:
    """Return tokens per second, and tokens per second of processor time."""
    start, cpu_start = time.perf_counter(), cpu_seconds(server)
    completions = client.generate(requests_of(arguments, capture, seed))
    num_tokens = sum(len(c.output_ids) for c in completions)
    seconds, cpu = time.perf_counter() - start, cpu_seconds(server) - cpu_start
    return num_tokens / seconds, num_tokens / cpu


def cpu_seconds(server: Server) -> float:
    """Return the processor time so far of the guard and everything below it."""
    total = 0.0
    for process in psutil.Process(server.process.pid).children(recursive=True):
        times = process.cpu_times()
        total += times.user + times.system
    return total


def order_of(keys: Iterable[Key], number: int) -> list[Key]:
    """Return a new order for each round, of the kinds and of the copies within a turn."""
    kinds = list(itertools.permutations(CAPTURES))[31 * number % math.factorial(len(CAPTURES))]
    copies = sorted({copy for _, copy in keys}, reverse=number % 2 == 1)
    return [(capture, copy) for copy in copies for capture in kinds]


def play(
    servers: dict[Key, Server],
    clients: dict[Key, RolloutClient],
    arguments: argparse.Namespace,
) -> dict[Key, np.ndarray]:
    """Return each server's (rate, rate per processor time), round by round."""
    rates: dict[Key, list[tuple[float, float]]] = {key: [] for key in servers}
    for number in tqdm(range(arguments.rounds + 1), unit="round"):
        for key in order_of(servers, number):
            values = measure(servers[key], clients[key], arguments, key[0], 1 + number)
            if number:  # round 0 warms up
                rates[key].append(values)
    return {key: np.array(values) for key, values in rates.items()}


def bytes_per_token(url: str, arguments: argparse.Namespace, capture: str) -> float:
    """Return the characters of base64 per row of one real answer."""
    body = requests_of(arguments, capture, 0)[0].to_json()
    meta_info = httpx.post(f"{url}/generate", json=body, timeout=600).json()["meta_info"]
    return len(meta_info[FIELD]) / (arguments.prompt_tokens + arguments.new_tokens - 1)


def interval(ratios: Sequence[float]) -> str:
    """Return "median [95 % interval of the median] (quartiles)"."""
    ratios, count = sorted(ratios), len(ratios)
    quartiles = spread(ratios)
    # The number of values below the median is binomial(count, 1/2).
    rank = max(0, math.floor(count / 2 - 0.98 * math.sqrt(count)))
    bounds = f"[{ratios[rank]:.3f} to {ratios[count - 1 - rank]:.3f}]"
    return f"{quartiles.median:.3f} {bounds} ({quartiles.low:.3f} to {quartiles.high:.3f})"


def report(
    servers: dict[Key, Server], rates: dict[Key, np.ndarray], arguments: argparse.Namespace
) -> dict[str, Any]:
    """Print both tables and return their figures."""
    copies = range(arguments.copies)
    means = {c: np.mean([rates[c, copy] for copy in copies], axis=0) for c in CAPTURES}
    rows = [(f"{one} / {other}", means[one], means[other]) for one, other in PAIRS]
    if arguments.copies > 1:
        rows += [(f"{c} / {c}", rates[c, 1], rates[c, 0]) for c in CAPTURES]
    print(f"| {arguments.rounds} rounds | tokens/s | tokens per processor time |")
    print("| --- | --- | --- |")
    for capture in CAPTURES:
        rate, per_cpu = np.median(means[capture], axis=0)
        print(f"| {capture} | {rate:.0f} | {per_cpu:.0f} |")
    for title, one, other in rows:
        print(f"| {title} | {' | '.join(interval(column) for column in (one / other).T)} |")
    speed = speeds(long_version(probe(servers["ids", 0].url).routes))
    print("\n| payload | bytes of base64 per token | encode GB/s | decode GB/s |")
    print("| --- | --- | --- | --- |")
    for capture in CAPTURES[1:]:
        size, values = bytes_per_token(servers[capture, 0].url, arguments, capture), speed[capture]
        row = f"| {capture} | {size:.0f} | "
        print(row + f"{values['encode']:.2f} | {values['decode']:.2f} |", flush=True)
    ratios = {title: [spread(column) for column in (one / other).T] for title, one, other in rows}
    return {"ratios": ratios, "payloads": speed}


def main(argv: Sequence[str] | None = None) -> None:
    """Start the servers, let them take turns, and print what each capture costs."""
    quick = {"rounds": 2, "copies": 1, "requests": 2, "new_tokens": 4}
    arguments = parse(make_parser(), argv, quick)
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        checkpoint = arguments.model or write_model(f"{folder}/model")
        servers = {}
        for capture, copy in itertools.product(CAPTURES, range(arguments.copies)):
            options = ServerOptions(
                capture=capture,
                arguments=arguments.server,
                environment={"OMP_NUM_THREADS": str(arguments.threads)},
                log_path=Path(folder, f"{capture}-{copy}.log"),
            )
            servers[capture, copy] = stack.enter_context(launch(checkpoint, options))
            print(f"# server {copy} with capture {capture} is up", flush=True)
        shape = probe(servers["ids", 0].url).routes.shape
        clients = {key: RolloutClient([server.url], shape) for key, server in servers.items()}
        figures = report(servers, play(servers, clients, arguments), arguments)
    finish("capture", arguments, figures)


if __name__ == "__main__":
    main()
