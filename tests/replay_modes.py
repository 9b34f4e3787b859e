"""Modes and handles of replay, and what a step costs: what the rank of test_megatron_modes.py does.

Each function of `CHECKS` returns numbers; the tests state what they must be.
"""

import contextlib
import types
from unittest import mock

import numpy as np
import torch
from replay_cases import Case
from replay_matrix import Job, random_table

from routing_replay.config import ReplayConfig
from routing_replay.errors import ConfigError
from routing_replay.megatron import attach
from routing_replay.metrics.typed import to_floats

CHECKS = {}


def check(function):
    CHECKS[function.__name__] = function
    return function


def run(rank, names):
    """{check: what it returned}."""
    from megatron_worlds import megatron

    with megatron(Case().layout):
        return {name: CHECKS[name]() for name in names}


def seams(job):
    """What stands at the replay seam of each router."""
    from megatron.core.transformer.moe.router import TopKRouter

    modules = [m for chunk in job.chunks for m in chunk.modules() if isinstance(m, TopKRouter)]
    return [type(router.router_replay).__name__ for router in modules]


def same(one, other):
    """Whether two steps are bitwise equal: losses, then gradients."""
    losses = all(torch.equal(a, b) for a, b in zip(one[0], other[0], strict=True))
    return losses and all(torch.equal(one[1][name], other[1][name]) for name in one[1])


@check
def disabled():
    """The loop of R2 and of R3 under mode disabled."""
    job = Job(Case(recompute="full"))
    stock, found = job.run(), {}
    with attach(job.chunks, ReplayConfig(mode="disabled")) as replay:
        found["seams"] = seams(job)
        found["hooks"] = len(job.chunks[0]._forward_pre_hooks)
        with replay.recording(job.batch.lengths) as recorded:
            found["recording"] = same(stock, job.run(replay, recorded.rows))
        table = recorded.table()
        found["covered"] = int(table.covered_T.sum())
        with replay.replaying(random_table(job, replay.shape), record_live=True) as beside:
            found["replaying"] = same(stock, job.run(replay, table.rows))
        found["covered_beside"] = int(beside.own_table().covered_T.sum())
        with replay.replaying(table) as nothing, replay.live(), replay.watching(None):
            found["yields"] = nothing
        found["metrics"], found["shape"] = replay.metrics(), replay.shape
    return found


@check
def disabled_on_a_dense_model():
    """Its preflight error says: leave routing replay disabled for dense models."""
    job = Job(Case(dense=(0, 1, 2, 3)))
    stock = job.run()
    with attach(job.chunks, ReplayConfig(mode="disabled")) as replay:
        again = job.run(replay)
    return same(stock, again), replay.shape.layers


@check
def entering_and_leaving():
    """A microbatch by plain calls, against the same by `with`."""
    job = Job(Case(recompute="full"))
    with attach(job.chunks) as replay:
        table = random_table(job, replay.shape)

        @contextlib.contextmanager
        def plain(rows):
            replay.enter_microbatch(rows)
            yield
            replay.leave_microbatch()

        with replay.replaying(table):
            expected = job.run(replay, table.rows)
        receipt = replay.receipt
        with replay.replaying(table):
            found = job.run(types.SimpleNamespace(microbatch=plain), table.rows)
        outside = replay.enter_microbatch("not even rows"), replay.leave_microbatch()
    return same(expected, found), receipt == replay.receipt, outside


@check
def live_rows_in_a_recomputation():
    """Experts of the rows without routes, in the forward and after the routers have moved."""
    job = Job(Case(recompute="full"))
    routers = [layer.mlp.router for layer in job.chunks[0].decoder.layers]
    maps = {False: [], True: []}

    def keep(router, arguments, output):
        is_recompute = torch._C._current_graph_task_id() != -1
        maps[is_recompute].append((router.layer_number, output[1].clone()))

    hooks = [router.register_forward_hook(keep) for router in routers]
    with attach(job.chunks) as replay:
        table = random_table(job, replay.shape)
        batch = next(iter(job.batch.microbatches(table.rows)))
        with replay.replaying(table):
            with replay.microbatch(batch["rows"]):
                output = job.chunks[0](batch["tokens"], batch["positions"], None)
            for router in routers:
                router.weight.data = router.weight.data.flip(0)
            output.float().mean().backward()
    for hook in hooks:
        hook.remove()
    live_T = batch["rows"].t().reshape(-1) < 0
    forward, again = dict(maps[False]), dict(maps[True])
    moved = [not torch.equal(forward[i][live_T], again[i][live_T]) for i in forward]
    return {"live": int(live_T.sum()), "layers": len(again), "moved": sum(moved)}


@check
def copies_to_the_host():
    """How many copies bring a step's live routes home: recorded, and beside replay."""
    from routing_replay.megatron import passes

    job, found = Job(Case()), {}
    counting = mock.patch.object(passes, "to_host", side_effect=passes.to_host)
    with counting as copy, attach(job.chunks, ReplayConfig(mode="R2")) as replay:
        with replay.recording(job.batch.lengths) as recorded:
            job.run(replay, recorded.rows, forward_only=True)
        found["recording"] = copy.call_count
        table = recorded.table()
        with replay.replaying(table, record_live=True) as beside:
            job.run(replay, table.rows, forward_only=True)
        found["replaying"] = copy.call_count - found["recording"]
    equal = np.sort(beside.table().expert_ids_LTK) == np.sort(table.expert_ids_LTK)
    return found | {"same": bool(equal.all())}


