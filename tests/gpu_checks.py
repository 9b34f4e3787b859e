"""What the rank of the world in `test_gpu_replay.py` computes; a CPU takes the place of a GPU."""

from __future__ import annotations

import contextlib

import torch
from megatron_worlds import megatron
from replay_cases import cases
from replay_matrix import Job, check_case, random_table

from recipes.model.parallel import ParallelLayout
from routing_replay.config import ReplayConfig
from routing_replay.megatron import attach


def matrix(rank, names):
    """Run the named configurations; the findings of each."""
    by_name = {case.name: case for case in cases(1)}
    findings = {}
    for name in names:
        with megatron(by_name[name].layout):
            findings[name] = check_case(by_name[name])
    return findings


def without_determinism(rank, rounds):
    """How many of so many stock passes equal the first bitwise, and how many replayed ones."""
    torch.use_deterministic_algorithms(False)
    with megatron(ParallelLayout()):
        job = Job(cases(1)[0])
        stock = [job.run()[0] for _ in range(rounds + 1)]
        with attach(job.chunks, ReplayConfig(mode="R2", agreement_every=0)) as replay:
            with replay.recording(job.batch.lengths) as recorded:
                job.run(replay, recorded.rows)
            table = recorded.table()
            replayed = []
            for _ in range(rounds + 1):
                with replay.replaying(table):
                    replayed.append(job.run(replay, table.rows)[0])
    return {
        "stock": sum(_equal(stock[0], losses) for losses in stock[1:]),
        "replayed": sum(_equal(replayed[0], losses) for losses in replayed[1:]),
    }


def syncs(rank):
    """Forward and backward of routers that never wait: replaying, recording, comparing."""
    with megatron(ParallelLayout()):
        job = Job(cases(1)[0])
        weight = next(job.chunks[0].parameters())
        chunk = Routers([m for m in job.chunks[0].modules() if type(m).__name__ == "TopKRouter"])
        rows_T = torch.arange(16)
        hidden = torch.randn(16, 1, job.config.hidden_size).to(weight)

        def two_microbatches(replay):
            with replay.microbatch(rows_T):  # allocates pinned buffers
                chunk(hidden).backward()
            with _sync_is_an_error(), replay.microbatch(rows_T):
                chunk(hidden).backward()

        for has_kernel in (False, True) if torch.cuda.is_available() else (False,):
            config = ReplayConfig(
                mode="R3", agreement_every=1, agreement_tokens=4, kernel=has_kernel
            )
            with attach(chunk, config) as replay:
                table = random_table(job, replay.shape)
                with replay.replaying(table, record_live=True):
                    two_microbatches(replay)
                with replay.recording(job.batch.lengths, is_partial=True):
                    two_microbatches(replay)
    return True


def captured(rank, case, has_kernel):
    """What is wrong where CUDA graphs run the routers of a model."""
    import captured_checks

    torch.use_deterministic_algorithms(False)  # its kernels wait for the device
    return captured_checks.run(rank, [case], has_kernel)


def interleaved_graphs(rank, order):
    """Two graphs of one router on the same buffers: both forwards, then the backwards in an order.

    So the backward of one microbatch comes when the buffers hold another one, as in a pipeline.
    """
    import captured_checks

    torch.use_deterministic_algorithms(False)
    wrong = []
    with megatron(ParallelLayout()):
        job = Job(cases(1)[0])
        router = captured_checks.GraphedRouters(job).routers[0]
        with captured_checks.handle(job, "R3") as replay:
            hidden = [torch.randn(16, 2, router.weight.shape[1]).to(router.weight) for _ in "ab"]
            plain = captured_checks._under_capture(router.forward)
            plain(hidden[0])  # the warm-up
            static = router.routing_replay_buffers.get(32)
            ids = [_distinct(static.ids_LTK, replay.shape.num_experts) for _ in hidden]
            is_live_LT = torch.zeros_like(static.is_live_LT)
            forwards = [plain, plain]
            if torch.cuda.is_available():
                forwards = [captured_checks.graphed(router, h) for h in hidden]

            def gradients(forwards, order):
                leaves, losses = [h.clone().requires_grad_() for h in hidden], []
                for leaf, ids_LTK, forward in zip(leaves, ids, forwards, strict=True):
                    static.begin(ids_LTK, is_live_LT)
                    losses.append(forward(leaf)[0].square().sum())
                    static.end()
                for number in order:
                    losses[number].backward()
                return [leaf.grad for leaf in leaves]

            ours, expected = gradients(forwards, order), gradients([plain, plain], (0, 1))
            for number, (one, other) in enumerate(zip(ours, expected, strict=True)):
                if not torch.allclose(one, other, rtol=1e-4, atol=1e-6):
                    wrong.append(f"microbatch {number}: {(one - other).abs().max():.1e}")
    return wrong


def _distinct(like_LTK, num_experts):
    scores = torch.rand(*like_LTK.shape[:2], num_experts, device=like_LTK.device)
    return scores.argsort(-1)[..., : like_LTK.shape[2]].to(like_LTK.dtype)


def interleaved_chunks(rank, order):
    """Two microbatches by hand as a pipeline runs them: F1 F2, then the backwards in an order.

    Outputs are deallocated and backwards begin as in Megatron's schedules. Every forward and every
    recomputation must dispatch the rows of its own microbatch.
    """
    from megatron.core.pipeline_parallel.schedules import custom_backward, deallocate_output_tensor
    from replay_cases import Case
    from replay_matrix import DispatchedRows

    with megatron(ParallelLayout()):
        job = Job(Case(recompute="full"))
        chunk = job.chunks[0]
        with attach(chunk, ReplayConfig(mode="R3", agreement_every=0)) as replay:
            table = random_table(job, replay.shape)
            oracle = DispatchedRows(job, table)
            batches = list(job.batch.microbatches(table.rows))[:2]
            with replay.replaying(table):
                outputs = []
                for batch in batches:
                    with replay.microbatch(batch["rows"]):
                        output = chunk(
                            batch["tokens"], batch["positions"], None, labels=batch["tokens"]
                        )
                    outputs.append(output.float() + 0)  # not a view: it is deallocated
                for number in order:
                    gradient = torch.ones_like(outputs[number])
                    deallocate_output_tensor(outputs[number], True)
                    custom_backward(outputs[number], gradient)
            oracle.remove()
        lines = replay.receipt.lines
        return {
            "dispatched": oracle.wrong,
            "receipt": all(line.is_right and line.num_recomputes == 1 for line in lines),
            "lines": len(lines),
        }


class Routers(torch.nn.Module):
    """Routers alone as a model chunk; what Megatron itself waits for is not in it."""

    def __init__(self, routers):
        super().__init__()
        self.routers = torch.nn.ModuleList(routers)

    def forward(self, hidden):
        return sum(router(hidden)[0].float().sum() for router in self.routers)


@contextlib.contextmanager
def _sync_is_an_error():
    if not torch.cuda.is_available():
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _equal(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))
