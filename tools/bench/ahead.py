"""The recipe ahead beside one step after the other: seconds of all steps, and the reward.

    python -m tools.bench.ahead [--steps 24] [--rounds 3] [--num-running 24] [--own-cores]
                                [--latency-s 4] [--longest-s 12] [--recipe FLAGS ...]

One step ahead, the same with weights into running responses, and so two steps ahead. All start a
server and a trainer of their own, from the same tiny model, and take turns; each round has a seed
of its own. Rollouts take most of a step here, because the server runs few requests at a time. On a
machine that other work fills, nothing can overlap: look at the load. With --own-cores the server
has one half of the cores and the trainer the other, as on machines of their own.

The first rollout of a run can overlap with nothing: the median step says what a long run gains.

With --latency-s a stand-in answers every request after so many seconds, with random tokens and
routes, as servers on other machines take time and none of this one's processors. It learns nothing.
With --longest-s one response in a hundred takes so long.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np

from recipes.minirl.job import journal
from routing_replay.routes.payload import FIELD, encode
from routing_replay.routes.routes import Routes

from .paired import finish, parse, parser, ratios, spread

ROOT = Path(__file__).parents[2]
RECIPE = """
prompts_per_step: 32
samples_per_prompt: 8
minibatch_size: 64
microbatch_size: 64
measure_live_every: 0
checkpoint_every: 0
server_arguments: ["--max-total-tokens", "65536", "--max-running-requests", "{num_running}"]
"""
RETRACT = ["--publish-pause", "retract"]
ARMS = {
    "0": ["--ahead", "0"],
    "1": ["--ahead", "1"],
    "1-retract": ["--ahead", "1", *RETRACT],
    "2-retract": ["--ahead", "2", *RETRACT],
}
LONGEST_OF = 100
SUMMED = ("time_s", "time/sampling_s", "time/rollout_s", "time/weights_s", "time/update_s")
LAGS = ("version_lag", "version_lag_max", "mixed_version_fraction")
# Of the tiny model.
LAYERS, EXPERTS, TOP_K = 6, 32, 2
SAMPLED_TOKEN = 3  # any will do


class LateServer(ThreadingHTTPServer):
    """Answers as SGLang does, after a while, and computes nothing."""

    request_queue_size = 1024  # all requests of a step come at once
    daemon_threads = True

    def __init__(self, latency_s: float, longest_s: float):
        super().__init__(("127.0.0.1", 0), LateAnswer)
        self.latency_s = latency_s
        self.longest_s = longest_s
        self.weight_version = "0"
        self.numbers = itertools.count()
        self.is_running = threading.Event()
        self.is_running.set()


class LateAnswer(BaseHTTPRequestHandler):
    server: LateServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.reply({"weight_version": self.server.weight_version, "dp_size": 1})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/generate":
            is_longest = next(self.server.numbers) % LONGEST_OF == 0
            time.sleep(self.server.longest_s if is_longest else self.server.latency_s)
            self.server.is_running.wait()
            self.reply({"meta_info": self.generated(body)})
            return
        match self.path:
            case "/update_weights_from_disk":
                self.server.weight_version = body["weight_version"]
            case "/pause_generation":
                self.server.is_running.clear()
            case "/continue_generation":
                self.server.is_running.set()
        self.reply({"success": True})

    def generated(self, body: dict[str, Any]) -> dict[str, Any]:
        """Return the longest response that was asked for, with random routes."""
        num_new = body["sampling_params"]["max_new_tokens"]
        num_rows = len(body["input_ids"]) + num_new - 1
        scores_TLE = np.random.default_rng(body["input_ids"]).random((num_rows, LAYERS, EXPERTS))
        routes = Routes(
            expert_ids_TLK=scores_TLE.argsort(-1)[..., :TOP_K].astype(np.uint8),
            layers=tuple(range(LAYERS)),
            num_experts=EXPERTS,
            weight_version_T=np.full(num_rows, int(self.server.weight_version)),
        )
        start = body.get("routed_experts_start_len", 0)
        payload = base64.b64encode(encode(routes[start:], start=start)).decode()
        return {
            "output_token_logprobs": [[-1.0, SAMPLED_TOKEN, None]] * num_new,
            "finish_reason": {"type": "length"},
            "weight_version": self.server.weight_version,
            **({FIELD: payload} if body.get("return_routed_experts") else {}),
        }

    def reply(self, answer: dict[str, Any]) -> None:
        data = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@contextlib.contextmanager
def late_server(latency_s: float, longest_s: float) -> Iterator[list[str]]:
    """Serve on a free port; yield the recipe's flags. Without a latency there is neither."""
    if not latency_s:
        yield []
        return
    with LateServer(latency_s, max(latency_s, longest_s)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        yield ["--rollout-url", url, "--routing-replay-capture", "ids"]
        server.shutdown()


@contextlib.contextmanager
def own_cores(folder: Path) -> Iterator[list[str]]:
    """Give servers one half of the cores, and this process the other; yield the recipe's flags."""
    cores = sorted(os.sched_getaffinity(0))
    half = len(cores) // 2
    python = folder / "python_of_the_server"
    of_the_server = ",".join(map(str, cores[:half]))
    python.write_text(f'#!/bin/sh\nexec taskset -c {of_the_server} {sys.executable} "$@"\n')
    python.chmod(0o755)
    os.sched_setaffinity(0, cores[half:])
    try:
        yield ["--rollout-python", str(python), "--cpu-threads", str(half)]
    finally:
        os.sched_setaffinity(0, cores)


def train(folder: Path, flags: Sequence[str]) -> dict[str, Any]:
    """Return the sums of a run's times, and its rewards on held-out prompts."""
    command = [sys.executable, "-m", "recipes.minirl", "--run-dir", str(folder), *flags]
    with open(folder.with_suffix(".log"), "wb") as log:
        subprocess.run(command, check=True, cwd=ROOT, stdout=log, stderr=log)
    records = journal.read(folder / "metrics.jsonl")
    rewards = [r["eval/reward"] for r in records if "eval/reward" in r]
    sums = {name: sum(r[name] for r in records[1:]) for name in SUMMED}
    # The last step ends with an evaluation, which is no part of training.
    steps_s = [r["time_s"] - r.get("time/evaluation_s", 0.0) for r in records[1:]]
    sums |= {"time_s": sum(steps_s), "median_step_s": statistics.median(steps_s)}
    lags = {name: [r.get(f"rollout/{name}", 0.0) for r in records[1:]] for name in LAGS}
    means = {name: sum(values) / len(values) for name, values in lags.items()}
    return sums | means | {"rewards": rewards, "load": os.getloadavg()[0]}


def compared(arguments: argparse.Namespace, folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Return the runs of each variant, round by round."""
    names = ["0", *arguments.against]
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    cache = Path(arguments.cache_dir).absolute()
    config = folder / "recipe.yaml"
    config.write_text(RECIPE.format(num_running=arguments.num_running))
    for number in range(arguments.rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            flags = ["--config", str(config), "--steps", str(arguments.steps)]
            flags += ["--seed", str(number), "--cache-dir", str(cache), *arguments.recipe]
            run = train(folder / f"ahead_{name}_round_{number}", [*flags, *ARMS[name]])
            runs[name].append(run)
            print(f"round {number}, {' '.join(ARMS[name])}: {run}", flush=True)
    return runs


def main(argv: Sequence[str] | None = None) -> None:
    made = parser(__doc__)
    made.add_argument("--steps", type=int, default=24)
    made.add_argument("--rounds", type=int, default=3)
    made.add_argument(
        "--against", nargs="+", choices=list(ARMS)[1:], default=list(ARMS)[1:], help="of 0 ahead"
    )
    made.add_argument("--num-running", type=int, default=24, help="requests that the server runs")
    made.add_argument("--own-cores", action="store_true", help="half of them for the server")
    made.add_argument("--latency-s", type=float, default=0.0, help="of a stand-in; 0: real servers")
    made.add_argument("--longest-s", type=float, default=0.0, help="of the stand-in's longest")
    made.add_argument("--cache-dir", default="runs/cache", help="where the tiny models are kept")
    made.add_argument("--recipe", nargs=argparse.REMAINDER, default=[], help="flags of the recipe")
    arguments = parse(made, argv, {"steps": 2, "rounds": 1})
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        late = late_server(arguments.latency_s, arguments.longest_s)
        arguments.recipe = [*stack.enter_context(late), *arguments.recipe]
        if arguments.own_cores:
            arguments.recipe = [*stack.enter_context(own_cores(folder)), *arguments.recipe]
        runs = compared(arguments, folder)
    share = spread([run["time/sampling_s"] / run["time_s"] for run in runs["0"]])
    print(f"rollout's share of a step, one after the other: {share}")
    compared_to_0 = {}
    for clock in ("time_s", "median_step_s"):
        seconds = {name: [run[clock] for run in of] for name, of in runs.items()}
        compared_to_0[clock] = ratios(seconds, "0")
        for name in arguments.against:
            print(f"{clock}, {' '.join(ARMS[name])} over --ahead 0: {compared_to_0[clock][name]}")
    finish("ahead", arguments, {"runs": runs, "share": share, "ratios": compared_to_0})


if __name__ == "__main__":
    main()
