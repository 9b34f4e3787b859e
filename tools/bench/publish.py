"""Publishing weights: seconds against bytes, through a disk, in buckets and in shared memory.

    python -m tools.bench.publish [--layers 4] [--hidden 1024] [--folder FOLDER] [--server]
    torchrun --standalone --nproc-per-node 4 -m tools.bench.publish --pipeline 2 --expert 2 --server

A Qwen3-MoE in bfloat16, on one rank or on those of torchrun. Turns, on one disk:

    write      one file of the bytes, written and synchronised
    gathered   a checkpoint that rank 0 gathers tensor by tensor, and writes
    shares     a checkpoint of which each rank writes what it holds
    fp8        as shares, in block FP8 that is quantized on this machine's CPU

With --server, until a real SGLang server on this machine has the bfloat16 weights:

    disk, gathered / disk, shares      written as above, and loaded by the server
    buckets                            broadcast to the server in buckets of --bucket-mb
    tensors                            read by the server in the memory of the ranks

Wall time ends when all ranks have. Processor time is that of the busiest rank, not the server's.
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
from typing import Any

import torch
import torch.distributed as dist

from recipes.model import parallel
from recipes.model.buckets import Buckets
from recipes.model.fp8 import Form
from recipes.model.model import build_model, transformer_config
from recipes.model.saving import save_hf, written_tensors
from recipes.model.tiny import tiny_config
from recipes.model.weights import named_hf_tensors

from .paired import finish, parse, parser, ratios, spread, take_turns

Chunks = list[torch.nn.Module]
Works = dict[str, Callable[[], object]]


def model_and_config(arguments: argparse.Namespace) -> tuple[Chunks, Any]:
    """Return this rank's chunks of a bfloat16 model, and its Hugging Face configuration."""
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
    layout = parallel.ParallelLayout(pipeline=arguments.pipeline, expert=arguments.expert)
    parallel.initialize(layout, seed=1)
    config = transformer_config(hf, layout, dtype=torch.bfloat16, spec="local")
    return list(build_model(config, layout)), hf


class Meter:
    """Measures what all ranks do together.

    Its `busiest_s` are, by name, the processor seconds of the busiest rank of each call.
    """

    def __init__(self) -> None:
        self.busiest_s: dict[str, list[float]] = {}

    def of(self, name: str, work: Callable[[], object]) -> Callable[[], float]:
        """Return a function that runs `work` on all ranks and returns its wall seconds."""

        def run() -> float:
            dist.barrier()
            started, started_cpu = time.perf_counter(), time.process_time()
            work()
            own_s = time.process_time() - started_cpu
            dist.barrier()
            wall_s = time.perf_counter() - started
            self.busiest_s.setdefault(name, []).append(max(of_all_ranks(own_s)))
            return wall_s

        return run


