"""Disturb a training run at random points, and compare it with an undisturbed one.

    python -m tools.chaos --points 50

Two real servers behind proxies, the recipe's launcher, two trainer ranks. Servers are killed and
stopped, answers are damaged, delayed, withheld and aborted, ranks and the launcher are killed, the
disk is full. Where a run must end, it ends with an error that says why, and is resumed. In the end

- every step stands in the metrics once, and every response of every step was stored once;
- a second run, undisturbed and from the same responses, has the same metrics and, bit for bit, the
  same weights.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import psutil
import torch
from safetensors.torch import load_file

from recipes.minirl.rollout.answers import FOLDER
from recipes.serving.kept import KeptServer
from recipes.serving.server import ServerOptions

from .kept import kept_answers
from .points import POINTS, World, fill_disk, free_disk
from .proxy import Proxy, no_fault

PROMPTS, SAMPLES = 4, 4
FLAGS = [
    *("--warmup-target", "0", "--heldout-limit", "4", "--tiny-layers", "2", "--nproc", "2"),
    *("--prompts-per-step", str(PROMPTS), "--samples-per-prompt", str(SAMPLES)),
    *("--minibatch-size", "8", "--microbatch-size", "4", "--max-new-tokens", "64"),
    *("--checkpoint-every", "3", "--health-every-s", "5", "--server-recovery-s", "300"),
    *("--request-timeout-s", "120", "--routing-replay-capture", "ids"),
]
STEPS_PER_POINT, FEWEST_STEPS = 3, 8
# Metrics that two runs from the same responses need not share.
OWN = ("time", "rollout/servers", "rollout/server", "rollout/stored", "rollout/continued", "eval/")
LONGEST_RUN_S = 1200.0
WAIT_S = (0.0, 1.0)  # a step takes half a second at least


class ChaosError(Exception):
    """A run that did not end as it should."""


def main(argv: list[str] | None = None) -> int:
    """Run, and print what was done."""
    parser = argparse.ArgumentParser(prog="python -m tools.chaos", description=__doc__)
    parser.add_argument("--points", type=int, default=50, help="points at which it is disturbed")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of the points")
    parser.add_argument("--ahead", type=int, default=0, help="as of the recipe")
    parser.add_argument("--folder", type=Path, help="kept, with the logs; a temporary one if empty")
    arguments = parser.parse_args(argv)
    start = time.monotonic()
    with contextlib.ExitStack() as stack:
        folder = arguments.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        done, num_resumes = disturb(
            folder.absolute(), arguments.points, arguments.seed, arguments.ahead
        )
    for name, count in sorted(done.items()):
        print(f"{count:4d} x {name}")
    print(
        f"{sum(done.values())} points, {num_resumes} resumes, the same weights as the undisturbed "
        f"run; {time.monotonic() - start:.0f} s"
    )
    return 0


def disturb(folder: Path, num_points: int, seed: int, ahead: int = 0) -> tuple[Counter[str], int]:
    """Run with faults, run without, compare; return the faults and the number of resumes.

    Args:
        folder: For everything.
        num_points: Faults.
        seed: Of their choice.
        ahead: Steps whose rollouts run ahead.

    Raises:
        ChaosError: What was not as it should be.
    """
    num_steps = FEWEST_STEPS + STEPS_PER_POINT * num_points
    flags = [*FLAGS, *_prompts(folder), "--steps", str(num_steps), "--ahead", str(ahead)]
    flags += ["--cache-dir", str(folder / "cache")]
    flags += ["--publish-pause", "retract"] if ahead > 1 else []
    run_dir, kept = folder / "disturbed", folder / "kept"
    kept.mkdir(parents=True)
    with contextlib.ExitStack() as stack:
        model = _tiny_model(folder, flags)
        servers = [stack.enter_context(_server(model, folder, n)) for n in range(2)]
        proxies = [stack.enter_context(Proxy(server.url)) for server in servers]
        urls = [proxy.url for proxy in proxies]
        world = World(rng=random.Random(seed), servers=servers, proxies=proxies, run_dir=run_dir)
        command = [*flags, "--rollout-url", *urls]
        with kept_answers(run_dir, kept):
            done, num_resumes = _disturbed(world, command, num_points)
        for proxy in proxies:
            proxy.fault_of = no_fault
        shutil.copytree(kept, folder / "plain" / FOLDER)
        log = open(folder / "plain.log", "ab")  # noqa: SIM115
        plain = subprocess.Popen(
            _launch(folder / "plain", [*command, "--checkpoint-every", "0"]), stdout=log, stderr=log
        )
        stack.callback(plain.kill)
        if plain.wait(LONGEST_RUN_S):
            raise ChaosError((folder / "plain.log").read_text()[-3000:])
    _compare(run_dir, folder / "plain", num_steps)
    _check_stored(kept, num_steps)
    return done, num_resumes


def _disturbed(world: World, flags: list[str], num_points: int) -> tuple[Counter[str], int]:
    done: Counter[str] = Counter()
    at_step = world.rng.randint(1, STEPS_PER_POINT)
    for life in range(num_points + 2):
        log_path = world.run_dir.with_name("disturbed.log")
        begin = log_path.stat().st_size if log_path.exists() else 0
        with open(log_path, "ab") as log:
            command = _launch(world.run_dir, ["--resume"] if life else flags)
            process = subprocess.Popen(command, stdout=log, stderr=log)
        world.launcher = psutil.Process(process.pid)
        last, deadline = None, time.monotonic() + LONGEST_RUN_S
        due_s = None
        while process.poll() is None:
            if time.monotonic() > deadline:
                process.kill()
                raise ChaosError(f"the run hangs after {last}: {_text(log_path, begin)}")
            world.keep()
            if due_s is None and _num_records(world.run_dir) >= at_step:
                due_s = time.monotonic() + world.rng.uniform(*WAIT_S)
            num_done = sum(done.values())
            if due_s and time.monotonic() > due_s and num_done < num_points and world.ranks():
                point = world.rng.choice(POINTS)
                point(world)
                last, due_s = point.__name__, None
                done[last] += 1
                at_step = STEPS_PER_POINT * (num_done + 1) + world.rng.randint(1, STEPS_PER_POINT)
                print(f"{time.strftime('%H:%M:%S')} {last}", flush=True)
            time.sleep(0.05)
        free_disk(world)
        if process.returncode == 0:
            if sum(done.values()) < num_points:
                raise ChaosError(f"the run ended after {sum(done.values())} of {num_points} points")
            return done, life
        text = _text(log_path, begin)
        is_killed = process.returncode < 0
        if not is_killed and "\nerror: " not in text:
            raise ChaosError(f"no clear error after {last}:\n{text[-3000:]}")
        if done[fill_disk.__name__] and "No space left" in text:
            print("  ended by the full disk, as it should", flush=True)
    raise ChaosError(f"the run did not end: {_text(log_path, begin)[-3000:]}")


def _compare(disturbed: Path, plain: Path, num_steps: int) -> None:
    """Raise unless both runs have the same metrics and the same weights."""
    records = [_records(folder) for folder in (disturbed, plain)]
    steps = [[record["step"] for record in each] for each in records]
    if steps != [list(range(num_steps + 1))] * 2:
        raise ChaosError(f"the steps on record are {steps}")
    stored = [record.get("rollout/stored_responses") for record in records[1][1:]]
    if stored != [PROMPTS * SAMPLES] * num_steps:
        raise ChaosError(f"the undisturbed run sampled for itself; it had {stored} responses")
    for one, other in zip(*records, strict=True):
        for name in sorted(one.keys() | other.keys()):
            if not name.startswith(OWN) and one.get(name) != other.get(name):
                raise ChaosError(
                    f"step {one['step']}: {name} is {one.get(name)}, undisturbed {other.get(name)}"
                )
    if not any(record.get("grad_norm") for record in records[0]):
        raise ChaosError("no step had a gradient: nothing was compared")
    last = f"checkpoints/step_{num_steps:06d}"
    for path in sorted((plain / last).glob("*.safetensors")):
        weights, others = load_file(path), load_file(disturbed / last / path.name)
        for name, weight in weights.items():
            if not torch.equal(weight, others[name]):
                raise ChaosError(f"the weights of {name} differ")


def _check_stored(kept: Path, num_steps: int) -> None:
    """Raise unless each response of each step was stored once."""
    for step in range(1, num_steps + 1):
        keys = Counter(
            (path.name, json.loads(line)["key"])
            for path in (kept / f"step_{step:06d}").iterdir()
            for line in path.read_text().splitlines()
        )
        if len(keys) != PROMPTS * SAMPLES or max(keys.values()) > 1:
            raise ChaosError(
                f"step {step} has {len(keys)} responses, at most {max(keys.values())} times"
            )


def _num_records(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def _records(run_dir: Path) -> list[dict[str, object]]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def _text(log_path: Path, begin: int) -> str:
    with open(log_path, "rb") as log:
        log.seek(begin)
        return log.read().decode(errors="replace")


def _launch(run_dir: Path, flags: list[str]) -> list[str]:
    return [sys.executable, "-m", "recipes.minirl", "--run-dir", str(run_dir), *flags]


def _server(model: Path, folder: Path, number: int) -> KeptServer:
    options = ServerOptions(
        log_path=folder / f"server_{number}.log",
        arguments=("--dtype", "bfloat16", "--skip-tokenizer-init", "--log-level", "warning"),
        environment={"OMP_NUM_THREADS": "1"},
    )
    return KeptServer(model, options, num_restarts=1000, restart_after_s=1e9)


def _tiny_model(folder: Path, flags: list[str]) -> Path:
    """Make the tiny model without a run: the launcher would make it too, but servers need it."""
    run_dir = folder / "prepared"
    subprocess.run(
        [*_launch(run_dir, flags), "--prepare-only"], check=True, stdout=subprocess.DEVNULL
    )
    (model,) = (folder / "cache").glob("tiny-*")
    return model


def _prompts(folder: Path) -> list[str]:
    """Write prompts of which random weights solve some: the answer is that a sum is empty."""
    paths = folder / "train.jsonl", folder / "heldout.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    for path, numbers in zip(paths, (range(10, 60), range(60, 99)), strict=True):
        lines = [{"prompt": f"{a}+{a}=", "answer": "", "verifier": "exact"} for a in numbers]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return ["--prompts", str(paths[0]), "--heldout-prompts", str(paths[1])]


if __name__ == "__main__":
    sys.exit(main())
