"""recipes.minirl.first_rank: the other ranks wait for rank 0, and end with it."""

import time

import pytest
import torch.distributed as dist
import torch.multiprocessing as mp

from recipes.minirl.first_rank import FirstRank

WORK_S = 0.5


def in_world(rank, port, folder):
    """One of two ranks; rank 0 holds the store, as torchrun's agent does."""
    store = dist.TCPStore("127.0.0.1", port, is_master=rank == 0, wait_for_workers=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    first_rank = FirstRank(folder / "scratch")
    waits_for_rank_0(first_rank, rank, folder)
    (folder / f"rank_{rank}").touch()
    first_rank.run("died", fail)


def write_after_a_while(path):
    time.sleep(WORK_S)
    path.write_text("complete")
    return {"reward": 1.0}


def fail():
    raise RuntimeError("the server died")


def waits_for_rank_0(first_rank, rank, folder):
    step = first_rank.new_folder("step")
    start = time.monotonic()
    metrics = first_rank.run("sampled", write_after_a_while, step / "batch")
    assert (step / "batch").read_text() == "complete"
    assert metrics == ({"reward": 1.0} if rank == 0 else {})
    assert time.monotonic() - start >= WORK_S / 2
    first_rank.keep(step, folder / "last")
    dist.barrier()
    assert (folder / "last" / "batch").read_text() == "complete"


def free_port():
    """A port that the system has chosen; held by nobody for a moment."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    return store.port


@pytest.mark.timeout(120)
def test_other_ranks_go_on_when_rank_0_is_done_and_end_when_it_dies(tmp_path):
    context = mp.spawn(in_world, (free_port(), tmp_path), nprocs=2, join=False)
    for process in context.processes:
        process.join(60)
    assert {path.name for path in tmp_path.glob("rank_*")} == {"rank_0", "rank_1"}
    # Rank 0 ends with its error; its store goes with it, and so does the wait of rank 1.
    assert all(process.exitcode not in (0, None) for process in context.processes)
