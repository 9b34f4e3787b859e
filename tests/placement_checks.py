"""What the ranks of `test_megatron_placement.py` compute: one training, experts moved or not."""

import contextlib
import dataclasses
from unittest import mock

import megatron_batches
import numpy as np
import torch
from megatron_worlds import megatron
from te_stand_ins import te_spec

from recipes.minirl.policy import models
from recipes.minirl.settings.sections import TrainingSettings
from recipes.model.cpu import InertEvent
from recipes.model.model import transformer_config
from recipes.model.parallel import ParallelLayout
from recipes.model.saving import save_hf
from recipes.model.weights import load_hf, named_hf_tensors
from routing_replay.balance import Placement
from routing_replay.config import ReplayConfig
from routing_replay.errors import ConfigError, ReplayError
from routing_replay.routes.routes import Routes
from routing_replay.routes.table import RouteTable

# isort: split
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from megatron.core.transformer.moe import token_dispatcher
from megatron.core.transformer.moe.moe_layer import MoELayer

MOVES = {3: 1, 8: 2}  # before these updates the experts move; the values are seeds
NUM_UPDATES, COMPARED = 14, (3, 8, 13)
LENGTH, VOCAB = 16, 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One layout, precision and optimizer.

    Args:
        model: "qwen" (top-2: sums of two terms have one order) or "glm" (top-4, bias, groups).
    """

    name: str
    layout: ParallelLayout
    model: str = "qwen"
    dtype: torch.dtype = torch.float32
    is_sharded: bool = False
    is_te: bool = False
    options: dict = dataclasses.field(default_factory=dict)


EP2 = ParallelLayout(expert=2)
BF16 = {"dtype": torch.bfloat16}
CASES = {
    1: (Case(name="one", layout=ParallelLayout(), **BF16),),
    2: (
        Case(name="ep2-alltoall", layout=EP2),
        Case(name="ep2-allgather", layout=EP2, options={"dispatcher": "allgather"}, **BF16),
        Case(name="ep2-sharded", layout=EP2, is_sharded=True, **BF16),
        Case(name="ep2-grouped", layout=EP2, is_te=True, options={"moe_grouped_gemm": True}),
        Case(name="ep2-recompute", layout=EP2, options={"recompute": "moe"}),
        Case(name="glm-ep2", layout=EP2, model="glm"),
    ),
    4: (
        Case(name="ep4", layout=ParallelLayout(expert=4)),
        Case(name="ep2-edp2", layout=EP2, **BF16),
        Case(name="ep2-edp2-sharded", layout=EP2, is_sharded=True),
        Case(name="ep2-edp2-sharded-bf16", layout=EP2, is_sharded=True, **BF16),
        Case(name="tp2-ep2", layout=ParallelLayout(tensor=2, expert=2, expert_tensor=1)),
        Case(name="tp2-ep2-etp2", layout=ParallelLayout(tensor=2, expert=2), **BF16),
        Case(name="pp2-ep2", layout=ParallelLayout(pipeline=2, expert=2), is_sharded=True),
        Case(name="cp2-ep4", layout=ParallelLayout(context=2, expert=4)),
        Case(name="glm-ep4", layout=ParallelLayout(expert=4), model="glm", is_sharded=True),
    ),
}


def run(rank, folders, out, names):
    """The differences between natural and moved experts, by case."""
    results = {}
    for case in [case for cases in CASES.values() for case in cases if case.name in names]:
        folder = folders[case.model]
        with te_spec() if case.is_te else contextlib.nullcontext():
            natural = train(case, folder, f"{out}/natural-{case.name}", is_moved=False)
            moved = train(case, folder, f"{out}/moved-{case.name}", is_moved=True)
        results[case.name] = compared(natural, moved)
    return results


def compared(natural, moved):
    """Largest differences; 0 means equal bits."""
    found = {name: moved[name] for name in ("num_moved", "guards", "sizes")}
    for name in ("logits", "states", "exported", "replayed", "recorded", "loaded"):
        pairs = list(zip(natural[name], moved[name], strict=True))
        assert all(a.shape == b.shape and a.dtype == b.dtype for a, b in pairs), name
        found[name] = max([float((a.float() - b.float()).abs().max()) for a, b in pairs], default=0)
        found[f"num_{name}"] = len(pairs)
    return found


def train(case, folder, out, is_moved):
    """Train with live routing; export, replay, record and save while the experts are elsewhere."""
    from routing_replay.megatron.placement import place_experts

    with megatron(case.layout):
        config, chunks, optimizer = build(case, folder)
        placed = place_experts(chunks, optimizer)
        found = {"logits": [], "num_moved": []}
        for number in range(NUM_UPDATES):
            if is_moved and number in MOVES:
                placed.move(random_placement(placed, MOVES[number]))
                found["num_moved"].append(placed.num_moved)
            if number in COMPARED:
                logits = megatron_batches.megatron_logits(chunks, batch(number), vocab_size=VOCAB)
                found["logits"] += logits or []
            update(chunks, optimizer, number)
        found["exported"] = [t for _, t in named_hf_tensors(chunks) if t is not None]
        found["replayed"], found["recorded"], dispatch = replay_and_record(case, chunks)
        save_hf(chunks, out, source=folder)
        found["guards"] = guards(chunks, placed) if is_moved else None
        found["sizes"] = known_sizes(case, chunks) if is_moved else None
        with placed.natural():
            found["states"] = states(chunks, optimizer)
        # Loading a checkpoint fills the experts where they are.
        load_hf(chunks, out)
        optimizer.reload_model_params()
        found["loaded"] = (
            megatron_batches.megatron_logits(chunks, batch(99), vocab_size=VOCAB) or []
        )
        if is_moved:
            found["guards"]["dispatch"] = dispatch
            found["guards"]["interrupted"] = interrupted(chunks, placed)
        return found


def build(case, folder):
    settings = TrainingSettings(
        learning_rate=1e-2, clip_grad=0.0, distributed_optimizer=case.is_sharded
    )
    config = transformer_config(folder, case.layout, dtype=case.dtype, **case.options)
    if case.is_te:
        config.layer_spec = "te"
    config.finalize_model_grads_func = finalize_model_grads
    chunks = models.trained(config, case.layout, folder, settings)
    return config, chunks, models.make_optimizer(chunks, settings, case.dtype)


def batch(number):
    """Two microbatches of two sequences, others on each data-parallel rank."""
    seed = 1000 * number + parallel_state.get_data_parallel_rank()
    generator = torch.Generator().manual_seed(seed)
    return [list(torch.randint(VOCAB, (2, LENGTH), generator=generator)) for _ in range(2)]


def update(chunks, optimizer, number):
    for chunk in chunks:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    megatron_batches.megatron_backward(chunks, batch(number))
    optimizer.step()


def random_placement(placed, seed):
    rng = np.random.default_rng(seed)
    num_layers, num_experts = placed.placement.experts_LE.shape
    experts_LE = np.stack([rng.permutation(num_experts) for _ in range(num_layers)])
    return Placement(experts_LE=experts_LE, num_ranks=placed.placement.num_ranks)


def states(chunks, optimizer):
    """All that this rank stores of its parameters."""
    from routing_replay.megatron.expert_tensors import optimizer_parts, stored_shards

    parts = optimizer_parts(optimizer)
    found = []
    for chunk in chunks:
        for parameter in chunk.parameters():
            by_name = stored_shards(parts, parameter)
            found += [by_name[name].values_N.clone() for name in sorted(by_name)]
    return found


def replay_and_record(case, chunks):
    """Logits under drawn routes, and the live routes that a recording takes, in the model's ids."""
    from routing_replay.megatron import attach

    if case.layout.pipeline > 1 or case.layout.context > 1:
        return [], [], None
    sequences = torch.stack(batch(7)[0])
    with attach(chunks, ReplayConfig(mode="R3", agreement_every=1)) as replay, torch.no_grad():
        table = drawn_table(replay.shape)
        rows = table.token_rows([LENGTH + 1] * 2, width=LENGTH)
        rows[0, :5] = -1  # these tokens route live
        due = dispatched(case, table, rows)
        options = {"record_live": True, "is_shared": False, "dispatch": due}
        with replay.replaying(table, **options) as recorded:
            logits = forward(replay, chunks[0], sequences, rows)
        overlap = replay.metrics()["routing_replay/overlap"].value_L()
        ids_LTK = recorded.table().expert_ids_LTK.astype(int)
        due[0, 0, 3] += 1
        wrong = None
        try:
            with replay.replaying(table, dispatch=due):
                forward(replay, chunks[0], sequences, rows)
        except ReplayError as error:
            wrong = str(error)
        return [logits, overlap], [torch.from_numpy(ids_LTK)], wrong


