"""Load on a real server, with every row of every answer compared with a reference model.

    python -m tools.soak [--seconds 600] [--clients 64] [--json FILE] [-- SERVER ARGUMENTS ...]

Clients send conversations of random lengths and turns: many begin alike, some are aborted, some
close their connection, some send nonsense, and one sends 10,000 requests at once. Meanwhile all
running requests are retracted, the weights change, and the cache is far too small. The model is a
tiny Qwen3-MoE in float32, so that transformers can say for every answer which experts its tokens
take.

An update of the weights flushes the cache. So the row of a token is the one that the weights of
its version give in a forward of the whole sequence.
"""

from __future__ import annotations

import argparse
import http.client
import json
import queue
import socket
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import psutil

from recipes.model.tiny import tiny_config
from recipes.serving.server import Server, ServerOptions, launch
from routing_replay.capture import REQUEST_KEY
from routing_replay.errors import RoutingReplayError, ServerError
from routing_replay.rollout import (
    ClientOptions,
    Completion,
    Conversation,
    GenerateRequest,
    RolloutClient,
)
from routing_replay.routes.origin import num_uncovered
from routing_replay.routes.routes import Routes
from routing_replay.routes.spans import Span

from .bench.paired import finish, parse, parser
from .router_reference import Reference, clear_of_ties, differing_rows

VOCABULARY = 128
# The server is started with these: chunks and slots far smaller than the load.
ARGUMENTS = (
    *("--dtype", "float32", "--max-total-tokens", "8192", "--max-running-requests", "24"),
    *("--chunked-prefill-size", "64", "--random-seed", "1"),
)
# Pieces of which prompts are made: prefixes meet in the radix tree.
NUM_STEMS, STEM_LENGTH = 8, 48
# Of an update of the weights: requests end a moment after they were told to.
NUM_TRIES = 20
# Requests that one bad client sends at once, and how long it waits before it closes them all.
BURST, BURST_S = 10_000, 5.0
# For one answer: a burst stands before it in the server's queue.
TIMEOUT_S = 600.0
# Wrong rows that are described.
MOST_WRONG = 20
# Nonsense in the fields that the capture reads.
START_LENGTHS = (-1, 10**12, "3", 2.5, [1], None)
CUSTOM_PARAMS: tuple[Any, ...] = (
    *(7, "text", [1, 2], True, {}, {REQUEST_KEY: None}, {REQUEST_KEY: "everything"}),
    *({REQUEST_KEY: {"level": "ids"}}, {REQUEST_KEY: 3}, {"x" * 10_000: "y"}),
)


