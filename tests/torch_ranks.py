"""Processes for tests of collectives: forked from one that has imported torch, for 2 s of each."""

import torch.multiprocessing as mp


def start_ranks(function, arguments, num_ranks, *, join=True):
    """Run `function(rank, *arguments)` in so many processes; without `join` return torch's context.

    Args:
        function: At the top level of a module.
        arguments: Pickled.
        num_ranks: How many processes.
        join: Whether to wait for their end; the first exception of a rank is raised.
    """
    mp.get_context("forkserver").set_forkserver_preload(["torch"])
    return mp.start_processes(
        function, tuple(arguments), num_ranks, join=join, start_method="forkserver"
    )
