"""One step of a real checkpoint under several parallel layouts and microbatch splits.

What the ranks of `test_megatron_layouts.py` compute. The record follows the tokens, not the ranks:
whoever records or replays a row, wherever it lies, its routes must be the same.
"""

import dataclasses
import itertools

import context_slices
import numpy as np
import torch

from recipes.model.parallel import ParallelLayout
from routing_replay.config import ReplayConfig
from routing_replay.routes.table import RouteTable

LENGTHS = (9, 14, 5, 22, 17, 11, 30, 6, 13, 26, 8, 19)  # tokens of the step's sequences
NUM_TOKENS = sum(LENGTHS)
UNCOVERED = 3  # a sequence that came back without routes
STARTS = np.concatenate([[0], np.cumsum(LENGTHS)])[:-1]
VOCAB = 128
# Every context slice and every sequence-parallel part of a padded sequence is whole: 2 * CP * TP.
MULTIPLE = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """How the step is spread over ranks and cut into microbatches.

    Args:
        sizes: Sequences of a rank's microbatches, repeated until none is left.
    """

    name: str
    layout: ParallelLayout
    sizes: tuple[int, ...] = (1,)
    is_packed: bool = False
    is_contiguous: bool = False
    recompute: str = "none"


PLANS = {
    2: (
        Plan(name="tp2", layout=ParallelLayout(tensor=2)),
        Plan(
            name="pp2-first1",
            layout=ParallelLayout(pipeline=2, first_stage_layers=1),
            sizes=(2,),
            is_packed=True,
        ),
        Plan(
            name="vpp2",
            layout=ParallelLayout(pipeline=2, virtual_pipeline=2),
            sizes=(1, 2),
            recompute="full",
        ),
        Plan(
            name="ep2-dynamic",
            layout=ParallelLayout(expert=2),
            sizes=(1, 2, 3),
            is_packed=True,
            recompute="full",
        ),
        Plan(name="cp2-zigzag", layout=ParallelLayout(context=2), sizes=(3,)),
        Plan(
            name="cp2-contiguous-padded",
            layout=ParallelLayout(context=2),
            sizes=(2,),
            is_contiguous=True,
            recompute="moe",
        ),
        Plan(
            name="cp2-contiguous-packed",
            layout=ParallelLayout(context=2),
            sizes=(1, 3),
            is_contiguous=True,
            is_packed=True,
        ),
    ),
    4: (
        Plan(name="tp2-dp2", layout=ParallelLayout(tensor=2)),
        Plan(
            name="pp2-ep2",
            layout=ParallelLayout(pipeline=2, expert=2),
            sizes=(1, 2, 3),
            is_packed=True,
            recompute="full",
        ),
        Plan(
            name="tp2-cp2-contiguous",
            layout=ParallelLayout(tensor=2, context=2),
            sizes=(2,),
            is_contiguous=True,
        ),
        Plan(name="ep4", layout=ParallelLayout(expert=4), sizes=(1, 2), is_packed=True),
    ),
}