def known_sizes(case, chunks):
    """A step whose dispatchers count, and one whose dispatchers are given their sizes."""
    from routing_replay.megatron import attach
    from routing_replay.megatron.placement import experts_of

    if case.layout.pipeline > 1 or case.layout.context > 1:
        return None
    sequences = torch.stack(batch(7)[0])
    with attach(chunks, ReplayConfig(mode="R3")) as replay:
        table, rows = live_table(replay, chunks[0], sequences)
        group = parallel_state.get_expert_model_parallel_group()
        counts_DLE = [None] * torch.distributed.get_world_size(group)
        own_LE = table.expert_counts().sum(0, dtype=np.int64)
        torch.distributed.all_gather_object(counts_DLE, own_LE, group=group)
        sizes = np.stack(counts_DLE)[None]
        try:
            given = stepped(replay, chunks[0], sequences, rows, table, sizes=sizes)
        except ConfigError as error:
            return {"refused": str(error)}
        counted = stepped(replay, chunks[0], sequences, rows, table, dispatch=sizes.sum(1))
        found = {
            "refused": None,
            "different": [n for n, v in given[0].items() if not torch.equal(v, counted[0][n])],
            "is_finite": all(bool(v.isfinite().all()) for v in given[0].values()),
            "given": given[1],
            "counted": counted[1],
        }
        layer = next(m for m in chunks[0].modules() if hasattr(m, "token_dispatcher"))
        # Two experts of one rank: the messages are as long as before, the experts' shares are not.
        experts = [None] * len(counts_DLE)
        torch.distributed.all_gather_object(experts, experts_of(layer), group=group)
        row = replay.shape.layers.index(layer.router.layer_number - 1)
        busiest = int(sizes[0, 0, row].argmax())
        (other, *_) = next(set(own) - {busiest} for own in experts if busiest in own)
        wrong = sizes.copy()
        wrong[0, 0, row, [busiest, other]] += np.array([-1, 1])
        uncovered = rows.clone()
        uncovered[0, :5] = -1
        found["errors"] = [
            error_of(replay, chunks[0], sequences, rows, table, sizes=wrong),
            error_of(replay, chunks[0], sequences, uncovered, table, sizes=sizes),
            error_of(replay, chunks[0], sequences, rows, table, sizes=sizes + 1),
        ]
        return found


