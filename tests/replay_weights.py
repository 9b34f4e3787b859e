"""Combine weights of the rollout on real Megatron, against dense arithmetic outside of replay.

(d) drawn weights per (microbatch, layer, token), frozen and straight-through: losses and
    gradients are bitwise those of a model whose routers' outputs the oracle replaced itself
"""

import numpy as np
import torch
from replay_cases import Case
from replay_matrix import DispatchedRows, Job, differences, random_table

from routing_replay.config import ReplayConfig
from routing_replay.megatron import attach
from routing_replay.routes.table import RouteTable

MODES = ("frozen", "straight_through")


def weighted_table(job: Job, model) -> RouteTable:
    """`random_table` with weights that the job's routers could have given."""
    table = random_table(job, model)
    generator = np.random.default_rng(13)
    weights_LTK = generator.random(table.expert_ids_LTK.shape) + 0.1
    weights_LTK /= weights_LTK.sum(-1, keepdims=True)
    weights_LTK *= job.config.moe_router_topk_scaling_factor or 1.0
    if job.config.moe_router_pre_softmax:
        weights_LTK *= 0.9  # the experts that were not selected hold the rest
    columns = table.columns | {"combine_weights_LTK": weights_LTK.astype(np.float32)}
    return RouteTable(model, columns, "rollout")


class DenseWeights(DispatchedRows):
    """The oracle: replaces every router's output by hand, in the forward and in recomputations."""

    def __init__(self, job: Job, table: RouteTable, mode: str):
        self.mode = mode
        super().__init__(job, table)

    def _check(self, router, arguments, output):
        probs_TE, routing_map_TE = output
        layer = router.layer_number - 1
        if torch._C._current_graph_task_id() != -1:
            on_host = routing_map_TE.cpu()
            [number] = [n for n, r in enumerate(self.rows) if self._fits(on_host, r, layer)]
        else:
            number = self.forwards.get(layer, 0)
            self.forwards[layer] = number + 1
        rows_T = self.rows[number].numpy()
        ids_TK = torch.from_numpy(self.table.gather([layer], rows_T)[0].astype(np.int64))
        weights_TK = torch.from_numpy(self.table.gather_weights([layer], rows_T)[0])
        replayed_TE = torch.zeros_like(probs_TE, device="cpu")
        replayed_TE.scatter_(1, ids_TK, weights_TK.to(probs_TE.dtype))
        replayed_TE = replayed_TE.to(probs_TE.device)
        if self.mode == "straight_through":
            replayed_TE = replayed_TE + (probs_TE - probs_TE.detach())
        is_replayed_T1 = torch.from_numpy(rows_T >= 0)[:, None].to(probs_TE.device)
        return torch.where(is_replayed_T1, replayed_TE, probs_TE), routing_map_TE


def weights_findings(job: Job) -> list[str]:
    """What is wrong under (d); nothing if all holds."""
    wrong = []
    for mode in MODES:
        with attach(job.chunks, ReplayConfig(mode="R3", agreement_every=0)) as replay:
            table = weighted_table(job, replay.shape)
            oracle = DenseWeights(job, table, mode)
            try:
                with replay.replaying(table):
                    expected = job.run(replay, table.rows)
            finally:
                oracle.remove()
        config = ReplayConfig(mode="R3", weights=mode, agreement_every=0)
        with attach(job.chunks, config) as replay, replay.replaying(table):
            got = job.run(replay, table.rows)
        wrong += differences(f"(d) {mode}", expected, got)
    return wrong


def without_router_gradient(rank: int) -> dict[str, float]:
    """Largest gradient of a router, by router and mode, where every token is replayed."""
    from megatron_worlds import megatron

    largest = {}
    for router in ("softmax", "aux_loss"):
        case = Case(router=router, recompute="full")
        with megatron(case.layout):
            job = Job(case)
            _replay_every_token(job.batch)
            for mode in ("live", *MODES):
                config = ReplayConfig(mode="R3", weights=mode, agreement_every=0)
                with attach(job.chunks, config) as replay:
                    table = weighted_table(job, replay.shape)
                    with replay.replaying(table):
                        _, gradients = job.run(replay, table.rows)
                routers = [g for name, g in gradients.items() if name.endswith("router.weight")]
                largest[f"{router} {mode}"] = max(float(g.abs().max()) for g in routers)
    return largest


def _replay_every_token(batch):
    """Give tokens without a row, padding among them, the routes of row 0."""
    microbatches = batch.microbatches

    def covered(rows_of):
        for microbatch in microbatches(rows_of):
            microbatch["rows"].clamp_(min=0)
            yield microbatch

    batch.microbatches = covered