@dataclass
class Figures:
    """What a soak saw.

    Args:
        answers, rows: Compared with the reference.
        wrong_rows: Rows that are covered and are not the reference's.
        undecided_rows: The same, behind a token whose experts were a matter of rounding and are
            unknown, since its pass under these weights was a recomputation: it may have given the
            row other inputs.
        wrong: Where the first wrong rows are.
        uncovered: Rows by the cause why they are not covered.
        events: What happened to the server and its clients, by kind.
        faults: Errors that reached a good client, by their text.
        server_mib, client_mib: Resident memory, sampled evenly.
    """

    answers: int = 0
    rows: int = 0
    wrong_rows: int = 0
    undecided_rows: int = 0
    wrong: list[str] = field(default_factory=list)
    uncovered: Counter[str] = field(default_factory=Counter)
    events: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    server_mib: list[float] = field(default_factory=list)
    client_mib: list[float] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Soak:
    """A load and what it saw so far.

    Args:
        server: The server.
        checkpoints: Two of one architecture; the weights of version v are those of v % 2.
        seconds: How long requests are sent.
        num_clients: Threads that send them.
        burst: Requests that a bad client sends at once, when a third of the time is over.
    """

    server: Server
    checkpoints: Sequence[Path]
    seconds: float
    num_clients: int
    burst: int = 0
    figures: Figures = field(default_factory=Figures)
    # Bounded: clients wait for the reference instead of filling the memory.
    answers: queue.Queue[tuple[GenerateRequest, Completion, Routes | None]] = field(
        default_factory=lambda: queue.Queue(256)
    )
    stopping: threading.Event = field(default_factory=threading.Event)
    # Cleared while the server must run empty.
    is_open: threading.Event = field(default_factory=threading.Event)

    def run(self) -> Figures:
        """Send the load for the time that was asked for, and compare every answer."""
        threads = [
            threading.Thread(target=self.converse, args=(n,)) for n in range(self.num_clients)
        ]
        threads += [threading.Thread(target=t) for t in (self.disturb, self.misbehave, self.flood)]
        references = [Reference(path) for path in self.checkpoints]
        self.is_open.set()
        deadline = time.monotonic() + self.seconds
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads) or not self.answers.empty():
            if time.monotonic() > deadline:
                self.stopping.set()
            try:
                self.compare(references, *self.answers.get(timeout=0.5))
            except queue.Empty:
                continue
            self.server.check()
        return self.figures

    def compare(
        self,
        references: Sequence[Reference],
        request: GenerateRequest,
        completion: Completion,
        whole: Routes | None = None,
    ) -> None:
        """Count the rows of an answer that are not those of its weights.

        Args:
            references: Of the two checkpoints.
            request, completion: The answer.
            whole: Routes of all its tokens, those of earlier answers among them.
        """
        routes = completion.routes
        if routes is None:
            return
        whole = whole or routes
        tokens = [*request.input_ids, *completion.output_ids][:-1]
        start, first = len(tokens) - routes.num_rows, len(tokens) - whole.num_rows
        for version in np.unique(routes.weight_version_T[routes.covered_T]):
            of_version_T = routes.covered_T & (routes.weight_version_T == version)
            logits_TLE, _, _ = references[version % 2](tokens, routes=whole)
            differs_T = differing_rows(routes, logits_TLE[start:]) & of_version_T
            is_known_T = np.zeros(len(tokens), np.bool_)
            if not completion.num_retractions:
                is_known_T[first:] = whole.covered_T & (whole.weight_version_T == version)
            is_open_T = ~is_known_T & ~clear_of_ties(logits_TLE, routes.top_k).all(-1)
            is_behind_T = np.cumsum(is_open_T)[start:] > 0
            self.figures.undecided_rows += int((differs_T & is_behind_T).sum())
            wrong_N = np.flatnonzero(differs_T & ~is_behind_T)
            self.figures.wrong_rows += len(wrong_N)
            self.figures.wrong += [
                f"row {row} of {routes.num_rows}, first row {request.start}, version {version} of "
                f"{np.unique(routes.weight_version_T).tolist()}, "
                f"{routes.expert_ids_TLK[row].tolist()}, logits {logits_TLE[start + row].tolist()}"
                for row in wrong_N[: MOST_WRONG - len(self.figures.wrong)]
            ]
        self.figures.answers += 1
        self.figures.rows += routes.num_rows
        self.figures.uncovered.update(num_uncovered([routes]))

    def converse(self, number: int) -> None:
        """Hold one conversation after another."""
        random = np.random.default_rng(number)
        options = ClientOptions(request_timeout_s=TIMEOUT_S, retry_wait_s=0.1)
        client = RolloutClient([self.server.url], options=options)
        while self.is_open.wait() and not self.stopping.is_set():
            conversation, spans = Conversation(), [Span(token_ids=prompt(random))]
            for _ in range(random.integers(1, 4)):
                try:
                    spans = self.turn(client, conversation, spans, random)
                except RoutingReplayError as error:
                    what = f"{type(error).__name__}: {error.what}; got {str(error.got)[:100]}"
                    self.figures.faults[what] += 1
                    break

    def turn(
        self,
        client: RolloutClient,
        conversation: Conversation,
        spans: list[Span],
        random: np.random.Generator,
    ) -> list[Span]:
        """Take one turn and hand its answer over; return the conversation so far."""
        tokens = [token for span in spans for token in span.tokens()]
        sampling = {"max_new_tokens": int(random.integers(1, 96)), "ignore_eos": True}
        request = conversation.request(tokens, {"temperature": 1.0, **sampling})
        self.is_open.wait()
        (completion,) = client.generate([request])
        answer = Span(sample=conversation.add(request, completion))
        whole = conversation.trajectory([*spans, answer]).routes
        self.answers.put((request, completion, whole))
        self.figures.events[completion.finish_reason] += 1
        self.figures.events["retracted"] += completion.num_retractions
        return [*spans, answer, Span(token_ids=prompt(random, stem=False))]

    def disturb(self) -> None:
        """Retract, abort, and change the weights; sample the memory."""
        random, client, version = np.random.default_rng(1), RolloutClient([self.server.url]), 0
        own, servers = psutil.Process(), psutil.Process(self.server.process.pid)
        while not self.stopping.wait(min(2.0, self.seconds / 12)):
            kind = str(random.choice(["retract", "abort", "update", "update", "rest"]))
            self.figures.events[kind] += 1
            try:
                if kind == "abort":
                    client.abort()
                if kind in ("retract", "update"):
                    client.pause("retract")
                    try:
                        if kind == "update":
                            version += 1
                            self.update(client, version)
                    finally:
                        client.resume()
            except RoutingReplayError as error:
                self.figures.faults[f"{kind}: {error.what}"] += 1
            used = sum(p.memory_info().rss for p in servers.children(recursive=True))
            self.figures.server_mib.append(used / 2**20)
            self.figures.client_mib.append(own.memory_info().rss / 2**20)

    def update(self, client: RolloutClient, version: int) -> None:
        """Load weights into a paused server; end its requests if they keep it from flushing.

        SGLang flushes its cache under requests that it has retracted, and not under others that
        still wait for their first pass.
        """
        path = str(self.checkpoints[version % 2])
        self.is_open.clear()
        try:
            for attempt in range(NUM_TRIES):
                try:
                    client.update_weights(path, version)
                    return
                except ServerError:
                    self.figures.events["ended for an update"] += not attempt
                    client.abort()
                    time.sleep(0.2)
            client.update_weights(path, version)
        finally:
            self.is_open.set()

    def flood(self) -> None:
        """Send a burst of requests; nobody reads their answers."""
        if self.burst and not self.stopping.wait(self.seconds / 3):
            body = GenerateRequest(input_ids=[5, 6, 7], sampling={"max_new_tokens": 4}).to_json()
            self.figures.events["requests of a burst"] += burst(self.server.url, body, self.burst)

    def misbehave(self) -> None:
        """Send nonsense and close connections, one after another."""
        random, body = np.random.default_rng(2), GenerateRequest(input_ids=[5, 6, 7]).to_json()
        while not self.stopping.wait(0.2) and self.is_open.wait():
            bad = json.loads(json.dumps(body))
            choice = int(random.integers(3))
            if choice == 0:
                bad["routed_experts_start_len"] = START_LENGTHS[random.integers(len(START_LENGTHS))]
            if choice == 1:
                params = CUSTOM_PARAMS[random.integers(len(CUSTOM_PARAMS))]
                bad["sampling_params"]["custom_params"] = params
            bad["sampling_params"]["max_new_tokens"] = 300 if choice == 2 else 4
            self.figures.events[post(self.server.url, bad, closes=choice == 2)] += 1


