"""What replay costs in verl and SkyRL: theirs, ours, and none, on the tiny model.

    .venv-frameworks/bin/python tests/frameworks/measure_replays.py [--rounds 5]

Each framework's own replay patches Megatron for good, so every arm of a round is a process of its
own; the arms take turns, every other round in reverse order. Times are of the processor, memory is
what tensors and arrays take at most during a pass. Nothing here holds for a GPU.
"""

from __future__ import annotations

import argparse
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).parent.parent.parent
sys.path[:0] = [str(ROOT / folder) for folder in ("tests/frameworks", "tests", ".")]

import conftest  # noqa: E402, F401
import tiny_batch  # noqa: E402
import torch  # noqa: E402
from megatron_worlds import run_world  # noqa: E402

from tools.bench.paired import spread  # noqa: E402

# "blind": ours, without the comparison of live with replayed routes.
ARMS = ("none", "theirs", "blind", "ours")
NUM_SEQUENCES, LENGTH, MICRO_BATCH = 8, 128, 2
REPEATS = 2  # of a pass within a round, after one that warms up


def verl_passes(arm: str, checkpoint: str) -> dict[str, Callable[[], Any]]:
    """verl's passes over one batch; its micro-batches hold two sequences."""
    import verl_worker

    from recipes.model.parallel import ParallelLayout

    settings = {"use_dynamic_bsz": False, "micro_batch_size_per_gpu": MICRO_BATCH}
    own = verl_worker.own_replay("R3") if arm == "theirs" else {}
    made = verl_worker.worker(checkpoint, ParallelLayout(), stock=arm in ("none", "theirs"), **own)
    tokens, routed = sequences()
    if arm == "theirs":
        settings["enable_routing_replay"] = True
    fields = tokens, None if arm == "none" else routed
    return {
        "log-probs": lambda: verl_worker.log_probs(made, verl_worker.batch_of(*fields, **settings)),
        "update": lambda: verl_worker.gradients(made, verl_worker.batch_of(*fields, **settings)),
    }


def skyrl_passes(arm: str, checkpoint: str) -> dict[str, Callable[[], Any]]:
    """SkyRL's packed passes over one batch."""
    import skyrl_model
    from skyrl.backends.skyrl_train.workers.megatron import megatron_model_wrapper

    from recipes.model.parallel import ParallelLayout
    from routing_replay.adapters import skyrl

    if arm in ("blind", "ours"):
        skyrl.patch_wrapper(megatron_model_wrapper)
    made = skyrl_model.wrapper(checkpoint, ParallelLayout(), packed=True)
    tokens, routed = sequences()

    def batches() -> Any:
        return skyrl_model.micro_batches(MICRO_BATCH, None if arm == "none" else routed, tokens)

    return {
        "log-probs": lambda: skyrl_model.log_probs(made, batches()),
        "update": lambda: skyrl_model.gradients(made, batches())[0],
    }


PASSES = {"verl": verl_passes, "skyrl": skyrl_passes}


def sequences() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Random tokens and the routes of each: int16 [n, L, K]; the last token was never fed."""
    generator = torch.Generator().manual_seed(11)
    shape = (NUM_SEQUENCES, LENGTH)
    tokens = list(torch.randint(1, tiny_batch.VOCAB, shape, generator=generator))
    return tokens, tiny_batch.captured_whole(tokens)


def run_arm(rank: int, framework: str, arm: str, checkpoint: str) -> dict[str, Any]:
    """Seconds, peak bytes and outputs of one arm's passes."""
    import os

    from recipes.model import parallel
    from recipes.model.parallel import ParallelLayout

    os.environ["ROUTING_REPLAY_AGREEMENT_EVERY"] = "0" if arm == "blind" else "1"
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    parallel.initialize(ParallelLayout(), seed=1)
    results: dict[str, Any] = {}
    for name, one_pass in PASSES[framework](arm, checkpoint).items():
        seconds = []
        for _ in range(REPEATS + 1):
            started = time.process_time()
            output = one_pass()
            seconds.append(time.process_time() - started)
        results[name] = {
            "seconds": min(seconds[1:]),
            "tensor_bytes": peak_of_tensors(one_pass),
            "array_bytes": peak_of_arrays(one_pass),
            "output": output,
        }
    return results


def peak_of_tensors(function: Callable[[], Any]) -> int:
    """The most bytes of tensors that a call adds at a time."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        function()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def peak_of_arrays(function: Callable[[], Any]) -> int:
    """The most bytes of Python's objects and numpy's arrays that a call adds at a time."""
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    function()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak - before


def largest_difference(output: Any, other: Any) -> float:
    """Between tensors, or between gradients as a share of the largest gradient of a parameter."""
    if isinstance(output, torch.Tensor):
        return float((output.float() - other.float()).abs().max())
    shares = []
    for name, gradient in output.items():
        scale = float(other[name].abs().max()) or 1.0
        shares.append(float((gradient.float() - other[name].float()).abs().max()) / scale)
    return max(shares)


def report(framework: str, rounds: list[dict[str, Any]]) -> None:
    for name in ("log-probs", "update"):
        print(f"\n{framework}, {name}: {NUM_SEQUENCES} x {LENGTH} tokens")
        last = {arm: rounds[-1][arm][name] for arm in ARMS}
        for arm in ARMS:
            figures = [round_[arm][name]["seconds"] for round_ in rounds]
            ratios = [s / r["none"][name]["seconds"] for s, r in zip(figures, rounds, strict=True)]
            mib = [last[arm][kind] / 2**20 for kind in ("tensor_bytes", "array_bytes")]
            print(
                f"  {arm:7} {spread(figures)} s, over none {spread(ratios)}, "
                f"tensors {mib[0]:.2f} MiB, arrays {mib[1]:.2f} MiB"
            )
        shares = [r["ours"][name]["seconds"] / r["theirs"][name]["seconds"] for r in rounds]
        print(f"  ours over theirs {spread(shares)}")
        for arm in ("theirs", "none"):
            difference = largest_difference(last["ours"]["output"], last[arm]["output"])
            print(f"  largest difference of ours from {arm}: {difference:.3g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--frameworks", nargs="*", default=list(PASSES))
    arguments = parser.parse_args()
    with TemporaryDirectory() as folder:
        checkpoint = tiny_batch.write_checkpoint(Path(folder))
        for framework in arguments.frameworks:
            rounds = []
            for number in range(arguments.rounds):
                order = ARMS if number % 2 else ARMS[::-1]
                entry = "measure_replays:run_arm"
                results = {}
                for arm in order:
                    (results[arm],) = run_world(entry, 1, framework, arm, checkpoint)
                    seconds = {name: r["seconds"] for name, r in results[arm].items()}
                    print(f"{framework}, round {number}, {arm}: {seconds} s", flush=True)
                rounds.append(results)
            report(framework, rounds)


if __name__ == "__main__":
    main()
