"""Publishing weights against writing as many bytes: what gathering and converting add to the disk.

    python -m tools.bench.publish [--layers 4] [--hidden 1024] [--folder FOLDER] [--server]

One rank, a Qwen3-MoE. Rank 0 of a job does the same with more to gather: one tensor after another
to the host, a file of 4 GiB at a time, each on the disk before the next. Turns, on one disk:

    bfloat16   as the servers of a bfloat16 rollout get them
    fp8        as block FP8, with the quantization on this machine's CPU
    write      one file of the bfloat16 bytes, written and synchronised

With --server two more, until a real SGLang server on this machine has the bfloat16 weights:

    disk       written as above, and loaded by the server
    buckets    broadcast to the server in buckets of --bucket-mb
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from recipes.model import parallel
from recipes.model.buckets import Buckets
from recipes.model.model import build_model, transformer_config
from recipes.model.tiny import tiny_config
from recipes.model.weights import save_hf

from .paired import finish, parse, parser, ratios, spread, take_turns


def model_and_config(arguments: argparse.Namespace) -> tuple[list[torch.nn.Module], object]:
    """Return the chunks of a bfloat16 model, and its Hugging Face configuration."""
    sizes = {"heads": max(2, arguments.hidden // 128), "groups": 2, "head_dim": 128}
    hf = tiny_config(
        layers=arguments.layers,
        hidden=arguments.hidden,
        experts=arguments.experts,
        top_k=2,
        vocab=arguments.vocabulary,
        expert_size=arguments.expert_width,
        **sizes,
    )
    layout = parallel.ParallelLayout()
    config = transformer_config(hf, layout, dtype=torch.bfloat16, spec="local")
    return list(build_model(config, layout)), hf


def wall(work: Callable[[], object]) -> Callable[[], float]:
    """Return a function that runs `work` and returns its seconds; a disk needs no processor."""

    def run() -> float:
        started = time.perf_counter()
        work()
        return time.perf_counter() - started

    return run


@contextlib.contextmanager
def served(
    arguments: argparse.Namespace, chunks: list[torch.nn.Module], folder: Path
) -> Iterator[dict[str, Callable[[], object]]]:
    """Start a server of a model; give both ways to update it.

    Args:
        arguments: With the size of a bucket.
        chunks: The model.
        folder: Of its checkpoints; "source" has its configuration.
    """
    from recipes.minirl.publish.weight_stream import WeightSender
    from recipes.serving.server import ServerOptions, launch
    from routing_replay.rollout import RolloutClient
    from routing_replay.rollout.streaming import WeightStream

    save_hf(chunks, folder / "first", source=folder / "source")
    options = ServerOptions(
        arguments=("--dtype", "bfloat16", "--max-total-tokens", "512"),
        environment={"OMP_NUM_THREADS": "1"},
    )
    with launch(folder / "first", options) as server:
        client = RolloutClient([server.url])
        sender = WeightSender(WeightStream(client), [server.url], timeout_s=600)
        versions = itertools.count(1)

        def by_disk() -> None:
            save_hf(chunks, folder / "published", source=folder / "source")
            client.update_weights(str(folder / "published"), next(versions))

        def by_buckets() -> None:
            buckets = Buckets(chunks, arguments.bucket_mb << 20)
            error = sender.send(buckets, next(versions), lambda tensors: tensors)
            if error:
                raise SystemExit(error)

        yield {"disk": by_disk, "buckets": by_buckets}
        sender.leave()


def write(path: Path, num_bytes: int) -> None:
    """Write so many bytes and wait for the disk."""
    block = bytes(1 << 24)
    with open(path, "wb") as file:
        for start in range(0, num_bytes, len(block)):
            file.write(block[: num_bytes - start])
        file.flush()
        os.fsync(file.fileno())


def main(argv: Sequence[str] | None = None) -> None:
    """Time the three in turns."""
    made = parser(__doc__)
    sizes = {"layers": 4, "hidden": 1024, "experts": 64, "expert-width": 512, "vocabulary": 32768}
    for name, default in (sizes | {"rounds": 5, "bucket-mb": 128}).items():
        made.add_argument(f"--{name}", type=int, default=default)
    made.add_argument("--server", action="store_true", help="also update a real SGLang server")
    made.add_argument("--folder", help="on the disk that is measured; a temporary one by default")
    quick = {"layers": 1, "hidden": 256, "experts": 4, "expert_width": 128, "vocabulary": 256}
    arguments = parse(made, argv, quick | {"rounds": 1})
    parallel.initialize(parallel.ParallelLayout(), seed=1)
    chunks, hf = model_and_config(arguments)
    num_bytes = sum(p.numel() * p.element_size() for chunk in chunks for p in chunk.parameters())
    with contextlib.ExitStack() as stack:
        name = stack.enter_context(tempfile.TemporaryDirectory(dir=arguments.folder))
        folder = Path(name)
        hf.architectures = ["Qwen3MoeForCausalLM"]  # type: ignore[attr-defined]
        hf.save_pretrained(folder / "source")  # type: ignore[attr-defined]

        def publish(name: str) -> None:
            save_hf(chunks, folder / name, source=folder / "source", is_fp8=name == "fp8")

        variants = {
            "bfloat16": wall(lambda: publish("bfloat16")),
            "fp8": wall(lambda: publish("fp8")),
            "write": wall(lambda: write(folder / "plain", num_bytes)),
        }
        if arguments.server:
            updates = stack.enter_context(served(arguments, chunks, folder))
            variants |= {name: wall(update) for name, update in updates.items()}
        times = take_turns(variants, arguments.rounds)
    to_write, gigabytes = ratios(times, "write"), num_bytes / 1e9
    print(f"{gigabytes:.2f} GB in bfloat16\n| what | s | / write |\n| --- | --- | --- |")
    figures = {}
    for name in variants:
        figures[name] = {"s": spread(times[name]), "to_write": to_write[name]}
        print(f"| {name} | {figures[name]['s']} | {to_write[name]} |")
    finish("publish", arguments, figures | {"gb": gigabytes})
    parallel.destroy()


if __name__ == "__main__":
    main()