@check
def router_shift():
    """What RSPO remembers of a pass, and gamma against the definition, row by row."""
    from routing_replay.megatron.router_shift import RouterShift

    job, logs = Job(Case()), []
    routers = [layer.mlp.router for layer in job.chunks[0].decoder.layers]

    def keep(router, arguments, output):
        logits_TE = router.gating(arguments[0]).reshape(-1, output[1].shape[1])
        logs[-1].append((logits_TE.log_softmax(-1).double(), output[1]))

    with attach(job.chunks) as replay, torch.no_grad():
        table = random_table(job, replay.shape)
        shift = RouterShift(replay)
        hooks = [router.register_forward_hook(keep) for router in routers]
        for scope in (shift.remembering(table.num_rows), shift.comparing()):
            logs.append([])
            with scope, replay.replaying(table):
                job.run(replay, table.rows, forward_only=True)
            for router in routers:
                router.weight += 0.01 * torch.randn_like(router.weight)
        for hook in hooks:
            hook.remove()
    gamma_R = shift.gamma().numpy()
    rows = [b["rows"].t().reshape(-1) for b in job.batch.microbatches(table.rows)]
    expected_R = np.full(table.num_rows, np.nan)
    for number, rows_T in enumerate(rows):
        calls = zip(*(part[4 * number : 4 * number + 4] for part in logs), strict=True)
        moved_LT = torch.stack([((a - b).abs() * took).sum(1) / 2 for (a, took), (b, _) in calls])
        has_row_T = (rows_T >= 0).numpy()
        expected_R[rows_T[has_row_T]] = (-moved_LT.mean(0)).exp()[has_row_T].numpy()
    [memory] = shift._memory.values()
    sizes = {"ids": str(memory.ids_LMK.dtype), "index": str(memory.index_R.dtype)}
    return {"gamma": gamma_R, "expected": expected_R} | sizes


# Several ranks: every data-parallel rank has its own sequences, and so another table.


def tables_of_data_parallel_ranks(rank, layouts):
    """{layout: metrics and recordings with one table for all, and with a table for each}."""
    from megatron_worlds import megatron

    found = {}
    for name, layout in layouts.items():
        with megatron(layout):
            job = Job(Case(layout=layout, is_ragged=True))
            found[name] = _metrics_of_tables(job) | _recordings_of_tables(job)
    return found


def _metrics_of_tables(job):
    with attach(job.chunks, ReplayConfig(agreement_tokens=0)) as replay:
        shared = random_table(job, replay.shape)
        with replay.replaying(shared):
            job.run(replay, shared.rows)
        of_shared = to_floats(replay.metrics())
        own, first = _own(job, shared)
        with replay.replaying(own):
            job.run(replay, lambda s, n: own.rows(s - first, n))
        of_own = to_floats(replay.metrics())
    return {"shared": of_shared, "own": of_own, "num_rows": own.num_rows}


def _own(job, table):
    """The table of this data-parallel rank's sequences, and the first of them."""
    first, stop = 2 * job.batch.mine.start, 2 * job.batch.mine.stop
    routes = [table.sequence(s) for s in range(first, stop)]
    return type(table).from_routes(routes, source=table.source), first


def _recordings_of_tables(job):
    found, first = {}, 2 * job.batch.mine.start
    lengths = job.batch.lengths[first : 2 * job.batch.mine.stop]
    with attach(job.chunks, ReplayConfig(mode="R2")) as replay:
        with replay.recording(job.batch.lengths) as recorded:
            job.run(replay, recorded.rows, forward_only=True)
        whole, part = recorded.table(), None
        expected, _ = _own(job, whole)
        with replay.recording(job.batch.lengths) as recorded:
            job.run(replay, recorded.rows, forward_only=True)
        part = recorded.own_table()
        with replay.recording(lengths, is_shared=False) as recorded:
            job.run(replay, lambda s, n: recorded.rows(s - first, n), forward_only=True)
        alone = recorded.table()
        again = recorded.own_table()
        with replay.recording(lengths) as recorded:
            job.run(replay, lambda s, n: recorded.rows(s - first, n), forward_only=True)
        try:
            recorded.table()
        except Exception as error:
            found["different_lengths"] = type(error).__name__, str(error)
    own_R = np.zeros(whole.num_rows, bool)
    own_R[whole.offsets_S1[first] : whole.offsets_S1[2 * job.batch.mine.stop]] = True
    found["part"] = np.array_equal(part.covered_T, own_R) and np.array_equal(
        part.expert_ids_LTK[:, own_R], whole.expert_ids_LTK[:, own_R]
    )
    found["others_are_empty"] = not part.expert_ids_LTK[:, ~own_R].any()
    for name, table in (("alone", alone), ("again", again)):
        found[name] = bool(table.covered_T.all()) and np.array_equal(
            table.expert_ids_LTK, expected.expert_ids_LTK
        )
    return found


@check
def some_layers():
    """Layers 1 and 2 replay drawn routes; what no layer, all layers and the receipt say."""
    job = Job(Case(recompute="full"))
    stock, result = job.run(), {}
    with attach(job.chunks) as replay:
        table = random_table(job, replay.shape)
        for name, layers in (("none", ()), ("some", (1, 2)), ("all", range(4)), ("default", None)):
            with replay.replaying(table, layers=layers):
                result[name] = job.run(replay, table.rows)
            lines = replay.receipt.lines
            result[f"{name} replayed"] = sorted({x.layer for x in lines if x.num_replayed})
        try:
            with replay.replaying(table, layers=(3, 4)):
                pass
        except ConfigError as error:
            result["error"] = str(error)
    result["none is stock"] = same(stock, result.pop("none"))
    result["all is the default"] = same(result["all"], result.pop("default"))
    result["some is between"] = [
        same(result["some"], other) for other in (stock, result.pop("all"))
    ]
    del result["some"]
    return result
