"""Every misuse and every failure of a step, provoked on a real model; each returns what was raised.

One spawned rank runs all that are asked for (see test_megatron_replay.py). After each one the model
must be stock again: its loss is compared bitwise with the loss from before.
"""

import dataclasses

import torch
from replay_cases import Case
from replay_matrix import Job, random_table

from routing_replay.config import ReplayConfig
from routing_replay.megatron import attach

R3 = ReplayConfig(mode="R3")
FAILURES = {}


def failure(function):
    FAILURES[function.__name__] = function
    return function


@dataclasses.dataclass
class Bench:
    """What a failure gets to play with."""

    job: Job
    replay: object
    table: object

    def batches(self):
        return list(self.job.batch.microbatches(self.table.rows))

    def forward(self, batch):
        return self.job.chunks[0](batch["tokens"], batch["positions"], None, labels=batch["tokens"])


@failure
def rows_out_of_range(bench):
    rows = torch.full((2, 16), bench.table.num_rows)
    with bench.replay.replaying(bench.table), bench.replay.microbatch(rows):
        pass


@failure
def rows_of_the_wrong_length(bench):
    batch = bench.batches()[0]
    with (
        bench.replay.replaying(bench.table),
        bench.replay.microbatch(batch["rows"][:, :-1].contiguous()),
    ):
        bench.forward(batch)


@failure
def rows_on_the_wrong_device(bench):
    rows = torch.empty((2, 16), dtype=torch.int64, device="meta")
    with bench.replay.replaying(bench.table), bench.replay.microbatch(rows):
        pass


@failure
def rows_of_the_wrong_type(bench):
    rows = bench.batches()[0]["rows"].int()
    with bench.replay.replaying(bench.table), bench.replay.microbatch(rows):
        pass


@failure
def mask_on_the_wrong_device(bench):
    rows = bench.batches()[0]["rows"]
    mask = torch.empty(rows.shape, dtype=torch.bool, device="meta")
    with bench.replay.replaying(bench.table), bench.replay.microbatch(rows, mask=mask):
        pass


@failure
def mask_of_the_wrong_type(bench):
    rows = bench.batches()[0]["rows"]
    with bench.replay.replaying(bench.table), bench.replay.microbatch(rows, mask=rows):
        pass


@failure
def mask_of_the_wrong_length(bench):
    rows = bench.batches()[0]["rows"]
    mask = torch.ones((2, 15), dtype=torch.bool)
    with bench.replay.replaying(bench.table), bench.replay.microbatch(rows, mask=mask):
        pass


@failure
def leaving_a_microbatch_that_was_not_entered(bench):
    with bench.replay.replaying(bench.table):
        bench.replay.leave_microbatch()


@failure
def a_mode_that_nobody_resolved(bench):
    bench.replay.remove()
    try:
        attach(bench.job.chunks, ReplayConfig(mode="auto"))
    finally:
        _reattach(bench)


@failure
def a_sequence_without_tokens(bench):
    with bench.replay.recording([4, 0]):
        pass


@failure
def table_of_fewer_layers(bench):
    model = dataclasses.replace(bench.replay.shape, layers=bench.replay.shape.layers[:-1])
    with bench.replay.replaying(random_table(bench.job, model)):
        pass


@failure
def table_of_more_experts(bench):
    model = dataclasses.replace(bench.replay.shape, num_experts=16)
    with bench.replay.replaying(random_table(bench.job, model)):
        pass


@failure
def table_of_another_top_k(bench):
    model = dataclasses.replace(bench.replay.shape, top_k=3)
    with bench.replay.replaying(random_table(bench.job, model)):
        pass


@failure
def recorded_routes_where_the_rollouts_belong(bench):
    with bench.replay.recording([4, 4], is_partial=True) as recorded:
        batch = bench.batches()[0]
        with bench.replay.microbatch(torch.full_like(batch["rows"], -1)):
            bench.forward(batch)
    with bench.replay.replaying(recorded.table()):
        pass


