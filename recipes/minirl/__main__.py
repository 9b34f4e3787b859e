"""The launcher, `python -m recipes.minirl`: prepare a run, start server and trainer, watch both."""

from __future__ import annotations

import json
import signal
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from recipes.serving.children import Child
from recipes.serving.kept import STATE_FILE, read_absences
from routing_replay.errors import ConfigError, RoutingReplayError, writing
from routing_replay.files import atomic_write
from routing_replay.report.page import write_report

from .data.inputs import load_inputs
from .job import journal
from .launch import commands, slurm
from .launch.commands import thread_environment
from .launch.processes import LaunchedServer, LaunchedTrainer, TrainingError, machines_of
from .settings.command_line import parse_command
from .settings.config import RecipeConfig

POLL_S = 0.25
# How long the other side of a broken connection gets to report its own error.
GRACE_S = 3.0


def main(argv: Sequence[str] | None = None) -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        command = parse_command(argv)
        match command.action:
            case "run":
                run(command.config)
            case "prepare":
                config, run_dir = prepare(command.config)
                print(commands.text(config, run_dir))
                print(f"All of it as one SLURM job:\n  sbatch {slurm.write_job(config, run_dir)}")
            case "dry-run":
                from .launch.plan import plan_text  # it imports Megatron, which takes many seconds

                print(plan_text(resolve_mode(command.config)))
    except RoutingReplayError as error:
        print(f"\nerror: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    return 0


def run(config: RecipeConfig) -> None:
    """Prepare, start the servers, train, report."""
    start = time.monotonic()
    with machines_of(config) as machines:
        config, run_dir = prepare(config)
        servers: Sequence[LaunchedServer] = ()
        if not config.rollout.rollout_url:
            print("Starting SGLang (about 30 s without a GPU) ...", flush=True)
            servers = machines.start_servers(config, run_dir)
        urls = config.rollout.rollout_url or [server.url for server in servers]
        print("Starting the trainer ...", flush=True)
        watch(machines.start_trainer(config, run_dir, urls), servers, run_dir)
    report = run_dir / "report.html"
    write_report([run_dir], report)
    print(result_line(run_dir, time.monotonic() - start))
    print(f"Report: {report}")


def prepare(config: RecipeConfig) -> tuple[RecipeConfig, Path]:
    """Resolve the configuration, make the run's folder and, if needed, the tiny model."""
    config = resolve_mode(config)
    journal.check_telemetry(config.telemetry)
    run_dir = open_run(config)
    print(f"Run: {run_dir}", flush=True)
    make_tiny_model(config, run_dir)
    load_inputs(config)
    return config, run_dir


def resolve_mode(config: RecipeConfig) -> RecipeConfig:
    """Resolve `auto` and print the reason."""
    ahead = config.rollout.ahead
    resolved = config.replay.resolve(config.num_mini_batches, version_lag=ahead)
    if resolved.mode != config.replay.mode:
        print(
            f"Routing replay: auto chose {resolved.mode}, for global batch / mini batch = "
            f"{config.batch_size} / {config.training.minibatch_size} = {config.num_mini_batches}"
            + (f" and rollouts {ahead} version ahead" if ahead else "")
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
    with writing(run_dir, "the run's folder", ConfigError):
        run_dir.mkdir(parents=True, exist_ok=True)
        with atomic_write(run_dir / "config.json") as partial:
            partial.write_text(json.dumps(config.to_mapping(), indent=2) + "\n")
    for stale in (*run_dir.glob("error_rank_*.txt"), run_dir / STATE_FILE):
        stale.unlink(missing_ok=True)
    return run_dir


def make_tiny_model(config: RecipeConfig, run_dir: Path) -> None:
    """Make the tiny model in a child process: its memory is free again before the engines start."""
    if config.model.model != "tiny":
        return
    command = [sys.executable, "-m", "recipes.minirl.data.tiny_model", str(run_dir / "config.json")]
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


def watch(trainer: LaunchedTrainer, servers: Sequence[LaunchedServer], run_dir: Path) -> None:
    """Wait for the trainer; start servers again; raise if either fails, with how to resume."""
    try:
        while trainer.status is None:
            keep_all(servers, run_dir)
            time.sleep(POLL_S)
        if trainer.status == 0:
            return
        deadline = time.monotonic() + GRACE_S
        while time.monotonic() < deadline:
            for server in servers:  # a dead one explains the trainer's complaint better
                server.check()
            time.sleep(POLL_S)
        raise trainer.error()
    except RoutingReplayError as error:
        if not (run_dir / "metrics.jsonl").exists():
            raise
        resume = f"Continue with: python -m recipes.minirl --run-dir {run_dir} --resume"
        raise TrainingError(str(error), fix=resume) from error


def keep_all(servers: Sequence[LaunchedServer], run_dir: Path) -> None:
    """Start dead and hanging servers again; raise for one that was started too often."""
    absences = read_absences(run_dir / STATE_FILE) if servers else {}
    for server in servers:
        if server.keep(absences.get(server.url)):
            print(f"SGLang is started again at {server.url}", flush=True)


def result_line(run_dir: Path, seconds: float) -> str:
    """Describe the run in one line."""
    records = journal.read(run_dir / "metrics.jsonl")
    evaluations = [r["eval/reward"] for r in records if "eval/reward" in r]
    parts = [f"{records[-1]['step']} steps in {seconds / 60:.1f} min"]
    if len(evaluations) > 1:
        gain = evaluations[-1] - evaluations[0]
        parts.append(f"held-out reward {evaluations[0]:.3f} -> {evaluations[-1]:.3f} ({gain:+.3f})")
    lag = journal.version_lag(records[-1])
    kls = [journal.kl_of(r) for r in records if journal.version_lag(r) == lag]
    pairs = [(a, b) for a, b in kls if a is not None and b is not None]
    if pairs:
        replayed, live = (statistics.mean(column) for column in zip(*pairs, strict=True))
        # k3 has a heavy tail: one token can outweigh a run, which the median of the ratios shows.
        ratio = statistics.median(b / a for a, b in pairs)
        parts.append(
            f"k3 KL {live:.2e} live, {replayed:.2e} as trained "
            f"({live / replayed:.1f}x; median of the steps {ratio:.1f}x)"
            + (f" at version lag {lag}" if lag else "")
        )
    return "Result: " + "; ".join(parts)


if __name__ == "__main__":
    sys.exit(main())