class Step:
    """The checkpoint under one plan; Megatron is initialized for its layout."""

    def __init__(self, plan: Plan, folder):
        from recipes.model.model import build_model, transformer_config
        from recipes.model.weights import load_hf

        self.plan = plan
        self.config = transformer_config(
            folder,
            plan.layout,
            spec="local",  # on a GPU too: no Transformer Engine is needed
            recompute=plan.recompute,
            variable_seq_lengths=True,
        )
        self.chunks = build_model(self.config, plan.layout)
        load_hf(self.chunks, folder)
        self.replay = None

    def attach(self, mode):
        from routing_replay.megatron import attach

        if self.replay is not None:
            self.replay.remove()
        self.replay = attach(self.chunks, ReplayConfig(mode=mode, agreement_every=0))

    def move_routers(self):
        """What an update does: other routers than those that recorded, alike on all ranks."""
        for router in self.routers():
            generator = torch.Generator().manual_seed(router.layer_number)
            noise = torch.randn(router.weight.shape, generator=generator)
            with torch.no_grad():
                router.weight += 0.1 * noise

    def routers(self):
        from megatron.core.transformer.moe.router import TopKRouter

        modules = (module for chunk in self.chunks for module in chunk.modules())
        return [module for module in modules if isinstance(module, TopKRouter)]

    def microbatches(self, rows_of):
        """This rank's microbatches, cut as a trainer cuts them; rows ride with the tokens."""
        from megatron.core import parallel_state as ps

        rank, size = ps.get_data_parallel_rank(), ps.get_data_parallel_world_size()
        mine = list(range(len(LENGTHS)))[rank::size]
        sizes = itertools.cycle(self.plan.sizes)
        while mine:
            count = next(sizes)
            yield self._cut(mine[:count], rows_of)
            mine = mine[count:]

    def _cut(self, sequences, rows_of):
        padded = [-(-LENGTHS[s] // MULTIPLE) * MULTIPLE for s in sequences]
        if not self.plan.is_packed:
            padded = [max(padded)] * len(sequences)
        lines = [self._line(s, n, rows_of) for s, n in zip(sequences, padded, strict=True)]
        join = np.concatenate if self.plan.is_packed else np.stack
        arrays = {name: join([line[name] for line in lines]) for name in lines[0]}
        if self.plan.is_packed:
            arrays = {name: values[None] for name, values in arrays.items()}
        batch = {name: torch.from_numpy(values) for name, values in arrays.items()}
        batch["packed"] = _packed(padded) if self.plan.is_packed else None
        return batch

    def _line(self, sequence, padded, rows_of):
        """One sequence's part on this context rank: tokens, labels, positions, rows, places."""
        from megatron.core import parallel_state as ps

        length = LENGTHS[sequence]
        tokens = np.random.default_rng(sequence).integers(0, VOCAB, length)
        whole = {
            "tokens": tokens,
            "labels": np.roll(tokens, -1),
            "rows": rows_of(sequence, length),
            "places": STARTS[sequence] + np.arange(length),  # among the step's tokens
        }
        fill = {"tokens": 0, "labels": 0, "rows": -1, "places": -1}
        local = context_slices.positions(
            ps.get_context_parallel_rank(),
            ps.get_context_parallel_world_size(),
            padded,
            self.plan.is_contiguous,
        )
        line = {"positions": local}
        for name, values in whole.items():
            filled = np.full(padded, fill[name], np.int64)
            filled[:length] = values
            line[name] = filled[local]
        return line

    def run(self, rows_of, forward_only=True, announce=True):
        """Log-probs of all tokens of the step, on every rank.

        Args:
            rows_of: (sequence, num_tokens) -> its rows.
            forward_only: No backward.
            announce: Whether the microbatches are announced to replay.
        """
        from megatron.core.pipeline_parallel import get_forward_backward_func

        total = torch.zeros(2, NUM_TOKENS)  # log-probs, and how often each token came
        batches = list(self.microbatches(rows_of))
        for chunk in self.chunks:
            chunk.zero_grad(set_to_none=True)

        def forward_step(iterator, model):
            batch = next(iterator)
            with self.replay.microbatch(batch["rows"]) if announce else self.replay.live():
                output = model(
                    batch["tokens"],
                    batch["positions"],
                    None,
                    labels=batch["labels"],
                    packed_seq_params=batch["packed"],
                )

            def loss(output):
                kept = batch["places"] >= 0
                total[0, batch["places"][kept]] -= output.detach()[kept]
                total[1, batch["places"][kept]] += 1
                return output.mean(), {}

            return output, loss

        is_single = len(self.chunks) == 1
        with torch.set_grad_enabled(not forward_only):
            get_forward_backward_func()(
                forward_step_func=forward_step,
                data_iterator=iter(batches) if is_single else [iter(batches) for _ in self.chunks],
                model=self.chunks[0] if is_single else self.chunks,
                num_microbatches=len(batches),
                seq_length=batches[0]["tokens"].shape[1],
                micro_batch_size=batches[0]["tokens"].shape[0],
                forward_only=forward_only,
            )
        return _whole(total)


def _packed(lengths):
    from megatron.core.packed_seq_params import PackedSeqParams

    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        max_seqlen_q=max(lengths),
        max_seqlen_kv=max(lengths),
    )


def _whole(total):
    """Sum over ranks; tensor-parallel ranks hold the same log-probs, so one of them gives them."""
    from megatron.core import parallel_state as ps

    if ps.get_tensor_model_parallel_rank():
        total.zero_()
    torch.distributed.all_reduce(total)
    assert (total[1] == 1).all(), "the test itself scored a token twice or never"
    return total[0]


class Dispatched:
    """Which experts every router really dispatched for every row, over all ranks.

    Within: hooks on the stock routers. `counts_LRE` says how often (layer, row, expert) was
    dispatched in forward passes; right is once for each recorded expert, and no other.
    """

    def __init__(self, step: Step, table: RouteTable):
        self.step, self.table = step, table
        self.counts_LRE = torch.zeros(
            len(table.shape.layers), table.num_rows, table.shape.num_experts, dtype=torch.int32
        )

    def __enter__(self):
        self.rows = [self._router_order(b["rows"]) for b in self.step.microbatches(self.table.rows)]
        self.forwards = dict.fromkeys(self.table.shape.layers, 0)
        self.hooks = [r.register_forward_hook(self._count) for r in self.step.routers()]
        return self

    def __exit__(self, *exception):
        for hook in self.hooks:
            hook.remove()
        if exception[0] is None:
            torch.distributed.all_reduce(self.counts_LRE)

    def _router_order(self, rows_BS):
        """Through Megatron's own scatter, as the embeddings travel."""
        from megatron.core.tensor_parallel import scatter_to_sequence_parallel_region

        rows_SB = rows_BS.t().contiguous().double()
        if self.step.config.sequence_parallel:
            rows_SB = scatter_to_sequence_parallel_region(rows_SB)
        return rows_SB.reshape(-1).long()

    def _count(self, router, arguments, output):
        if torch._C._current_graph_task_id() != -1:
            return  # a recomputation: the matrix looks at those
        layer = router.layer_number - 1
        rows_T = self.rows[self.forwards[layer]]
        self.forwards[layer] += 1
        kept_T = rows_T >= 0
        place = self.table.shape.layers.index(layer)
        self.counts_LRE[place].index_add_(0, rows_T[kept_T], output[1][kept_T].int())

    def wrong_rows(self):
        """Number of (layer, row) pairs whose experts are not exactly the table's."""
        covered_R = torch.from_numpy(np.array(self.table.covered_T))
        ids_LRK = torch.from_numpy(self.table.expert_ids_LTK.astype(np.int64))
        expected_LRE = torch.zeros_like(self.counts_LRE).scatter_(2, ids_LRK, 1)
        return int((self.counts_LRE != expected_LRE).any(2)[:, covered_R].sum())


def random_table(model):
    """Distinct experts, drawn for every (layer, row); every fifth row and a sequence uncovered."""
    table = RouteTable.empty(model, LENGTHS, source="rollout")
    scores = np.random.default_rng(5).random((len(model.layers), table.num_rows, model.num_experts))
    table.expert_ids_LTK[:] = np.argsort(scores, axis=-1)[..., : model.top_k]
    table.covered_T[:] = np.arange(table.num_rows) % 5 != 4
    table.covered_T[table.offsets_S1[UNCOVERED] : table.offsets_S1[UNCOVERED + 1]] = False
    table.expert_ids_LTK[:, ~table.covered_T] = 0
    return table


def run(rank, folder, out, num_ranks):
    """{plan: its log-probs under several routes, its own record, what was dispatched wrongly}.

    The first plan's record is what every plan replays.
    """
    from megatron_worlds import megatron

    results, path = {}, f"{out}/recorded-{num_ranks}.safetensors"
    for plan in PLANS[num_ranks]:
        with megatron(plan.layout), context_slices.slices(plan.is_contiguous):
            step = Step(plan, folder)
            step.attach("R2")
            found = {}
            with step.replay.recording(LENGTHS) as recorded:
                found["recording"] = step.run(recorded.rows)
            own = recorded.table()
            found["own_ids"] = np.sort(own.expert_ids_LTK, axis=2)
            if not results:
                recorded.table(path)
            found |= _replayed(step, RouteTable.open(path))
            results[plan.name] = found
    return results


def _replayed(step, table):
    replay, found, wrong = step.replay, {}, {}
    with Dispatched(step, table) as seen, replay.replaying(table):
        found["replayed"] = step.run(table.rows)
    wrong["recorded routes"] = seen.wrong_rows()
    with Dispatched(step, table) as seen, replay.replaying(table):
        found["trained"] = step.run(table.rows, forward_only=False)
    wrong["recorded routes, with backward"] = seen.wrong_rows()
    drawn = random_table(replay.shape)
    step.attach("R3")
    replay = step.replay
    with Dispatched(step, drawn) as seen, replay.replaying(drawn, record_live=True) as recorded:
        found["drawn"] = step.run(drawn.rows)
    wrong["drawn routes"] = seen.wrong_rows()
    found["metrics"] = {name: float(m.value()) for name, m in replay.metrics().items()}
    found["num_covered"] = int(drawn.covered_T.sum())
    found["live_ids_under_drawn"] = np.sort(recorded.table().expert_ids_LTK, axis=2)
    step.attach("R2")
    step.move_routers()
    with step.replay.replaying(table):
        found["moved_replayed"] = step.run(table.rows)
        found["moved_live"] = step.run(table.rows, announce=False)
    found["wrong"] = wrong
    return found