@failure
def rollout_routes_where_recorded_ones_belong(bench):
    bench.replay.remove()
    try:
        with (
            attach(bench.job.chunks, ReplayConfig(mode="R2")) as replay,
            replay.replaying(bench.table),
        ):
            pass
    finally:
        _reattach(bench)


@failure
def a_doubled_expert_in_a_table_changed_afterwards(bench):
    bench.table.expert_ids_LTK[2, 6] = 5
    _replay_once(bench)


@failure
def an_expert_beyond_the_models_in_a_table_changed_afterwards(bench):
    bench.table.expert_ids_LTK[1, 3, 0] = 8
    _replay_once(bench)


def _replay_once(bench):
    batch, before = bench.batches()[0], random_table(bench.job, bench.replay.shape)
    try:
        with bench.replay.replaying(bench.table), bench.replay.microbatch(batch["rows"]):
            bench.forward(batch)
    finally:
        bench.table = before


@failure
def nobody_opened_a_scope(bench):
    batch = bench.batches()[0]
    with bench.replay.microbatch(batch["rows"]):
        bench.forward(batch)
    bench.replay.receipt = None  # the handle's first step
    bench.replay.metrics()


@failure
def model_runs_without_a_microbatch(bench):
    with bench.replay.replaying(bench.table):
        bench.forward(bench.batches()[0])


@failure
def model_runs_twice_in_a_microbatch(bench):
    batch = bench.batches()[0]
    with bench.replay.replaying(bench.table), bench.replay.microbatch(batch["rows"]):
        bench.forward(batch)
        bench.forward(batch)


@failure
def microbatch_without_the_model(bench):
    batch = bench.batches()[0]
    with bench.replay.replaying(bench.table), bench.replay.microbatch(batch["rows"]):
        pass


@failure
def microbatch_within_a_microbatch(bench):
    rows = bench.batches()[0]["rows"]
    with (
        bench.replay.replaying(bench.table),
        bench.replay.microbatch(rows),
        bench.replay.microbatch(rows),
    ):
        pass


@failure
def scope_within_a_scope(bench):
    with bench.replay.replaying(bench.table), bench.replay.recording([1]):
        pass


@failure
def scope_without_any_microbatch(bench):
    with bench.replay.replaying(bench.table):
        pass


@failure
def a_router_that_did_not_run(bench):
    batch = bench.batches()[0]
    layers = bench.job.chunks[0].decoder.layers
    mlp = layers[2].mlp
    # A layer that somebody replaced after attach: its router is bound, but never called.
    layers[2].mlp = _Silent()
    try:
        with bench.replay.replaying(bench.table), bench.replay.microbatch(batch["rows"]):
            bench.forward(batch)
    finally:
        layers[2].mlp = mlp


class _Silent(torch.nn.Module):
    def forward(self, hidden, *unused, **also_unused):
        return hidden, None


@failure
def inner_module_called_past_the_attached_one(bench):
    batch = bench.batches()[0]
    with bench.replay.replaying(bench.table), bench.replay.microbatch(batch["rows"]):
        bench.job.chunks[0].decoder.layers[0].mlp.router(torch.randn(16, 2, 32))


@failure
def backward_after_the_scope(bench):
    batch = bench.batches()[0]
    with bench.replay.replaying(bench.table), bench.replay.microbatch(batch["rows"]):
        loss = bench.forward(batch).mean()
    loss.backward()


@failure
def exception_in_the_forward(bench):
    batch = bench.batches()[0]

    def broken(*arguments):
        raise RuntimeError("the attention broke")

    hook = bench.job.chunks[0].decoder.layers[1].self_attention.register_forward_hook(broken)
    try:
        with bench.replay.replaying(bench.table), bench.replay.microbatch(batch["rows"]):
            bench.forward(batch)
    finally:
        hook.remove()


