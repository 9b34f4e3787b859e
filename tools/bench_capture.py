"""What capture costs: rollouts with capture off, stock's, ours with ids, ours with gates.

    python tools/bench_capture.py --model CHECKPOINT [--rounds 5] [--requests 16] [--new-tokens 64]

One server for each, all of the same checkpoint and options; they take turns, round after round, so
that whatever else the machine does meets all of them. Prints ratios to "off" of the rate and of the
processor time that all processes of a server take per token (on a shared machine the steadier of
the two), their spread, bytes per token on the wire, and the speed of decoding the answers.
"""

import argparse
import contextlib
import statistics
import tempfile
import time

import httpx
import numpy as np
import psutil

from routing_replay.payload import FIELD, decode
from routing_replay.sglang.client import RolloutClient, probe
from routing_replay.sglang.requests import GenerateRequest
from routing_replay.sglang.server import ServerOptions, launch

CAPTURES = ("off", "stock", "ids", "gates")


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", required=True, help="Hugging Face checkpoint of an MoE model")
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds")
    parser.add_argument("--requests", type=int, default=16, help="requests per round")
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--vocabulary", type=int, default=128, help="prompts draw ids below it")
    parser.add_argument("server", nargs="*", help="further arguments of the servers, after --")
    return parser.parse_args()


def requests_of(arguments, capture, seed):
    """Fresh prompts in each round: a prefix hit would measure the cache."""
    random = np.random.default_rng(seed)
    sampling = {"temperature": 1.0, "max_new_tokens": arguments.new_tokens, "ignore_eos": True}
    prompts = random.integers(
        3, arguments.vocabulary, (arguments.requests, arguments.prompt_tokens)
    )
    return [
        GenerateRequest(input_ids=prompt.tolist(), sampling=sampling, capture=capture)
        for prompt in prompts
    ]


def measure(server, client, arguments, capture, seed):
    """Tokens per second, and processor seconds per token."""
    start, cpu_start = time.perf_counter(), cpu_seconds(server)
    completions = client.generate(requests_of(arguments, capture, seed))
    num_tokens = sum(len(c.output_ids) for c in completions)
    seconds, cpu = time.perf_counter() - start, cpu_seconds(server) - cpu_start
    return num_tokens / seconds, cpu / num_tokens


def cpu_seconds(server):
    """Processor time so far of the guard and everything below it."""
    total = 0.0
    for process in psutil.Process(server.process.pid).children(recursive=True):
        times = process.cpu_times()
        total += times.user + times.system
    return total


def wire(url, arguments, capture, model):
    """Bytes of base64 per row of one answer, and GB of ids per second of its decoding."""
    request = requests_of(arguments, capture, 0)[0]
    meta_info = httpx.post(f"{url}/generate", json=request.to_json(), timeout=600).json()[
        "meta_info"
    ]
    num_tokens = arguments.prompt_tokens + arguments.new_tokens
    times = []
    for _ in range(50):
        start = time.perf_counter()
        routes = decode(meta_info, num_tokens=num_tokens, model=model)
        times.append(time.perf_counter() - start)
    size = len(meta_info[FIELD])
    return size / routes.num_rows, routes.expert_ids_TLK.nbytes / statistics.median(times) / 1e9


def main():
    arguments = parse_arguments()
    with contextlib.ExitStack() as stack, tempfile.TemporaryDirectory() as folder:
        servers = {}
        for capture in CAPTURES:
            options = ServerOptions(
                capture=capture, arguments=arguments.server, log_path=f"{folder}/{capture}.log"
            )
            servers[capture] = stack.enter_context(launch(arguments.model, options))
            print(f"# server with capture {capture} is up", flush=True)
        model = probe(servers["ids"].url).routes
        clients = {capture: RolloutClient([s.url], model) for capture, s in servers.items()}
        rates = {capture: [] for capture in CAPTURES}
        for number in range(arguments.rounds + 1):
            # Round 0 warms up; the order turns, so that none is always first.
            for capture in (*CAPTURES[number % 4 :], *CAPTURES[: number % 4]):
                found = measure(servers[capture], clients[capture], arguments, capture, 1 + number)
                if number:
                    rates[capture].append(found)
        report(arguments, servers, model, rates)


def report(arguments, servers, model, rates):
    print(
        "| capture | tokens/s | ratio to off | CPU time/token to off | bytes/token | decode GB/s |"
    )
    print("| --- | --- | --- | --- | --- | --- |")
    for capture, values in rates.items():
        rate = statistics.median(rate for rate, _ in values)
        row = f"| {capture} | {rate:.0f} | {spread(values, rates['off'], 0)} "
        row += f"| {spread(values, rates['off'], 1)} | "
        if capture == "off":
            print(row + "0 | |")
            continue
        size, speed = wire(servers[capture].url, arguments, capture, model)
        print(row + f"{size:.0f} | {speed:.2f} |", flush=True)


def spread(values, references, column):
    """Median (quartiles) of the rounds' ratios."""
    ratios = [one[column] / off[column] for one, off in zip(values, references, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


if __name__ == "__main__":
    main()
