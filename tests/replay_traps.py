"""Traps of stock Megatron beside replay: what the rank of test_megatron_traps.py computes."""

import contextlib
from unittest import mock

import numpy as np
import torch
from replay_cases import Case
from replay_matrix import (
    NUM_MICROBATCHES,
    DispatchedRows,
    Job,
    error_of,
    random_table,
    replayed,
)

from routing_replay.config import ReplayConfig
from routing_replay.megatron import attach

R3 = ReplayConfig(mode="R3", agreement_every=0)
TRAPS = {}


def trap(function):
    TRAPS[function.__name__] = function
    return function


def provoke(rank, names):
    """{trap: what it returned}."""
    from megatron_worlds import megatron

    found = {}
    for name in names:
        with megatron(Case().layout):
            found[name] = TRAPS[name]()
    return found


def routers(job):
    from megatron.core.transformer.moe.router import TopKRouter

    return [m for chunk in job.chunks for m in chunk.modules() if isinstance(m, TopKRouter)]


def loads(job):
    """Tokens that each router counted for each of its experts."""
    return torch.stack([router.local_tokens_per_expert for router in routers(job)]).long()


@trap
def expert_bias_under_a_padding_mask():
    """Loads that Megatron counted, and those of the table's unmasked rows, counted naively."""
    job = Job(Case(router="sigmoid_bias", padding_mask=True, recompute="full"))
    found = {"stock": error_of(job.run)}
    with attach(job.chunks, R3) as replay:
        table = random_table(job, replay.shape)
        table.covered_T[:] = True
        found["outside"] = error_of(job.run)
        with replay.replaying(table):
            job.run(replay, table.rows)
        found["loads"] = loads(job)
    found["after"] = error_of(job.run)
    found["routers_are_clean"] = all("_apply_expert_bias" not in vars(r) for r in routers(job))
    # Every sequence's tokens but the last have a row; the last routes live, so it is left out here
    # and its experts (2 of every sequence and layer) are what the counts may exceed the table by.
    expected = torch.zeros_like(found["loads"])
    for place, ids_TK in enumerate(table.expert_ids_LTK):
        for expert in ids_TK.reshape(-1):
            expected[place, expert] += 1
    found["expected"], found["num_last"] = expected, len(job.batch.lengths)
    return found


@trap
def megatron_counts_in_another_way():
    """A megatron-core whose counting function is not the one that our patch was written for."""
    from megatron.core.transformer.moe.router import TopKRouter

    with_bias, without = Job(Case(router="sigmoid_bias")), Job(Case())
    found = {"stock": with_bias.run()[0]}
    with mock.patch.object(TopKRouter, "_apply_expert_bias", lambda self, routing_map: None):
        found["with_bias"] = error_of(lambda: attach(with_bias.chunks, R3))
        found["without_bias"] = error_of(lambda: attach(without.chunks, R3).remove())
    found["after"] = with_bias.run()[0]
    found["is_clean"] = all(r.router_replay is None for r in routers(with_bias))
    return found


@trap
def which_routes_a_statistic_counts():
    """Of layer 0, whose input replay does not change: loads in the aux loss, and as dispatched."""
    from megatron.core.transformer.moe import router as module

    job, found = Job(Case(router="aux_loss")), {}
    first = routers(job)[0]

    def loads_of_a_run(replay=None, rows_of=None):
        in_loss, dispatched = [], []
        stock = module.switch_load_balancing_loss_func

        def watched(*arguments, **named):
            in_loss.append(named["tokens_per_expert"].tolist())
            return stock(*arguments, **named)

        hook = first.register_forward_hook(
            lambda router, arguments, output: dispatched.append(output[1].sum(0).tolist())
        )
        with mock.patch.object(module, "switch_load_balancing_loss_func", watched):
            job.run(replay, rows_of)
        hook.remove()
        return in_loss[:: len(routers(job))], dispatched

    found["stock"] = loads_of_a_run()
    with attach(job.chunks, R3) as replay:
        table = random_table(job, replay.shape)
        with replay.replaying(table):
            found["replayed"] = loads_of_a_run(replay, table.rows)
    return found


@trap
def as_many_tokens_as_experts():
    """The stock count is wrong without a word if tokens and experts are equally many."""
    job = Job(Case(router="sigmoid_bias"))
    router = routers(job)[0]
    routing_map = torch.zeros(8, 8, dtype=torch.bool)
    routing_map[:, 2], is_padding = True, torch.arange(8) >= 6  # 8 tokens to expert 2, 2 masked
    counts = []
    for is_open in (False, True):
        router.local_tokens_per_expert.zero_()
        with attach(job.chunks, R3) as replay:
            table = random_table(job, replay.shape)
            scope = replay.replaying(table) if is_open else contextlib.nullcontext()
            with contextlib.suppress(Exception), scope:  # no microbatch: the scope complains
                router._apply_expert_bias(routing_map, padding_mask=is_padding)
        counts.append(router.local_tokens_per_expert[2].item())
    return counts


