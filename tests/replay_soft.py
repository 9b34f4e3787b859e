"""Soft replay on real Megatron: what every router dispatched, against a naive selection.

(e) drawn routes, replayed softly: every forward dispatched the oracle's experts, and every
    recomputation those of its forward, although its logits differ
"""

import math

import torch
from oracles import router_distribution, soft_selection
from replay_cases import Case
from replay_matrix import NUM_MICROBATCHES, DispatchedRows, Job
from replay_weights import weighted_table

from routing_replay.config import ReplayConfig
from routing_replay.megatron import attach

RATIO, MASS, MARGIN = 0.6, 0.5, 1.0


class SoftRows(DispatchedRows):
    """Notes every dispatch; computes what each forward should have dispatched.

    In recomputations the router's logits are those of other tokens (rolled by one).
    """

    def __init__(self, job: Job, table):
        super().__init__(job, table)
        self.forward_maps: dict[int, list[torch.Tensor]] = {}
        self.num_replaced = self.num_slots = self.num_recomputed = 0

    def _check(self, router, arguments, output):
        routing_map_TE, layer = output[1].cpu(), router.layer_number - 1
        if torch._C._current_graph_task_id() != -1:
            self.num_recomputed += 1
            if not any(torch.equal(routing_map_TE, m) for m in self.forward_maps[layer]):
                self.wrong.append((layer, "a recomputation took other experts than its forward"))
            return
        number = len(self.forward_maps.setdefault(layer, []))
        self.forward_maps[layer].append(routing_map_TE)
        expected_TE = self._expected(router, arguments[0], self.rows[number], layer)
        if not torch.equal(routing_map_TE, expected_TE):
            self.wrong.append((layer, "forward", number))

    @torch.no_grad()
    def _expected(self, router, hidden, rows_T, layer):
        from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function

        config = router.config
        logits_TE = router.gating(hidden).reshape(-1, config.num_moe_experts)
        _, live_TE = topk_routing_with_score_function(
            logits_TE,
            router.topk,
            use_pre_softmax=config.moe_router_pre_softmax,
            num_groups=config.moe_router_num_groups,
            group_topk=config.moe_router_group_topk,
            score_function=router.score_function,
            expert_bias=router.expert_bias,
        )
        expected_TE = live_TE.clone().cpu()
        for token, row in enumerate(rows_T.tolist()):
            if row < 0:
                continue
            probs = router_distribution(logits_TE[token].tolist(), router.score_function)
            replayed = self.table.gather([layer], torch.tensor([row]).numpy())[0, 0].tolist()
            live = live_TE[token].nonzero().flatten().tolist()
            ids, kept = soft_selection(probs, replayed, live, RATIO, MASS, MARGIN)
            expected_TE[token] = False
            expected_TE[token, ids] = True
            self.num_replaced += kept.count(False)
            self.num_slots += len(kept)
        return expected_TE


def disturb_recomputations(job: Job):
    """In a recomputation every router sees its neighbour token's logits."""
    from megatron.core.transformer.moe.router import TopKRouter

    for chunk in job.chunks:
        for module in chunk.modules():
            if isinstance(module, TopKRouter):
                module.gating = _disturbed(module.gating)


def _disturbed(gating):
    def gate(hidden):
        logits = gating(hidden)
        is_recompute = torch._C._current_graph_task_id() != -1
        return logits.roll(1, dims=0) if is_recompute else logits

    return gate


def soft_findings(rank: int, cases: list[Case]) -> list[str]:
    """What is wrong under (e) in these cases; nothing if all holds."""
    from megatron_worlds import megatron

    wrong = []
    for case in cases:
        with megatron(case.layout):
            wrong += [f"rank {rank}, {case.name}: {text}" for text in _findings(Job(case))]
    return wrong


def _findings(job: Job) -> list[str]:
    disturb_recomputations(job)
    config = ReplayConfig(
        mode="R3",
        weights="straight_through",
        soft_ratio=RATIO,
        soft_mass=MASS,
        soft_margin=MARGIN,
        agreement_every=0,
    )
    with attach(job.chunks, config) as replay:
        table = weighted_table(job, replay.shape)
        oracle = SoftRows(job, table)
        try:
            with replay.replaying(table):
                job.run(replay, table.rows)
        finally:
            oracle.remove()
        rate = replay.metrics()["routing_replay/replace_rate"]
    wrong = [str(item) for item in oracle.wrong]
    sums = torch.tensor([oracle.num_replaced, oracle.num_slots], dtype=torch.float64)
    if torch.distributed.get_world_size() > 1:
        torch.distributed.all_reduce(sums)
    expected = float(sums[0] / sums[1])
    if not 0.05 < expected < 0.95:
        wrong.append(f"the drawn routes leave nothing to decide: {expected}")
    if not math.isclose(float(rate.value()), expected, rel_tol=1e-9):
        wrong.append(f"replace_rate {float(rate.value())} instead of {expected}")
    layers = len(oracle.forward_maps)
    if job.case.recompute != "none" and oracle.num_recomputed != layers * NUM_MICROBATCHES:
        wrong.append(f"{oracle.num_recomputed} recomputations in {layers} layers")
    return wrong


def one_kept_token(rank: int) -> dict[str, bool]:
    """Thresholds that keep everything, and thresholds that keep nothing but live experts."""
    from megatron_worlds import megatron

    case = Case(recompute="full")
    with megatron(case.layout):
        job, found = Job(case), {}
        for name, soft in (
            ("hard", {}),
            ("all", {"soft_ratio": 1e-30}),
            ("none", {"soft_ratio": 1}),
        ):
            with attach(job.chunks, ReplayConfig(mode="R3", agreement_every=0, **soft)) as replay:
                table = weighted_table(job, replay.shape)
                with replay.replaying(table):
                    found[name] = job.run(replay, table.rows)[0]
        found["stock"] = job.run()[0]
    same = lambda a, b: all(torch.equal(x, y) for x, y in zip(found[a], found[b], strict=True))  # noqa: E731
    return {"all is hard": same("all", "hard"), "none is stock": same("none", "stock")}
