"""Cases of the replay matrix with the kernel in place of the routers' functions.

As the matrix itself (see replay_matrix.py), but sums round otherwise in the kernel: losses and
gradients are compared with those of the torch form to float32 rounding. What is dispatched, the
receipt, and the stock model outside of scopes stay exact.
"""

import dataclasses
import os
import unittest.mock

import replay_matrix
from megatron_worlds import megatron
from replay_cases import Case
from replay_matrix import error_of

# Of the largest value of a tensor: 4 layers of wide weights amplify float32 rounding.
TOLERANCE = 5e-5


def run(rank, cases):
    """Entry of a spawned rank: findings of the cases, and what becomes of a fused router."""
    wrong = []
    for case in cases:
        with megatron(case.layout):
            wrong += [f"rank {rank}, {case.name}: {text}" for text in check_case(case)]
    with megatron(Case().layout):
        return {
            "wrong": wrong,
            "layers": one_layer(),
            "fused": fused_routers(),
            "refused": refusals(),
        }


def run_ranks(rank, cases, captured):
    """Entry of a spawned rank: findings of the cases, some of them as a CUDA graph runs them."""
    import captured_checks

    wrong = captured_checks.run(rank, captured, has_kernel=True)
    for case in cases:
        with megatron(case.layout):
            wrong += [f"rank {rank}, {case.name}: {text}" for text in check_case(case)]
    return wrong


def one_layer():
    """Replay one layer of four, and compare the kernel with the torch form."""
    from routing_replay.config import ReplayConfig
    from routing_replay.megatron import attach

    job = replay_matrix.Job(Case(recompute="moe"))
    runs, receipts, table = [], [], None
    for kernel in (False, True):
        config = ReplayConfig(mode="R3", agreement_every=0, kernel=kernel)
        with attach(job.chunks, config) as replay:
            table = table or replay_matrix.random_table(job, replay.shape)
            with replay.replaying(table, layers=replay.shape.layers[1:2]):
                runs.append(job.run(replay, table.rows))
            receipts.append(str(replay.receipt))
    return {"wrong": far_apart("one layer", *runs), "receipts": receipts}


def fused_routers():
    """Replay with a fused router, whose kernel (Transformer Engine's) is missing here."""
    from routing_replay.config import ReplayConfig
    from routing_replay.megatron import attach

    job = replay_matrix.Job(Case())
    job.config.moe_router_fusion = True
    results = {"stock": error_of(job.run)}
    config = ReplayConfig(mode="R3", agreement_every=0, kernel=True)
    with attach(job.chunks, config) as replay:
        table = replay_matrix.random_table(job, replay.shape)
        results["replayed"] = replay_matrix.replayed(job, replay, table)
        results["outside"] = error_of(job.run)
    with attach(job.chunks, dataclasses.replace(config, mode="R2")) as replay:
        with replay.recording(job.batch.lengths) as recorded:  # by the unfused function
            job.run(replay, recorded.rows)
        results["recorded"] = bool(recorded.table().covered_T.all())
    results["after"] = error_of(job.run)
    return results


def refusals():
    """How a kernel is refused where it cannot run, and a router that it does not know."""
    from megatron.core.transformer.moe.router import TopKRouter

    from routing_replay.config import ReplayConfig
    from routing_replay.megatron import attach

    job = replay_matrix.Job(Case())
    config = ReplayConfig(mode="R3", kernel=True)
    routing = TopKRouter.routing
    TopKRouter.routing = lambda self, logits, padding_mask=None: routing(self, logits, padding_mask)
    try:
        unknown = error_of(lambda: attach(job.chunks, config))
    finally:
        TopKRouter.routing = routing
    with unittest.mock.patch.dict(os.environ):
        os.environ.pop("TRITON_INTERPRET", None)
        no_gpu = error_of(lambda: attach(job.chunks, config))
    attach(job.chunks, config).remove()  # nothing was left behind
    return {"unknown router": unknown, "no GPU": no_gpu}


def check_case(case: Case) -> list[str]:
    """Run one case on this rank; returns what is wrong."""
    from routing_replay.config import ReplayConfig
    from routing_replay.megatron import attach

    job = replay_matrix.Job(case)
    stock = job.run()
    r2 = ReplayConfig(mode="R2", agreement_every=1, agreement_tokens=8, kernel=True)
    with attach(job.chunks, r2) as replay:
        wrong = replay_matrix.differences("attached, off", stock, job.run())
        with replay.recording(job.batch.lengths) as recorded:
            recording = job.run(replay, recorded.rows)
        wrong += replay_matrix.differences("recording", stock, recording)
        table = recorded.table()
        with replay.replaying(table):
            again = job.run(replay, table.rows)
        wrong += far_apart("own routes replayed", stock, again)
        wrong += replay_matrix._own_agreement(replay)
    config = dataclasses.replace(r2, mode="R3")
    with attach(job.chunks, config) as replay:
        wrong += replay_matrix._random_routes(job, replay)
        table = replay_matrix.random_table(job, replay.shape)
        with replay.replaying(table, record_live=True) as live:
            ours = job.run(replay, table.rows)
        live_ids_LTK = live.table().expert_ids_LTK
    with attach(job.chunks, dataclasses.replace(config, kernel=False)) as replay:
        with replay.replaying(table, record_live=True) as live:
            torch_form = job.run(replay, table.rows)
        if not (live.table().expert_ids_LTK == live_ids_LTK).all():
            wrong.append("live routes beside a replay")
    wrong += far_apart("random routes", torch_form, ours)
    return wrong + replay_matrix.differences("removed", stock, job.run())


def far_apart(what, expected, found):
    """Names of what differs by more than rounding."""
    losses = [
        (f"loss {n}", *pair) for n, pair in enumerate(zip(expected[0], found[0], strict=True))
    ]
    gradients = [(name, grad, found[1][name]) for name, grad in expected[1].items()]
    wrong = []
    for name, one, other in losses + gradients:
        if one is None or not one.any():
            continue
        apart = ((one - other).abs().max() / one.abs().max()).item()
        if not apart <= TOLERANCE:
            wrong.append(f"{what}: {name} differs by {apart:.1e} of its largest value")
    return wrong
