"""What the rank of the world in `test_gpu_replay.py` computes; a CPU takes the place of a GPU."""

from __future__ import annotations

import contextlib

import torch
from megatron_worlds import megatron
from replay_cases import cases
from replay_matrix import Job, check_case, random_table

from recipes.model.parallel import ParallelLayout
from routing_replay.config import ReplayConfig
from routing_replay.megatron import attach


def matrix(rank, names):
    """Run the named configurations; the findings of each."""
    by_name = {case.name: case for case in cases(1)}
    findings = {}
    for name in names:
        with megatron(by_name[name].layout):
            findings[name] = check_case(by_name[name])
    return findings


def without_determinism(rank, rounds):
    """How many of so many stock passes equal the first bitwise, and how many replayed ones."""
    torch.use_deterministic_algorithms(False)
    with megatron(ParallelLayout()):
        job = Job(cases(1)[0])
        stock = [job.run()[0] for _ in range(rounds + 1)]
        with attach(job.chunks, ReplayConfig(mode="R2", agreement_every=0)) as replay:
            with replay.recording(job.batch.lengths) as recorded:
                job.run(replay, recorded.rows)
            table = recorded.table()
            replayed = []
            for _ in range(rounds + 1):
                with replay.replaying(table):
                    replayed.append(job.run(replay, table.rows)[0])
    return {
        "stock": sum(_equal(stock[0], losses) for losses in stock[1:]),
        "replayed": sum(_equal(replayed[0], losses) for losses in replayed[1:]),
    }


def syncs(rank):
    """Errors of the routers' part of a pass that waits for the device; None where it does not."""
    with megatron(ParallelLayout()):
        job = Job(cases(1)[0])
        weight = next(job.chunks[0].parameters())
        routers = [m for m in job.chunks[0].modules() if type(m).__name__ == "TopKRouter"]
        chunk = Routers(routers)
        config = ReplayConfig(mode="R3", agreement_every=1, agreement_tokens=4)
        with attach(chunk, config) as replay:
            table = random_table(job, replay.shape)
            rows_T = torch.arange(16)
            hidden = torch.randn(16, 1, job.config.hidden_size).to(weight)
            with replay.replaying(table, record_live=True):
                with replay.microbatch(rows_T):  # allocates pinned buffers
                    chunk(hidden)
                with replay.microbatch(rows_T), _sync_is_an_error():
                    chunk(hidden)
    return True


class Routers(torch.nn.Module):
    """Routers alone as a model chunk; what Megatron itself waits for is not in it."""

    def __init__(self, routers):
        super().__init__()
        self.routers = torch.nn.ModuleList(routers)

    def forward(self, hidden):
        return sum(router(hidden)[0].float().sum() for router in self.routers)


@contextlib.contextmanager
def _sync_is_an_error():
    if not torch.cuda.is_available():
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _equal(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))