@trap
def stock_replay_object():
    """`--moe-enable-routing-replay` together with ours."""
    from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction

    job = Job(Case(), moe_enable_routing_replay=True)
    found, stock = {}, job.run()
    with attach(job.chunks, R3) as replay:
        table = random_table(job, replay.shape)
        found["idle"] = replayed(job, replay, table)
        for action in (RouterReplayAction.RECORD, RouterReplayAction.REPLAY_FORWARD):
            RouterReplay.set_global_router_replay_action(action)

            def replay_with_both_on():
                with replay.replaying(table):
                    job.run(replay, table.rows)

            def record_with_both_on():
                with replay.recording(job.batch.lengths) as recorded:
                    job.run(replay, recorded.rows)

            found[action.name] = error_of(replay_with_both_on), error_of(record_with_both_on)
        # Outside scopes Megatron's object works as if we were not there.
        RouterReplay.set_global_router_replay_action(RouterReplayAction.RECORD)
        again = job.run()
        found["delegated"] = [len(x) for x in RouterReplay.get_recorded_data()]
        RouterReplay.clear_global_router_replay_action()
        found["same"] = all(torch.equal(a, b) for a, b in zip(stock[0], again[0], strict=True))
    RouterReplay.clear_global_router_replay_instances()
    return found


@trap
def wrapped_model():
    """As Megatron's get_model returns it: each chunk inside its data-parallel wrapper."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    job = Job(Case(recompute="full"))
    settings = DistributedDataParallelConfig(use_distributed_optimizer=False)
    job.chunks = [
        DistributedDataParallel(config=job.config, ddp_config=settings, module=chunk)
        for chunk in job.chunks
    ]
    with attach(job.chunks, R3) as replay:
        wrong, calls = replayed(job, replay, random_table(job, replay.shape))
    return {"layers": replay.shape.layers, "wrong": wrong, "calls": calls}


@trap
def two_models_in_one_process():
    """Actor and reference side by side: replay in one leaves the other live, and both are exact."""
    actor, reference = Job(Case(recompute="full")), Job(Case())
    stock = reference.run()
    with attach(actor.chunks, R3) as replay, attach(reference.chunks, R3) as other:
        table = random_table(actor, replay.shape)
        oracle = DispatchedRows(actor, table)
        with replay.replaying(table):
            actor.run(replay, table.rows)
            meanwhile = reference.run()
        oracle.remove()
    same = all(torch.equal(a, b) for a, b in zip(stock[0], meanwhile[0], strict=True))
    return {"wrong": oracle.wrong, "same": same, "of_other": other.receipt}


@trap
def unset_router_fusion():
    """The fused router bypasses the seam; `unset_router_fusion` unfuses the attached routers."""
    job = Job(Case())
    job.config.moe_router_fusion = True  # Transformer Engine's kernel, missing here
    found = {"stock": error_of(job.run), "refused": error_of(lambda: attach(job.chunks, R3))}
    unset = ReplayConfig(mode="R3", agreement_every=0, unset_router_fusion=True)
    with attach(job.chunks, unset) as replay:
        table = random_table(job, replay.shape)
        found["replayed"] = replayed(job, replay, table)
        found["outside"] = error_of(job.run)
        batch = next(iter(job.batch.microbatches(table.rows)))
        with replay.replaying(table), replay.microbatch(batch["rows"]):
            output = job.chunks[0](batch["tokens"], batch["positions"], None)
        found["late"] = error_of(output.mean().backward)
    found["after"] = error_of(job.run)
    found["configs_are_shared_again"] = all(r.config is job.config for r in routers(job))
    return found


@trap
def coverage_counts_what_the_caller_counts():
    """Padding and prompts are no missing routes: coverage is over the counted tokens."""
    job = Job(Case())
    with attach(job.chunks, R3) as replay:
        table = random_table(job, replay.shape)
        batches = list(job.batch.microbatches(table.rows))
        found = {}
        for name, mask_of in (("all", None), ("response", lambda rows: response(rows))):
            with replay.replaying(table):
                for batch in batches:
                    mask = None if mask_of is None else mask_of(batch["rows"])
                    with replay.microbatch(batch["rows"], mask=mask), torch.no_grad():
                        job.chunks[0](batch["tokens"], batch["positions"], None)
            metrics = replay.metrics()
            found[name] = [
                float(metrics[f"routing_replay/{key}"].value())
                for key in ("coverage", "fallback_fraction", "replayed_rows")
            ]
        found["rows"] = [batch["rows"].numpy() for batch in batches]
    assert len(batches) == NUM_MICROBATCHES
    return found


def response(rows):
    """The last 6 tokens of the first sequence, up to its end; nothing of the second."""
    counts = torch.zeros(rows.shape, dtype=torch.bool)
    counts[0, 10:16] = True
    return counts


def naive_coverage(rows_of_batches, is_counted):
    """Share of counted tokens that have a row."""
    taken = [rows[is_counted(rows)] for rows in rows_of_batches]
    return float(np.mean(np.concatenate(taken) >= 0))