def prompt(random: np.random.Generator, stem: bool = True) -> list[int]:
    """Return a prompt of which the beginning is one of a few, or the output of a tool."""
    tail = random.integers(3, VOCABULARY, random.integers(1, 80)).tolist()
    if not stem:
        return tail[:24]
    number = random.integers(NUM_STEMS)
    stem_tokens = np.random.default_rng(1000 + number).integers(3, VOCABULARY, STEM_LENGTH)
    return [*stem_tokens[: random.integers(1, STEM_LENGTH + 1)].tolist(), *tail]


def post(url: str, body: dict[str, Any], closes: bool) -> str:
    """Send a request as it is; return what became of it.

    Args:
        url: The server.
        body: The JSON.
        closes: Whether to close the connection instead of waiting for the answer.
    """
    address = urlsplit(url)
    connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=60)
    try:
        connection.request(
            "POST", "/generate", json.dumps(body), {"Content-Type": "application/json"}
        )
        if closes:
            time.sleep(0.05)
            return "closed by the client"
        status = connection.getresponse().status
    except (OSError, http.client.HTTPException) as error:
        return f"no answer: {type(error).__name__}"
    finally:
        connection.close()
    return f"nonsense answered with status {status}"


def burst(url: str, body: dict[str, Any], count: int, wait_s: float = BURST_S) -> int:
    """Send many requests at once, each on a connection of its own, and close them unread.

    Returns:
        How many the server took.
    """
    address, data = urlsplit(url), json.dumps(body).encode()
    head = f"POST /generate HTTP/1.1\r\nHost: {address.netloc}\r\nContent-Length: {len(data)}\r\n"
    message = f"{head}Content-Type: application/json\r\n\r\n".encode() + data
    with ExitStack() as connections:
        for number in range(count):
            try:
                target = (address.hostname, address.port)
                connection = socket.create_connection(target, timeout=TIMEOUT_S)
                connections.enter_context(connection).sendall(message)
            except OSError:
                return number
        time.sleep(wait_s)
    return count


