"""recipes.minirl.job.first_rank: the other ranks wait for rank 0, and end with it."""

import os
import signal
import threading
import time

import pytest
import torch
import torch.distributed as dist
from torch_ranks import start_ranks

from recipes.minirl.job import node_files
from recipes.minirl.job.first_rank import FirstRank
from recipes.minirl.node import require_alike
from recipes.serving.ports import HeldPort
from routing_replay.errors import ConfigError, DataError

WORK_S = 0.5
NODES = (0, 0, 1)  # of the three ranks


def write_after_a_while(path):
    time.sleep(WORK_S)
    path.write_text("complete")
    return {"reward": 1.0}


def fail():
    raise RuntimeError("the server died")


def waits_for_rank_0(first_rank, rank, folder):
    start = time.monotonic()
    metrics = first_rank.run("sampled", write_after_a_while, folder / "sampled")
    assert NODES[rank] == 1 or (folder / "sampled").read_text() == "complete"
    assert metrics == ({"reward": 1.0} if rank == 0 else {})
    assert time.monotonic() - start >= WORK_S / 2


def goes_on_while_rank_0_works(first_rank, rank):
    released = threading.Event()

    def work():
        assert threading.current_thread() is not threading.main_thread()
        released.wait(30)
        return {"reward": 2.0}

    pending = first_rank.begin("begun", work)
    sum_1 = torch.ones(1)
    dist.all_reduce(sum_1)
    assert sum_1.item() == len(NODES)
    released.set()
    # Waiting once more gives the same.
    assert pending.wait() == pending.wait() == ({"reward": 2.0} if rank == 0 else {})
    for thread in threading.enumerate():
        if thread.name == "begun":
            thread.join(5)
            assert not thread.is_alive()


def in_nodes(rank, port, folder):
    """One of three ranks on two nodes; rank 0 holds the store, as torchrun's agent does."""
    node = NODES[rank]
    os.environ["GROUP_RANK"] = str(node)
    store = dist.TCPStore("127.0.0.1", port, is_master=rank == 0, wait_for_workers=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=len(NODES))
    node_files.CHUNK_BYTES = 1000
    folder = folder / f"disk_{node}"
    first_rank = FirstRank(folder / "scratch")
    waits_for_rank_0(first_rank, rank, folder)
    goes_on_while_rank_0_works(first_rank, rank)
    errors = {
        "files": raised(files_of_rank_0_are_where_they_are_needed, first_rank, folder),
        "full disk": raised(a_node_cannot_write, first_rank, node),
        "full of parts": raised(a_node_cannot_write_a_part, first_rank, node),
        "other configuration": raised(require_alike, {"steps": 10 + node, "run_dir": folder}),
        "other folder": raised(require_alike, {"steps": 10, "run_dir": folder}),
    }
    first_rank.close()
    dist.barrier()
    left = sorted(path.name for path in folder.iterdir())
    torch.save({"errors": errors, "left": left}, folder / f"outcome_{rank}.pt")
    first_rank.run("died", fail)


def raised(work, *arguments):
    try:
        work(*arguments)
    except (DataError, ConfigError) as error:
        return str(error)
    return None


def files_of_rank_0_are_where_they_are_needed(first_rank, folder):
    contents = {"batch": os.urandom(2500), "empty": b""}
    contents |= {f"part_{n}": os.urandom(1000 * n) for n in range(4)}
    step = first_rank.new_folder("step")

    def write():
        for name, content in contents.items():
            (step / name).write_bytes(content)

    first_rank.run("written", write)
    first_rank.share(step, ["batch", "empty", "an index that this step lacks"])
    needed = (["part_0"], ["part_1"], ["part_3", "part_0"])[dist.get_rank()]
    first_rank.share_parts(step, needed)
    box = [contents]
    dist.broadcast_object_list(box)
    expected = box[0]
    if NODES[dist.get_rank()] == 1:
        expected = {n: expected[n] for n in ("batch", "empty", "part_0", "part_3")}
    assert {path.name: path.read_bytes() for path in step.iterdir()} == expected
    first_rank.keep(step, folder / "last")
    assert not step.exists() or dist.get_rank() == 1  # the first rank of a node removes it


