"""The recipe's server_group: the trainer's end of a group, with a rank in a server's place."""

import time
from datetime import timedelta

import torch
from torch.distributed import PrefixStore, TCPStore, distributed_c10d
from torch_ranks import start_ranks

from recipes.minirl.publish.server_group import ServerGroup


def receive(rank, port, name, folder):
    """Join as SGLang's `init_custom_process_group` does, take a broadcast, wait for another."""
    store = PrefixStore(name, TCPStore("127.0.0.1", port, is_master=False))
    group, _ = distributed_c10d._new_process_group_helper(
        2,
        1,
        [],
        distributed_c10d.Backend("gloo"),
        store,
        group_name=name,
        backend_options=None,
        timeout=timedelta(seconds=60),
    )
    distributed_c10d._world.pg_group_ranks[group] = {0: 0, 1: 1}
    values = torch.zeros(3, dtype=torch.uint8)
    torch.distributed.broadcast(values, group_src=0, group=group)
    (folder / "values").write_bytes(bytes(values.tolist()))
    try:
        torch.distributed.broadcast(values, group_src=0, group=group)
    except RuntimeError:
        (folder / "ended").touch()


def test_a_rank_that_waits_for_a_broadcast_is_free_once_the_trainer_leaves(tmp_path):
    group = ServerGroup("127.0.0.1", "a-group", 2, timeout_s=20)
    ranks = start_ranks(receive, (group.port, "a-group", tmp_path), 1, join=False)
    group.wait()
    group.broadcast(torch.tensor([1, 2, 3], dtype=torch.uint8))
    while not (tmp_path / "values").exists():
        time.sleep(0.05)
    group.close()  # and is still referred to here
    assert ranks.join(timeout=20)
    assert (tmp_path / "values").read_bytes() == bytes([1, 2, 3])
    assert (tmp_path / "ended").exists()