def write_checkpoints(folder: Path) -> list[Path]:
    """Write two random Qwen3-MoE checkpoints of one architecture."""
    import torch
    from transformers import Qwen3MoeForCausalLM

    config = tiny_config(layers=3, experts=16, top_k=4, vocab=VOCABULARY, initializer_range=0.12)
    paths = [folder / "first", folder / "second"]
    for seed, path in enumerate(paths):
        torch.manual_seed(seed)
        Qwen3MoeForCausalLM(config).float().save_pretrained(path)
    return paths


@contextmanager
def serving(folder: Path, arguments: Sequence[str]) -> Iterator[tuple[Server, list[Path]]]:
    """Start the server of a soak."""
    checkpoints = write_checkpoints(folder)
    options = ServerOptions(
        capture="ids",
        arguments=(*ARGUMENTS, *arguments),
        environment={"OMP_NUM_THREADS": "1"},
        log_path=folder / "server.log",
    )
    with launch(checkpoints[0], options) as server:
        yield server, checkpoints


def growth(values: Sequence[float]) -> float:
    """Return how much the median of the last quarter is above that of the second."""
    size = len(values) // 4
    if not size:
        return 0.0
    return float(np.median(values[-size:]) - np.median(values[size : 2 * size]))


def report(figures: Figures, seconds: float) -> dict[str, Any]:
    """Print what a soak saw and return it as plain values."""
    # Not `asdict`, which makes pairs the keys of a counter.
    values = vars(figures) | {
        "seconds": seconds,
        "server_growth_mib": growth(figures.server_mib),
        "client_growth_mib": growth(figures.client_mib),
    }
    print(f"{figures.answers} answers, {figures.rows} rows, {figures.wrong_rows} wrong rows")
    print(f"not to be decided: {figures.undecided_rows}")
    for where in figures.wrong:
        print(f"wrong: {where}")
    print(f"uncovered: {dict(figures.uncovered) or 'none'}")
    print(f"events: {dict(sorted(figures.events.items()))}")
    print(f"faults of good clients: {dict(figures.faults) or 'none'}")
    for who in ("server", "client"):
        samples = values[f"{who}_mib"]
        if samples:
            print(
                f"memory of the {who}: {samples[0]:.0f} MiB at first, {samples[-1]:.0f} MiB at the "
                f"end; the last quarter {values[f'{who}_growth_mib']:+.1f} MiB over the second"
            )
    return values


def main(argv: Sequence[str] | None = None) -> int:
    """Run a soak; return 0 if no row is wrong and no good client was harmed."""
    made = parser(__doc__)
    made.add_argument("--seconds", type=float, default=600.0)
    made.add_argument("--clients", type=int, default=64)
    made.add_argument("server", nargs="*", help="further arguments of the server, after --")
    made.add_argument("--burst", type=int, default=BURST, help="requests at once; 0: none")
    defaults = {"seconds": 20.0, "clients": 8, "burst": 100}
    arguments: argparse.Namespace = parse(made, argv, defaults)
    with (
        tempfile.TemporaryDirectory() as folder,
        serving(Path(folder), arguments.server) as (server, checkpoints),
    ):
        soak = Soak(
            server=server,
            checkpoints=checkpoints,
            seconds=arguments.seconds,
            num_clients=arguments.clients,
            burst=arguments.burst,
        )
        figures = soak.run()
    values = report(figures, arguments.seconds)
    finish("soak", arguments, values)
    return int(bool(figures.wrong_rows or figures.faults))


if __name__ == "__main__":
    raise SystemExit(main())