def a_node_cannot_write(first_rank, node):
    step = first_rank.new_folder("full")
    if node == 1 and dist.get_rank() == 2:
        (step / "batch").mkdir()  # cannot be replaced by a file
    first_rank.run("written again", lambda: (step / "batch").write_bytes(bytes(5000)) and None)
    first_rank.share(step, ["batch"])


def a_node_cannot_write_a_part(first_rank, node):
    step = first_rank.new_folder("full of parts")
    if node == 1 and dist.get_rank() == 2:
        (step / "part").mkdir()
    first_rank.run("written parts", lambda: (step / "part").write_bytes(bytes(5000)) and None)
    first_rank.share_parts(step, ["part"])


@pytest.fixture(scope="module")
def of_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nodes")
    for node in range(2):
        (folder / f"disk_{node}").mkdir()
    with HeldPort() as port:
        context = start_ranks(in_nodes, (port, folder), len(NODES), join=False)
        for process in context.processes:
            process.join(60)
    return [
        torch.load(folder / f"disk_{node}" / f"outcome_{rank}.pt") | {"status": process.exitcode}
        for rank, (node, process) in enumerate(zip(NODES, context.processes, strict=True))
    ]


def test_other_ranks_go_on_when_rank_0_is_done_and_end_when_it_dies(of_ranks):
    # All came to the end of what they do before. Then rank 0 ends with its error; its store goes
    # with it, and so does the wait of the others.
    assert all(outcome["status"] not in (0, None) for outcome in of_ranks)


def test_nodes_with_disks_of_their_own_get_the_files_of_rank_0(of_ranks):
    assert [outcome["errors"]["files"] for outcome in of_ranks] == [None] * 3
    # Only the node of rank 0 keeps the newest step, and no node its scratch folder.
    assert "last" in of_ranks[0]["left"] and "last" not in of_ranks[2]["left"]
    assert not any("scratch" in outcome["left"] for outcome in of_ranks)


def test_a_node_that_cannot_write_is_named_on_every_rank(of_ranks):
    for outcome in of_ranks:
        for name in ("full disk", "full of parts"):
            error = outcome["errors"][name]
            assert "a node could not write the files of a step" in error
            assert "[node 1, " in error and "--scratch-dir" in error


def test_machines_with_other_settings_are_refused_on_every_rank(of_ranks):
    for outcome in of_ranks:
        assert (
            "disagree on 'steps'; expected 10, as on node 0; got 11 [node 1]"
            in (outcome["errors"]["other configuration"])
        )
        assert outcome["errors"]["other folder"] is None


def fails_with_a_cause():
    try:
        fail()
    except RuntimeError as error:
        raise DataError("the rollout failed", got=error) from error


def begun_alone(rank, port, folder):
    """One rank: its begun work fails; then it is interrupted while other work goes on."""
    os.environ["GROUP_RANK"] = "0"
    store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    first_rank = FirstRank(folder / "scratch")
    pending = first_rank.begin("fails", fails_with_a_cause)
    with pytest.raises(DataError, match="the rollout failed; got the server died") as caught:
        pending.wait()
    assert isinstance(caught.value.__cause__, RuntimeError)
    # Whoever runs the tests in the background ignores it, and its children inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    endless = first_rank.begin("endless", time.sleep, 600)
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    (folder / "interrupted").touch()
    endless.wait()


def test_an_error_of_begun_work_is_raised_with_its_cause_and_an_interrupt_does_not_wait(tmp_path):
    with HeldPort() as port:
        context = start_ranks(begun_alone, (port, tmp_path), 1, join=False)
        (process,) = context.processes
        process.join(60)
    # It did not wait for the 600 s of its begun work.
    assert process.exitcode is not None
    assert (tmp_path / "interrupted").exists()
