"""What capture costs: rollouts with capture off, stock's, ours with ids, ours with gates.

    python -m tools.bench.capture [--model CHECKPOINT] [--rounds 24] [-- --dtype bfloat16 ...]

Servers of the same checkpoint and options, two of each kind. They take turns, many short rounds,
each round in another order, so that whatever else the machine does meets all of them. A ratio
compares two kinds within one round; the table holds their medians, the 95 % interval of each median
(from order statistics: no assumption on the noise) and the quartiles. The rows that compare a kind
with itself say what two equal processes differ by, for good: no smaller cost can be seen. Processor
time is that of all processes of a server; on a shared machine it is the steadier of the two.

Without --model a random Qwen3-MoE of about 60 million parameters is made.
"""

import argparse
import contextlib
import itertools
import math
import statistics
import tempfile
import time

import httpx
import numpy as np
import psutil
from tqdm import tqdm

from recipes.serving.server import ServerOptions, launch
from routing_replay.rollout import RolloutClient, probe
from routing_replay.rollout.requests import GenerateRequest
from routing_replay.routes.payload import FIELD

from .payload import long_version, speeds

CAPTURES = ("off", "stock", "ids", "gates")
# (a, b): the ratio a / b is what the table shows.
PAIRS = (("stock", "off"), ("ids", "off"), ("gates", "off"), ("ids", "stock"), ("gates", "stock"))


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", help="Hugging Face checkpoint of an MoE model")
    parser.add_argument("--rounds", type=int, default=24, help="measured rounds")
    parser.add_argument("--copies", type=int, default=2, help="servers of each kind")
    parser.add_argument("--requests", type=int, default=16, help="requests per round")
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--vocabulary", type=int, default=512, help="prompts draw ids below it")
    parser.add_argument("--threads", type=int, default=1, help="OMP threads of a server on a CPU")
    parser.add_argument("server", nargs="*", help="further arguments of the servers, after --")
    return parser.parse_args()


def write_model(folder):
    """A random Qwen3-MoE: 8 layers, 64 experts, top-8, hidden size 256."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=512,
        moe_intermediate_size=128,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        num_experts=64,
        num_experts_per_tok=8,
        norm_topk_prob=True,
        max_position_embeddings=4096,
        initializer_range=0.06,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    Qwen3MoeForCausalLM(config).float().save_pretrained(folder)
    return folder


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
    """Tokens per second, and tokens per second of processor time."""
    start, cpu_start = time.perf_counter(), cpu_seconds(server)
    completions = client.generate(requests_of(arguments, capture, seed))
    num_tokens = sum(len(c.output_ids) for c in completions)
    seconds, cpu = time.perf_counter() - start, cpu_seconds(server) - cpu_start
    return num_tokens / seconds, num_tokens / cpu


def cpu_seconds(server):
    """Processor time so far of the guard and everything below it."""
    total = 0.0
    for process in psutil.Process(server.process.pid).children(recursive=True):
        times = process.cpu_times()
        total += times.user + times.system
    return total


def order_of(keys, number):
    """Another order in each round, of the kinds and of the copies within a turn."""
    kinds = list(itertools.permutations(CAPTURES))[5 * number % 24]
    copies = sorted({copy for _, copy in keys}, reverse=number % 2 == 1)
    return [(capture, copy) for copy in copies for capture in kinds]


def play(servers, clients, arguments):
    """For each server its (rate, rate per processor time), round by round."""
    found = {key: [] for key in servers}
    for number in tqdm(range(arguments.rounds + 1), unit="round"):
        for key in order_of(servers, number):
            values = measure(servers[key], clients[key], arguments, key[0], 1 + number)
            if number:  # round 0 warms up
                found[key].append(values)
    return {key: np.array(values) for key, values in found.items()}


def bytes_per_token(url, arguments, capture):
    """Characters of base64 per row of one real answer."""
    body = requests_of(arguments, capture, 0)[0].to_json()
    meta_info = httpx.post(f"{url}/generate", json=body, timeout=600).json()["meta_info"]
    return len(meta_info[FIELD]) / (arguments.prompt_tokens + arguments.new_tokens - 1)


def spread(ratios):
    """Median [95 % interval of the median] (quartiles)."""
    ratios, count = sorted(ratios), len(ratios)
    low, middle, high = statistics.quantiles(ratios, n=4)
    # The number of values below the median is binomial(count, 1/2).
    rank = max(0, math.floor(count / 2 - 0.98 * math.sqrt(count)))
    interval = f"[{ratios[rank]:.3f} to {ratios[count - 1 - rank]:.3f}]"
    return f"{middle:.3f} {interval} ({low:.3f} to {high:.3f})"


def report(servers, found, arguments):
    copies = range(arguments.copies)
    means = {c: np.mean([found[c, copy] for copy in copies], axis=0) for c in CAPTURES}
    rows = [(f"{one} / {other}", means[one], means[other]) for one, other in PAIRS]
    if arguments.copies > 1:
        rows += [(f"{c} / {c}", found[c, 1], found[c, 0]) for c in CAPTURES]
    print(f"| {arguments.rounds} rounds | tokens/s | tokens per processor time |")
    print("| --- | --- | --- |")
    for capture in CAPTURES:
        rate, per_cpu = np.median(means[capture], axis=0)
        print(f"| {capture} | {rate:.0f} | {per_cpu:.0f} |")
    for title, one, other in rows:
        print(f"| {title} | {' | '.join(spread(column) for column in (one / other).T)} |")
    routes = long_version(probe(servers["ids", 0].url).routes)
    speed = speeds(routes)
    print("\n| payload | bytes of base64 per token | encode GB/s | decode GB/s |")
    print("| --- | --- | --- | --- |")
    for capture in CAPTURES[1:]:
        size, values = bytes_per_token(servers[capture, 0].url, arguments, capture), speed[capture]
        row = f"| {capture} | {size:.0f} | "
        print(row + f"{values['encode']:.2f} | {values['decode']:.2f} |", flush=True)


def main():
    arguments = parse_arguments()
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        checkpoint = arguments.model or write_model(f"{folder}/model")
        servers = {}
        for capture, copy in itertools.product(CAPTURES, range(arguments.copies)):
            options = ServerOptions(
                capture=capture,
                arguments=arguments.server,
                environment={"OMP_NUM_THREADS": str(arguments.threads)},
                log_path=f"{folder}/{capture}-{copy}.log",
            )
            servers[capture, copy] = stack.enter_context(launch(checkpoint, options))
            print(f"# server {copy} with capture {capture} is up", flush=True)
        model = probe(servers["ids", 0].url).routes
        clients = {key: RolloutClient([server.url], model) for key, server in servers.items()}
        report(servers, play(servers, clients, arguments), arguments)


if __name__ == "__main__":
    main()