@failure
def exception_in_the_backward(bench):
    batch = bench.batches()[0]

    def broken(gradient):
        raise RuntimeError("the gradient broke")

    with bench.replay.replaying(bench.table):
        with bench.replay.microbatch(batch["rows"]):
            output = bench.forward(batch)
        weight = bench.job.chunks[0].decoder.layers[0].mlp.router.weight
        hook = weight.register_hook(broken)
        try:
            output.mean().backward()
        finally:
            hook.remove()


@failure
def attach_twice(bench):
    attach(bench.job.chunks)


@failure
def remove_in_mid_step(bench):
    with bench.replay.replaying(bench.table):
        bench.replay.remove()


@failure
def use_after_remove(bench):
    bench.replay.remove()
    bench.replay.remove()  # does nothing
    try:
        with bench.replay.replaying(bench.table):
            pass
    finally:
        _reattach(bench)


@failure
def a_row_recorded_twice(bench):
    batch = bench.batches()[0]
    lengths = bench.job.batch.lengths
    with bench.replay.recording(lengths) as recorded:
        for _ in range(2):
            with bench.replay.microbatch(batch["rows"]):
                bench.forward(batch)
    recorded.table()


@failure
def a_sequence_that_was_never_recorded(bench):
    lengths = bench.job.batch.lengths
    with bench.replay.recording(lengths) as recorded:
        for batch in list(bench.job.batch.microbatches(recorded.rows))[:-1]:
            with bench.replay.microbatch(batch["rows"]):
                bench.forward(batch)
    recorded.table()


@failure
def table_of_an_unfinished_recording(bench):
    with bench.replay.recording([1]) as recorded:
        recorded.table()


@failure
def a_file_for_a_table_that_ranks_do_not_share(bench):
    batch = bench.batches()[0]
    live = torch.full_like(batch["rows"], -1)
    scope = bench.replay.recording([4, 4], is_partial=True, is_shared=False)
    with scope as recorded, bench.replay.microbatch(live):
        bench.forward(batch)
    recorded.table("recorded.safetensors")


@failure
def only_one_of_two_chunks_runs(bench):
    bench.replay.remove()
    layers = bench.job.chunks[0].decoder.layers
    # Two chunks on one rank, as an interleaved pipeline has them: the halves of the decoder.
    halves = [_Half(layers[:2]), _Half(layers[2:])]
    try:
        with (
            attach(halves, R3) as replay,
            replay.replaying(bench.table),
            replay.microbatch(torch.full((2, 16), -1)),
        ):
            halves[0](torch.randn(16, 2, 32))
    finally:
        _reattach(bench)


class _Half(torch.nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.layers = torch.nn.ModuleList(layers)

    def forward(self, hidden):
        for layer in self.layers:
            hidden, _ = layer.mlp(hidden)
        return hidden


@failure
def routers_built_twice(bench):
    bench.replay.remove()
    chunk = bench.job.chunks[0]
    chunk.second_decoder = Job(bench.job.case).chunks[0].decoder
    try:
        attach(chunk)
    finally:
        del chunk.second_decoder
        _reattach(bench)


@failure
def a_chunk_left_out(bench):
    bench.replay.remove()
    try:
        attach(bench.job.chunks[0].decoder.layers[0])
    finally:
        _reattach(bench)


@failure
def a_dense_model(bench):
    attach(torch.nn.Linear(2, 2))


def _reattach(bench):
    bench.replay = attach(bench.job.chunks, R3)


def provoke(rank, names):
    """{failure: (type, message, whether the model was stock afterwards)}."""
    from megatron_worlds import megatron

    case = Case(recompute="full")
    raised = {}
    with megatron(case.layout):
        job = Job(case)
        stock = job.run()
        replay = attach(job.chunks, R3)
        bench = Bench(job=job, replay=replay, table=random_table(job, replay.shape))
        for name in names:
            error = None
            try:
                FAILURES[name](bench)
            except Exception as e:
                error = e
            raised[name] = (type(error).__name__, str(error), _same(stock, job.run()))
    return raised


def _same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one[0], other[0], strict=True)) and all(
        torch.equal(one[1][name], other[1][name]) for name in one[1]
    )