def of_all_ranks(value: Any) -> list[Any]:
    """Return a value of each rank."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def checkpoints(chunks: Chunks, folder: Path) -> Works:
    """Return the ways to write a checkpoint; "source" in the folder has the configuration."""

    def save(name: str, form: Form = "checkpoint") -> None:
        tensors = named_hf_tensors(chunks) if name == "gathered" else None
        save_hf(chunks, folder / name, source=folder / "source", form=form, tensors=tensors)

    return {
        "gathered": lambda: save("gathered"),
        "shares": lambda: save("shares"),
        "fp8": lambda: save("fp8", "fp8"),
    }


@contextlib.contextmanager
def served(arguments: argparse.Namespace, chunks: Chunks, folder: Path) -> Iterator[Works]:
    """Start a server of a model; give the ways to update it."""
    from recipes.minirl.publish.broadcasts import Broadcasts
    from recipes.minirl.publish.shared_tensors import SharedTensors
    from recipes.minirl.publish.weight_sender import WeightSender
    from routing_replay.rollout import RolloutClient
    from routing_replay.rollout.streaming import WeightStream

    with contextlib.ExitStack() as stack:
        url = [launched(folder / "shares", stack) if dist.get_rank() == 0 else ""]
        dist.broadcast_object_list(url)
        client = RolloutClient(url) if dist.get_rank() == 0 else None
        stream = None if client is None else WeightStream(client)
        broadcasts, shared = Broadcasts(stream, url, timeout_s=600), SharedTensors(stream)
        versions, saves = itertools.count(1), checkpoints(chunks, folder)

        def by_disk(name: str) -> None:
            saves[name]()
            if client is not None:
                client.update_weights(str(folder / name), next(versions))

        def by(sender: WeightSender) -> None:
            buckets = Buckets(chunks, arguments.bucket_mb << 20)
            error = sender.send(buckets, next(versions), lambda tensors: tensors)
            if error:
                raise SystemExit(error)

        yield {
            "disk, gathered": lambda: by_disk("gathered"),
            "disk, shares": lambda: by_disk("shares"),
            "buckets": lambda: by(broadcasts),
            "tensors": lambda: by(shared),
        }
        broadcasts.leave()


def launched(checkpoint: Path, stack: contextlib.ExitStack) -> str:
    """Start a server; return its URL."""
    from recipes.serving.server import ServerOptions, launch

    options = ServerOptions(
        arguments=("--dtype", "bfloat16", "--max-total-tokens", "512"),
        environment={"OMP_NUM_THREADS": "1"},
    )
    return stack.enter_context(launch(checkpoint, options)).url


def write(path: Path, num_bytes: int) -> None:
    """Write so many bytes on rank 0 and wait for the disk."""
    if dist.get_rank():
        return
    block = bytes(1 << 24)
    with open(path, "wb") as file:
        for start in range(0, num_bytes, len(block)):
            file.write(block[: num_bytes - start])
        file.flush()
        os.fsync(file.fileno())


def main(argv: Sequence[str] | None = None) -> None:
    """Time all ways in turns."""
    made = parser(__doc__)
    sizes = {"layers": 4, "hidden": 1024, "experts": 64, "expert-width": 512, "vocabulary": 32768}
    layout = {"pipeline": 1, "expert": 1}
    for name, default in (sizes | layout | {"rounds": 5, "bucket-mb": 128}).items():
        made.add_argument(f"--{name}", type=int, default=default)
    made.add_argument("--server", action="store_true", help="also update a real SGLang server")
    made.add_argument("--folder", help="on the disk that is measured; a temporary one by default")
    quick = {"layers": 1, "hidden": 256, "experts": 4, "expert_width": 128, "vocabulary": 256}
    arguments = parse(made, argv, quick | {"rounds": 1})
    chunks, hf = model_and_config(arguments)
    with contextlib.ExitStack() as stack:
        folders = [stack.enter_context(tempfile.TemporaryDirectory(dir=arguments.folder))]
        dist.broadcast_object_list(folders)
        folder = Path(folders[0])
        if dist.get_rank() == 0:
            hf.architectures = ["Qwen3MoeForCausalLM"]
            hf.save_pretrained(folder / "source")
        dist.barrier()
        measure(arguments, chunks, folder, stack)
        dist.barrier()
    parallel.destroy()


def measure(
    arguments: argparse.Namespace, chunks: Chunks, folder: Path, stack: contextlib.ExitStack
) -> None:
    """Take the turns; print and keep their figures."""
    sizes = of_all_ranks(sum(tensor.nbytes for _, tensor in written_tensors(chunks)))
    works: Works = {"write": lambda: write(folder / "plain", sum(sizes))}
    works |= checkpoints(chunks, folder)
    if arguments.server:
        works["shares"]()  # the server's first weights
        works |= stack.enter_context(served(arguments, chunks, folder))
    meter = Meter()
    variants = {name: meter.of(name, work) for name, work in works.items()}
    times = take_turns(variants, arguments.rounds)
    if dist.get_rank():
        return
    to_write, figures = ratios(times, "write"), {}
    print(f"{sum(sizes) / 1e9:.2f} GB in bfloat16, {max(sizes) / 1e9:.2f} of them on one rank")
    print("| what | s | / write | processor s |\n| --- | --- | --- | --- |")
    for name in variants:
        seconds, ratio = spread(times[name]), to_write[name]
        busiest = spread(meter.busiest_s[name][1:])  # the first call warms up
        figures[name] = {"s": seconds, "to_write": ratio, "busiest_s": busiest}
        print(f"| {name} | {seconds} | {ratio} | {busiest} |")
    finish("publish", arguments, figures | {"bytes_of_ranks": sizes})


if __name__ == "__main__":
    main()
