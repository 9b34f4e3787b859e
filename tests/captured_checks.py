"""Captured routers without a GPU: what a graph would run, on the buffers that it would run on.

Two stand-ins for a CUDA graph. `GraphedRouters` runs each router's code under Megatron's own flag
of a capture, every time: the operations of a graph, in whole models and passes. `traced` keeps the
operations of one call, and repeats them without any Python of ours, as a graph does.

On a GPU `GraphedRouters` captures (`test_gpu_graphs.py`). Sums with atomics round otherwise in each
run there, so losses and gradients are compared to float32 rounding; dispatched rows are exact.
"""

import replay_matrix
import torch
from megatron_kernel_matrix import far_apart
from megatron_worlds import megatron
from replay_cases import Case
from replay_matrix import error_of

CASES = (Case(), Case(router="groups", is_packed=True))


class GraphedRouters:
    """Within: the routers of a job's chunks run in CUDA graphs; on a CPU as if they did."""

    def __init__(self, job):
        self.job = job
        self.routers = [
            m for c in job.chunks for m in c.modules() if type(m).__name__ == "TopKRouter"
        ]

    def __enter__(self):
        num_rows, num_columns = self.job._sequence_length(), 1 if self.job.case.is_packed else 2
        for router in self.routers:
            if torch.cuda.is_available():
                hidden = router.weight.new_zeros(num_rows, num_columns, router.weight.shape[1])
                router.forward = graphed(router, hidden)
            else:
                router.forward = _under_capture(router.forward)

    def __exit__(self, *exception):
        for router in self.routers:
            del router.forward


class Alone(torch.nn.Module):
    """A router whose forward takes one tensor, as graphs want it."""

    def __init__(self, router):
        super().__init__()
        self.router, self.route = router, router.forward

    def forward(self, hidden):
        return self.route(hidden)


def graphed(router, hidden):
    """Return a function of the hidden states that repeats graphs of forward and backward."""
    sample = hidden.detach().requires_grad_()
    capture = _under_capture(torch.cuda.make_graphed_callables)
    repeat = capture(Alone(router), (sample,))
    return lambda hidden, *arguments, **options: repeat(hidden)


def _under_capture(forward):
    from megatron.core.transformer import cuda_graphs

    def captured(*arguments, **options):
        cuda_graphs._set_capture_start()
        try:
            return forward(*arguments, **options)
        finally:
            cuda_graphs._set_capture_end()

    return captured


def handle(job, mode, **options):
    from routing_replay.config import ReplayConfig
    from routing_replay.megatron import attach

    options = {"agreement_every": 0, "captured_routers": True} | options
    return attach(job.chunks, ReplayConfig(mode=mode, **options))


def run(rank, cases, has_kernel):
    """Entry of a spawned rank: what is wrong in the cases, with the torch form or the kernel."""
    wrong = []
    for case in cases:
        with megatron(case.layout):
            found = check_case(case, has_kernel)
        wrong += [f"rank {rank}, {case.name}: {text}" for text in found]
    return wrong


def check_case(case, has_kernel=False):
    """Captured routers record and replay as routers that are called; outside they are stock."""
    job = replay_matrix.Job(case)
    stock = job.run()
    table, called, receipt = _called(job)
    same = _comparison(has_kernel)
    with handle(job, "R3", kernel=has_kernel) as replay, GraphedRouters(job):
        wrong = same("captured, no scope", stock, job.run())  # the warm-up: buffers are made here
        addresses = _addresses(job)
        wrong += [] if len(addresses) == len(GraphedRouters(job).routers) else ["no buffers"]
        oracle = replay_matrix.DispatchedRows(job, table)
        with replay.replaying(table):
            ours = job.run(replay, table.rows)
        oracle.remove()
        wrong += [f"dispatched: {text}" for text in oracle.wrong]
        wrong += same("replayed", called, ours)
        wrong += [] if replay.receipt == receipt else [f"receipt:\n{replay.receipt.table()}"]
        wrong += same("after a scope", stock, job.run())
        wrong += [] if error_of(lambda: _broken(job, replay, table)) else ["no error"]
        wrong += same("after a scope that failed", stock, job.run())
    with GraphedRouters(job), handle(job, "R2", kernel=has_kernel) as replay:
        with replay.recording(job.batch.lengths) as recorded:
            wrong += same("recorded", stock, job.run(replay, recorded.rows))
        own = recorded.table()
        wrong += [] if own.covered_T.all() else ["rows that were not recorded"]
        with replay.replaying(own):
            wrong += same("own routes", stock, job.run(replay, own.rows))
        wrong += [] if _addresses(job) == addresses else ["an address has changed"]
    return wrong + _comparison()("removed", stock, job.run())


def _comparison(has_kernel=False):
    is_rounded = has_kernel or torch.cuda.is_available()
    return far_apart if is_rounded else replay_matrix.differences


def _called(job):
    """Drawn routes, replayed by routers that are called: table, losses and gradients, receipt."""
    with handle(job, "R3", captured_routers=False) as replay:
        table = replay_matrix.random_table(job, replay.shape)
        with replay.replaying(table):
            run = job.run(replay, table.rows)
        return table, run, replay.receipt


def _broken(job, replay, table):
    with replay.replaying(table):
        job.run(replay, table.rows)
        raise RuntimeError("in the middle of a scope")


