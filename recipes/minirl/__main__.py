"""The launcher: `python -m recipes.minirl`. Prepares, starts servers and trainer, watches both."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from recipes.serving.children import Child
from recipes.serving.server import Server, ServerOptions, launch
from routing_replay.errors import ConfigError, RoutingReplayError
from routing_replay.report.page import write_report

from . import journal
from .command_line import parse
from .config import RecipeConfig
from .inputs import inputs_of

POLL_S = 0.25
# How long the other side of a broken connection gets to say itself why it ended.
GRACE_S = 3.0


class TrainingError(RoutingReplayError):
    """A trainer that ended without a message of its own."""


def main(argv: Sequence[str] | None = None) -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        run(parse(argv))
    except RoutingReplayError as error:
        print(f"\nerror: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    return 0


def run(config: RecipeConfig) -> None:
    """Prepare, start the servers, train under torchrun, report."""
    start = time.monotonic()
    config = resolve_mode(config)
    journal.check_telemetry(config.telemetry)
    run_dir = open_run(config)
    print(f"Run: {run_dir}", flush=True)
    prepare(config, run_dir)
    base = inputs_of(config).base
    with contextlib.ExitStack() as stack:
        servers = [] if config.rollout.rollout_url else [start_server(config, run_dir, base)]
        for server in servers:
            stack.enter_context(server)
        urls = config.rollout.rollout_url or [server.url for server in servers]
        trainer = stack.enter_context(start_trainer(config, run_dir, urls))
        watch(trainer, servers, run_dir)
    report = write_report([run_dir], run_dir / "report.html")
    print(result_line(run_dir, time.monotonic() - start))
    print(f"Report: {report or run_dir / 'report.html'}")


def resolve_mode(config: RecipeConfig) -> RecipeConfig:
    """The configuration with `auto` decided, and said why."""
    resolved = config.replay.resolve(config.num_mini_batches)
    if resolved.mode != config.replay.mode:
        print(
            f"Routing replay: auto chose {resolved.mode}, for global batch / mini batch = "
            f"{config.batch_size} / {config.training.minibatch_size} = {config.num_mini_batches}"
        )
    return replace(config, replay=resolved)


def open_run(config: RecipeConfig) -> Path:
    """Make the run's folder and write its configuration there.

    Raises:
        ConfigError: The folder holds another run, or cannot be made.
    """
    run_dir = Path(config.run.run_dir or f"runs/minirl-{time.strftime('%Y%m%d-%H%M%S')}")
    if (run_dir / "config.json").exists() and not config.run.resume:
        raise ConfigError(
            "the folder holds a run already",
            where=run_dir,
            fix="Continue it with --resume, or choose another --run-dir",
        )
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        partial = run_dir / "config.json.tmp"
        partial.write_text(json.dumps(config.to_mapping(), indent=2) + "\n")
        partial.replace(run_dir / "config.json")
    except OSError as error:
        raise ConfigError("the run's folder cannot be used", got=error, where=run_dir) from error
    for stale in run_dir.glob("error_rank_*.txt"):
        stale.unlink()
    return run_dir


def prepare(config: RecipeConfig, run_dir: Path) -> None:
    """Make the tiny model in a child process: its memory is free again before the engines start."""
    if config.model.model != "tiny":
        return
    command = [sys.executable, "-m", "recipes.minirl.tiny_model", str(run_dir / "config.json")]
    log_path = run_dir / "logs" / "prepare.log"
    with Child(command, log_path, thread_environment(config, 1)) as child:
        while child.status is None:
            time.sleep(POLL_S)
    if child.status:
        raise TrainingError(
            "the tiny model could not be made",
            got=f"status {child.status}",
            where=child.log_path,
            fix=f"Its last lines:\n{child.last_lines()}",
        )


def start_server(config: RecipeConfig, run_dir: Path, base: Path) -> Server:
    """One SGLang server with our plugin, on a free port."""
    print("Starting SGLang (about 30 s without a GPU) ...", flush=True)
    options = ServerOptions(
        port=config.rollout.server_port or None,
        capture=config.rollout_capture,
        log_path=run_dir / "logs" / "sglang.log",
        arguments=(
            *("--dtype", config.rollout.rollout_dtype),
            "--skip-tokenizer-init",  # token ids in and out: nothing to detokenize
            *("--log-level-http", "warning"),  # a line per request would bury the rest
            *config.rollout.server_arguments,
        ),
        environment=thread_environment(config, 1),
    )
    server = launch(base, options)
    print(f"SGLang serves at {server.url}, log {server.log_path}", flush=True)
    return server


def start_trainer(config: RecipeConfig, run_dir: Path, urls: Sequence[str]) -> Child:
    """torchrun with one process per rank."""
    print("Starting the trainer ...", flush=True)
    nproc = config.run.nproc
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(nproc), "-m", "recipes.minirl.train", str(run_dir)]
    command += ["--rollout-url", *urls]
    return Child(command, run_dir / "logs" / "trainer.log", thread_environment(config, nproc))


def thread_environment(config: RecipeConfig, num_processes: int) -> dict[str, str]:
    """How many threads each of several processes shall use."""
    threads = config.run.cpu_threads or max(1, (os.cpu_count() or 1) // num_processes)
    return {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}


def watch(trainer: Child, servers: Sequence[Server], run_dir: Path) -> None:
    """Wait for the trainer; raise if it or a server ends badly, and say how to go on."""
    try:
        while trainer.status is None:
            check_all(servers)
            time.sleep(POLL_S)
        if trainer.status == 0:
            return
        deadline = time.monotonic() + GRACE_S
        while time.monotonic() < deadline:
            check_all(servers)  # a dead server explains the trainer's complaint better than it does
            time.sleep(POLL_S)
        raise of_trainer(trainer, run_dir)
    except RoutingReplayError as error:
        if not (run_dir / "metrics.jsonl").exists():
            raise
        resume = f"Continue with: python -m recipes.minirl --run-dir {run_dir} --resume"
        raise TrainingError(str(error), fix=resume) from error


def check_all(servers: Sequence[Server]) -> None:
    """Raise if one of them has died."""
    for server in servers:
        server.check()


def of_trainer(trainer: Child, run_dir: Path) -> TrainingError:
    """The error for a trainer that failed: the message that it left, or its last lines."""
    messages = sorted(run_dir.glob("error_rank_*.txt"), key=os.path.getmtime)
    if messages:
        return TrainingError(messages[0].read_text())
    return TrainingError(
        f"the trainer ended with status {trainer.status}",
        where=trainer.log_path,
        fix=f"Its last lines:\n{trainer.last_lines()}",
    )


def result_line(run_dir: Path, seconds: float) -> str:
    """The run in one line."""
    records = journal.read(run_dir / "metrics.jsonl")
    evaluations = [r["eval/reward"] for r in records if "eval/reward" in r]
    parts = [f"{records[-1]['step']} steps in {seconds / 60:.1f} min"]
    if len(evaluations) > 1:
        gain = evaluations[-1] - evaluations[0]
        parts.append(f"held-out reward {evaluations[0]:.3f} -> {evaluations[-1]:.3f} ({gain:+.3f})")
    pairs = [
        (r["train_infer/kl_k3"], r["train_infer/kl_k3_live"])
        for r in records
        if "train_infer/kl_k3_live" in r
    ]
    if pairs:
        replayed, live = (statistics.mean(column) for column in zip(*pairs, strict=True))
        # k3 has a heavy tail, one token can outweigh a run: the median of the ratios is said too.
        ratio = statistics.median(b / a for a, b in pairs)
        parts.append(
            f"k3 KL {live:.2e} live, {replayed:.2e} as trained "
            f"({live / replayed:.1f}x; median of the steps {ratio:.1f}x)"
        )
    return "Result: " + "; ".join(parts)


if __name__ == "__main__":
    sys.exit(main())