def live_table(replay, chunk, sequences):
    """The live routes of this rank's sequences, and their rows."""
    lengths = [LENGTH + 1] * 2
    with torch.no_grad(), replay.recording(lengths, is_shared=False) as recorded:
        forward(replay, chunk, sequences, recorded.token_rows(lengths, width=LENGTH))
    table = recorded.table()
    table.source = "rollout"
    return table, table.token_rows(lengths, width=LENGTH)


def stepped(replay, chunk, sequences, rows, table, **counts):
    """Gradients of a replayed step; how often the host waits for sizes, and ranks gather them."""
    waits, gathers = [], []
    gather = token_dispatcher.gather_from_sequence_parallel_region

    def counted_gather(*arguments, **options):
        gathers.append(1)
        return gather(*arguments, **options)

    chunk.zero_grad_buffer()
    for parameter in chunk.parameters():
        parameter.grad = None  # an optimizer's step leaves it as an alias of the buffer
    with (
        mock.patch.object(InertEvent, "synchronize", lambda _: waits.append(1)),
        mock.patch.object(token_dispatcher, "gather_from_sequence_parallel_region", counted_gather),
        replay.replaying(table, **counts),
    ):
        logits = forward(replay, chunk, sequences, rows)
        logits.float().square().mean().backward()
    values = {name: p.main_grad.clone() for name, p in chunk.named_parameters()}
    values["logits"] = logits.detach()
    chunk.zero_grad_buffer()
    return values, {"waits": len(waits), "gathers": len(gathers)}


def error_of(replay, chunk, sequences, rows, table, **counts):
    try:
        stepped(replay, chunk, sequences, rows, table, **counts)
    except ReplayError as error:
        chunk.zero_grad_buffer()
        return str(error)
    return None


def dispatched(case, table, rows):
    """Tokens with routes that a group of experts gets from the ranks that bring it this batch."""
    layout = case.layout
    num_bringing = layout.expert * layout.expert_tensor // (layout.tensor * layout.context)
    counts_LE = np.zeros((len(table.shape.layers), table.shape.num_experts), np.int64)
    for row in rows[rows >= 0].tolist():
        for layer, ids_TK in enumerate(table.expert_ids_LTK):
            counts_LE[layer, ids_TK[row]] += num_bringing
    return counts_LE[None]


def forward(replay, chunk, sequences, rows):
    positions = torch.arange(LENGTH).expand_as(sequences)
    with replay.microbatch(rows):
        return chunk(sequences, positions, None)


def drawn_table(shape):
    rng = np.random.default_rng(0)
    size = (LENGTH, len(shape.layers), shape.num_experts)
    ids = [np.argsort(rng.random(size), -1)[..., : shape.top_k].astype(np.uint8) for _ in range(2)]
    return RouteTable.from_routes(
        [Routes(expert_ids_TLK=i, layers=shape.layers, num_experts=shape.num_experts) for i in ids]
    )


def guards(chunks, placed):
    """What refuses to number experts that are elsewhere."""
    found = {}
    for name in ("state_dict", "sharded_state_dict"):
        try:
            for chunk in chunks:
                getattr(chunk, name)()
            found[name] = None
        except ReplayError as error:
            found[name] = str(error)
    with placed.natural():
        for chunk in chunks:
            chunk.state_dict()
    return found


def interrupted(chunks, placed):
    """After a move that failed neither a forward nor a checkpoint comes through."""
    found = []

    def fail(*_, **__):
        raise OSError("the network is gone")

    with (
        mock.patch.object(torch.distributed, "all_to_all_single", fail),
        contextlib.suppress(OSError),
    ):
        placed.move(random_placement(placed, 5))
    # One layer, not the whole model: a later pipeline stage would wait for one that has failed.
    layer = next(m for chunk in chunks for m in chunk.modules() if isinstance(m, MoELayer))
    attempts = (
        lambda: layer(torch.zeros(4, 1, layer.config.hidden_size)),
        lambda: placed.home(),
        lambda: [chunk.state_dict() for chunk in chunks],
    )
    for attempt in attempts:
        try:
            attempt()
            found.append(None)
        except ReplayError as error:
            found.append(str(error))
    return found