def _addresses(job):
    """Of every buffer that a graph would hold."""
    found = {}
    for router in GraphedRouters(job).routers:
        buffers = getattr(router, "routing_replay_buffers", None)
        for num_tokens, static in sorted(buffers._by_tokens.items()) if buffers else ():
            tensors = {k: v for k, v in vars(static).items() if isinstance(v, torch.Tensor)}
            found[router.layer_number, num_tokens] = {k: v.data_ptr() for k, v in tensors.items()}
    return found


def edges(rank):
    """Layers that route live, a router that no graph ran, graphs that came before the handle."""
    with megatron(Case().layout):
        job = replay_matrix.Job(Case())
        layers = (1, 2)
        with handle(job, "R3", captured_routers=False) as replay:
            table = replay_matrix.random_table(job, replay.shape)
            with replay.replaying(table, layers=layers):
                called = job.run(replay, table.rows)
        found = {}
        with handle(job, "R3") as replay, GraphedRouters(job):
            job.run()
            with replay.replaying(table, layers=layers):
                ours = job.run(replay, table.rows)
            found["some layers"] = replay_matrix.differences("layers", called, ours)
            found["replayed"] = [line.num_replayed > 0 for line in replay.receipt.lines[:4]]
            found["watching"] = error_of(lambda: replay.watching(None).__enter__())
            found["record_live"] = error_of(
                lambda: replay.replaying(table, record_live=True).__enter__()
            )
            found["skipped"] = error_of(lambda: _skipping(job, replay, table))
        job = replay_matrix.Job(Case())
        job.chunks[0].cuda_graphs = ["a graph"]
        found["late"] = error_of(lambda: handle(job, "R3"))
        return found


def _skipping(job, replay, table):
    """A scope in which one router keeps Megatron's seam, as a graph from before attach would."""
    router = next(m for m in job.chunks[0].modules() if type(m).__name__ == "TopKRouter")
    seam, router.router_replay = router.router_replay, None
    try:
        with replay.replaying(table):
            job.run(replay, table.rows)
    finally:
        router.router_replay = seam


def traced(rank, names):
    """One router call, forward and backward, traced out of every scope and repeated on buffers."""
    wrong = []
    for name in names:
        with megatron(Case().layout):
            wrong += [f"{name}: {text}" for text in _traced(replay_matrix.Job(Case(router=name)))]
    return wrong


def _traced(job, rounds=3):
    from torch.fx.experimental.proxy_tensor import make_fx

    wrong, num_tokens = [], 24
    router = GraphedRouters(job).routers[1]
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(num_tokens, 1, job.config.hidden_size, generator=generator)

    def forward_backward(hidden):
        hidden = hidden.detach().requires_grad_()
        probs_TE, map_TE = router(hidden)
        weighted = (probs_TE * torch.arange(probs_TE.shape[1])).square().sum()
        return probs_TE, map_TE, *torch.autograd.grad(weighted, [hidden, router.weight])

    eager = forward_backward(hidden)
    with handle(job, "R3") as replay:
        run = _under_capture(forward_backward)
        run(hidden)  # the warm-up
        graph = _under_capture(make_fx(run))(hidden)
        static = router.routing_replay_buffers.get(num_tokens)
        index = static.layers.index(router.layer_number - 1)
        for number in range(rounds):
            hidden = torch.randn(hidden.shape, generator=generator)
            ids_LTK = torch.rand(*static.ids_LTK.shape[:2], replay.shape.num_experts)
            ids_LTK = ids_LTK.argsort(-1)[..., : replay.shape.top_k]
            is_live_LT = torch.rand(static.is_live_LT.shape) < 0.2
            static.begin(ids_LTK, is_live_LT)
            ours = graph(hidden)
            calls_L = static.end()
            expected = _oracle(router, hidden, ids_LTK[index], is_live_LT[index], forward_backward)
            if not all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True)):
                wrong.append(f"round {number}")
            if calls_L[index] != 1 or calls_L.sum() != 1:
                wrong.append(f"{calls_L.tolist()} calls")
        hidden = torch.randn(hidden.shape, generator=generator)
        stock = graph(hidden)
    live = forward_backward(hidden)
    if not all(torch.equal(a, b) for a, b in zip(stock, live, strict=True)):
        wrong.append("between scopes")
    return wrong + ([] if len(eager) == 4 else ["nothing ran"])


def _oracle(router, hidden, ids_TK, is_live_T, forward_backward):
    """The same call by stock Megatron, told the selection by its own replay seam."""

    class Told:
        def get_replay_topk(self, scores, topk, num_groups, group_topk, stock):
            live_TK = stock(scores, topk, num_groups=num_groups, group_topk=group_topk)[1]
            chosen_TK = torch.where(is_live_T[:, None], live_TK, ids_TK)
            return scores.gather(1, chosen_TK), chosen_TK

    seam, router.router_replay = router.router_replay, Told()
    try:
        return forward_backward(hidden)
    finally:
        router.router_replay = seam


def all_of_them(rank, cases):
    """Entry of a spawned rank: one world for all checks."""
    return {
        "cases": run(rank, cases, has_kernel=False),
        "traced": traced(rank, ("softmax", "pre_softmax", "groups", "aux_loss")),
        "edges": edges(rank),
    }
