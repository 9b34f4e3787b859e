"""What the ranks of one world do with SkyRL; the tests look at what they return."""

from __future__ import annotations

import contextlib
import os
from typing import Any

import skyrl_model
import tiny_batch
import torch
from skyrl_model import gradients, log_probs, micro_batches, wrapper
from witness import Witness

from recipes.model import parallel
from recipes.model.parallel import ParallelLayout
from routing_replay.errors import RoutingReplayError

LAYOUTS = {
    1: {"one": ParallelLayout()},
    2: {
        "pp2": ParallelLayout(pipeline=2),
        "cp2": ParallelLayout(context=2),
        "tp2": ParallelLayout(tensor=2, expert_tensor=1),
    },
}


def run(rank: int, nproc: int, checkpoint: str) -> dict[str, dict[str, Any]]:
    """Results of every layout and packing, by name."""
    results: dict[str, dict[str, Any]] = {}
    for name, layout in LAYOUTS[nproc].items():
        with _groups(layout):
            results[name] = compared(checkpoint, layout, packed=True)
            if name == "one":
                results["padded"] = compared(checkpoint, layout, packed=False)
    first = next(iter(LAYOUTS[nproc].values()))
    with _groups(first):
        results["r2"] = r2(checkpoint, first)
        results["accumulated"] = accumulated(checkpoint, first)
        results["bad"] = bad_inputs(checkpoint, first, rank)
    return results


def compared(checkpoint: str, layout: ParallelLayout, packed: bool) -> dict[str, Any]:
    """Log-probs and gradients of one model: live, by SkyRL's own replay, and by ours."""
    made = wrapper(checkpoint, layout, packed)
    tokens = tiny_batch.sequences(0)
    cut, whole = tiny_batch.captured(tokens), tiny_batch.captured_whole(tokens)
    results: dict[str, Any] = {"live": log_probs(made, micro_batches(2, None))}
    for size in (1, 2):
        results[f"skyrl_{size}"] = log_probs(made, micro_batches(size, whole))
    results["skyrl_gradients"], _ = gradients(made, micro_batches(1, whole))
    witness = Witness(made.actor_module, tiny_batch.expected_maps(tokens))
    with skyrl_model.patched():
        for size in (1, 2):
            results[f"ours_{size}"] = log_probs(made, micro_batches(size, whole))
        witness.reset()
        results["cut"] = log_probs(made, micro_batches(2, cut))
        results["witness"] = witness.counts()
        results["gradients"], results["metrics"] = gradients(made, micro_batches(1, whole))
    results["live_again"] = log_probs(made, micro_batches(2, None))
    return results


def r2(checkpoint: str, layout: ParallelLayout) -> dict[str, Any]:
    """The old policy's pass records; the update replays it with routers that were turned over."""
    made = wrapper(checkpoint, layout, packed=True)
    tokens = tiny_batch.sequences(0)
    witness = Witness(made.actor_module, tiny_batch.expected_maps(tokens))
    with _environment(ROUTING_REPLAY_MODE="R2"), skyrl_model.patched():
        log_probs(made, micro_batches(1, None))
        witness.demand_what_was_seen([sequence[-1] for sequence in tokens])
        gradients(made, micro_batches(2, None))
        return witness.counts()


def accumulated(checkpoint: str, layout: ParallelLayout) -> dict[str, Any]:
    """Gradients of two mini-batches before one update, and those of each."""
    made = wrapper(checkpoint, layout, packed=True)
    whole = tiny_batch.captured_whole(tiny_batch.sequences(0))
    first, second = ([micro] for micro in micro_batches(3, whole))
    with skyrl_model.patched():
        return {
            "together": gradients(made, first, second)[0],
            "apart": [gradients(made, part)[0] for part in (first, second)],
        }


def bad_inputs(checkpoint: str, layout: ParallelLayout, rank: int) -> dict[str, Any]:
    """The error of each bad input on this rank; the job goes on after each."""
    made = wrapper(checkpoint, layout, packed=True)
    tokens = tiny_batch.sequences(0)
    routed = tiny_batch.captured_whole(tokens)
    foreign = [routes.clone() for routes in routed]
    if rank == 0:  # on one rank only: the other must not wait for it
        foreign[1][3, 2, 0] = tiny_batch.EXPERTS
    cases = {
        "foreign": foreign,
        "layers": [routes[:, :3] for routes in routed],
        "none": None if rank == 0 else routed,
        "uncovered": [torch.zeros_like(routes) for routes in routed],
    }
    with skyrl_model.patched():
        log_probs(made, micro_batches(2, routed))
        errors: dict[str, Any] = {
            name: _error(lambda r=r: log_probs(made, micro_batches(2, r)))
            for name, r in cases.items()
        }
        config = skyrl_model.megatron_model_wrapper.get_model_config(made.actor_module[0])
        config.moe_enable_routing_replay = False
        errors["key"] = _error(lambda: gradients(made, micro_batches(2, routed)))
        config.moe_enable_routing_replay = True
        witness = Witness(made.actor_module, tiny_batch.expected_maps(tokens))
        log_probs(made, micro_batches(2, routed)[::2])  # a filter dropped the others
        errors["after_drop"] = witness.counts()
        errors["none_of_these"] = _error(lambda: log_probs(made, micro_batches(2, routed)))
    return errors


@contextlib.contextmanager
def _groups(layout: ParallelLayout):
    parallel.initialize(layout, seed=1)
    try:
        yield
    finally:
        parallel.destroy(keep_world=True)


@contextlib.contextmanager
def _environment(**values: str):
    before = {name: os.environ[name] for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.update(before)


def _error(call: Any) -> str:
    try:
        call()
    except RoutingReplayError as error:
        return str(error)
    return "no error"
