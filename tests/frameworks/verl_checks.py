"""What the ranks of one world do with verl; the tests look at what they return.

All layouts of a world run one after another. verl's own replay comes last, for its patches stay.
"""

from __future__ import annotations

import contextlib
import gc
import os
from types import SimpleNamespace
from typing import Any

import tiny_batch
import torch
import verl_worker
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from verl.utils import tensordict_utils
from verl.utils.megatron.tensor_parallel import vocab_parallel_log_probs_from_logits
from verl.utils.metric import reduce_metrics
from verl_worker import batch, gradients, log_probs, worker
from witness import Witness

from recipes.model import parallel
from recipes.model.parallel import ParallelLayout
from routing_replay.config import ReplayConfig
from routing_replay.errors import RoutingReplayError
from routing_replay.megatron.replay import attach
from routing_replay.routes.routes import Routes
from routing_replay.routes.table import RouteTable
from routing_replay.routes.token_rows import context_positions

LAYOUTS = {
    1: {"one": ParallelLayout()},
    2: {
        "pp2": ParallelLayout(pipeline=2),
        "ep2": ParallelLayout(expert=2),
        "cp2": ParallelLayout(context=2),
        "tp2": ParallelLayout(tensor=2, expert_tensor=1),
    },
}


KEPT = [0, 2, 3, 5]  # sequences of a batch from which a filter dropped the others
ONE_BY_ONE = {"use_dynamic_bsz": False, "micro_batch_size_per_gpu": 1}


def run(rank: int, nproc: int, checkpoint: str) -> dict[str, dict[str, Any]]:
    """Results of every layout, by its name."""
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(nproc),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",  # the world is there already
    }
    results: dict[str, dict[str, Any]] = {}
    for name, layout in LAYOUTS[nproc].items():
        with _groups(layout):
            results[name] = replayed(checkpoint, layout) | stock(checkpoint, layout)
    name, layout = next(iter(LAYOUTS[nproc].items()))
    with _groups(layout):
        results["r2"] = r2(checkpoint, layout)
        results["accumulated"] = accumulated(checkpoint, layout)
        results["resumed"] = resumed(checkpoint, layout)
    layout = LAYOUTS[nproc].get("ep2", layout)
    with _groups(layout):
        results["padded"] = padded(checkpoint, layout)
        results["bad"] = bad_inputs(checkpoint, layout)
    for name, layout in LAYOUTS[nproc].items():
        with _groups(layout):
            results[name] |= own_replay(checkpoint, layout)
    return results


def replayed(checkpoint: str, layout: ParallelLayout) -> dict[str, Any]:
    """By our engine: verl's passes with the rollout's routes, and the reference's pass."""
    made = worker(checkpoint, layout)
    tokens = tiny_batch.sequences(data_rank())
    witness = Witness(made.engine.module, tiny_batch.expected_maps(tokens))
    results: dict[str, Any] = {"engine": type(made.engine).__name__}
    results["replayed"] = log_probs(made, batch(data_rank(), tiny_batch.captured(tokens)))
    results["witness"] = witness.counts()
    with as_lora_actor(made).disable_adapter():
        results["reference"] = log_probs(made, batch(data_rank(), tiny_batch.captured(tokens)))
    whole = tiny_batch.captured_whole(tokens)
    results["whole"] = log_probs(made, batch(data_rank(), whole))
    results["one_by_one"] = log_probs(made, batch(data_rank(), whole, **ONE_BY_ONE))
    results["gradients"] = gradients(made, batch(data_rank(), whole))
    results["gradients_one_by_one"] = gradients(made, batch(data_rank(), whole, **ONE_BY_ONE))
    witness.reset()
    results["metrics"] = update(made, batch(data_rank(), tiny_batch.captured(tokens)))
    results["witness_update"] = witness.counts()
    return results


def stock(checkpoint: str, layout: ParallelLayout) -> dict[str, Any]:
    """By verl's engine, without routes; then a loop of ours over its module, with routes."""
    made = worker(checkpoint, layout, stock=True)
    results = {"stock_engine": type(made.engine).__name__}
    results["stock"] = log_probs(made, batch(data_rank()))
    tokens = tiny_batch.sequences(data_rank())
    scored, places, found = own_loop(made, tokens, tiny_batch.captured_whole(tokens))
    return results | {"loop": scored, "loop_places": places, "loop_gradients": found}


def own_replay(checkpoint: str, layout: ParallelLayout) -> dict[str, Any]:
    """By verl's engine with its own R3."""
    made = worker(checkpoint, layout, stock=True, **verl_worker.own_replay("R3"))
    tokens = tiny_batch.sequences(data_rank())
    flag = {"enable_routing_replay": True}
    whole = tiny_batch.captured_whole(tokens)
    results = {
        "verl": log_probs(made, batch(data_rank(), whole, **flag)),
        "verl_gradients": gradients(made, batch(data_rank(), whole, **flag)),
    }
    witness = Witness(made.engine.module, tiny_batch.expected_maps(tokens))
    log_probs(made, batch(data_rank(), tiny_batch.captured(tokens), **flag))
    return results | {"verl_witness": witness.counts()}


def update(made: Any, data: Any, num_updates: int = 2) -> dict[str, float] | None:
    """Metrics of updates over mini-batches in another order, as verl's trainer logs them."""
    size = len(tiny_batch.LENGTHS) * made.engine.get_data_parallel_size() // num_updates
    tensordict_utils.assign_non_tensor(
        data, epochs=1, mini_batch_size=size, dataloader_kwargs={"shuffle": True}
    )
    output = made.train_mini_batch(data.exclude("global_token_num", "compute_loss"))
    return None if output is None else reduce_metrics(tensordict_utils.get(output, "metrics"))


def r2(checkpoint: str, layout: ParallelLayout) -> dict[str, Any]:
    """R2: the old policy's pass records; the update replays, in another order, by other routers."""
    with verl_worker.environment(ROUTING_REPLAY_MODE="R2"):
        made = worker(checkpoint, layout)
    tokens = tiny_batch.sequences(data_rank())
    witness = Witness(made.engine.module, tiny_batch.expected_maps(tokens))
    log_probs(made, batch(data_rank(), **ONE_BY_ONE))
    witness.demand_what_was_seen([sequence[-1] for sequence in tokens])
    with as_lora_actor(made).disable_adapter():
        log_probs(made, batch(data_rank(), **ONE_BY_ONE))
    live = witness.counts()
    witness.reset()
    metrics = update(made, batch(data_rank(), **ONE_BY_ONE), num_updates=1)
    return {"live": live, "update": witness.counts(), "metrics": metrics}


def accumulated(checkpoint: str, layout: ParallelLayout) -> dict[str, Any]:
    """Gradients of two batches before one update, and those of each batch."""
    made = worker(checkpoint, layout)
    whole = tiny_batch.captured_whole(tiny_batch.sequences(data_rank()))
    halves = [
        batch(data_rank(), [whole[i] for i in kept], kept, **ONE_BY_ONE)
        for kept in ([0, 1, 2], [3, 4, 5])
    ]
    return {
        "together": gradients(made, *halves),
        "apart": [gradients(made, half) for half in halves],
    }


def resumed(checkpoint: str, layout: ParallelLayout) -> dict[str, Any]:
    """Log-probs after an update, and those of a new job that begins with its weights."""
    made = worker(checkpoint, layout)
    routed = tiny_batch.captured(tiny_batch.sequences(data_rank()))
    first = log_probs(made, batch(data_rank(), routed))
    update(made, batch(data_rank(), routed))
    again = worker(checkpoint, layout)
    for old, new in zip(made.engine.module, again.engine.module, strict=True):
        new.load_state_dict(old.state_dict())
    return {
        "first": first,
        "before": log_probs(made, batch(data_rank(), routed)),
        "after": log_probs(again, batch(data_rank(), routed)),
    }


def padded(checkpoint: str, layout: ParallelLayout) -> dict[str, Any]:
    """verl's padded layout (`use_remove_padding=False`)."""
    made = worker(checkpoint, layout, use_remove_padding=False, sequence_parallel=False)
    tokens = tiny_batch.sequences(data_rank())
    witness = Witness(made.engine.module, tiny_batch.expected_maps(tokens))
    output = log_probs(
        made,
        batch(
            data_rank(),
            tiny_batch.captured(tokens),
            use_dynamic_bsz=False,
            use_remove_padding=False,
        ),
    )
    return {"log_probs": output, "witness": witness.counts()}


def bad_inputs(checkpoint: str, layout: ParallelLayout) -> dict[str, Any]:
    """The error of each bad input on this rank; the job goes on after each."""
    made = worker(checkpoint, layout)
    tokens = tiny_batch.sequences(data_rank())
    routed = tiny_batch.captured(tokens)
    is_first = data_rank() == 0
    foreign = [routes.clone() for routes in routed]
    longer = list(routed)
    if is_first:  # on one rank only: the other must not wait for it
        foreign[1][3, 2, 0] = tiny_batch.EXPERTS
        longer[1] = torch.cat([routed[1], routed[1][:1]])
    other_layers = [routes[:, :3] for routes in routed]
    cases = {
        "foreign": foreign,
        "longer": longer,
        "layers": other_layers,
        "none": None if is_first else routed,
        "uncovered": [torch.zeros_like(routes) for routes in routed],
    }
    errors = {
        name: _error(lambda r=r: log_probs(made, batch(data_rank(), r)))
        for name, r in cases.items()
    }
    errors["own_replay"] = _error(
        lambda: worker(checkpoint, layout, **verl_worker.own_replay("R3"))
    )
    errors["dynamic_cp"] = _error(lambda: _refused(dynamic_context_parallel=True))
    witness = Witness(made.engine.module, tiny_batch.expected_maps(tokens))
    log_probs(made, batch(data_rank(), [routed[i] for i in KEPT], KEPT))
    after_drop = witness.counts()
    first = log_probs(made, batch(data_rank(), routed))
    second_actor = worker(checkpoint, layout)  # several actors of a process
    second = log_probs(second_actor, batch(data_rank(), routed))
    again = log_probs(made, batch(data_rank(), routed))
    return {
        "errors": errors,
        "first_actor": [first, again],
        "second_actor": second,
        "after_drop": after_drop,
    }


def own_loop(
    made: Any, tokens: list[torch.Tensor], routed: list[torch.Tensor]
) -> tuple[torch.Tensor | None, torch.Tensor | None, dict[str, torch.Tensor]]:
    """A loop of ours over verl's module, one sequence at a time, with our layout of the rows.

    Returns:
        Log-probs that this rank computed, their places among all tokens, and the gradients.
    """
    engine, table = made.engine, table_of(tokens, routed)
    size = parallel_state.get_context_parallel_world_size()
    context = (parallel_state.get_context_parallel_rank(), size)
    multiple = parallel_state.get_tensor_model_parallel_world_size() * (2 * size if size > 1 else 1)
    starts = torch.tensor([0, *tiny_batch.LENGTHS]).cumsum(0)
    num_data = engine.get_data_parallel_size()
    num_tokens = sum(len(sequence) - 4 for sequence in tokens) * num_data
    scored: list[torch.Tensor] = []
    places: list[torch.Tensor] = []

    def step(iterator: Any, model: Any) -> Any:
        number = next(iterator)
        sequence = tokens[number]
        length = len(sequence) + -len(sequence) % multiple
        ids = torch.zeros(length, dtype=torch.int64)
        ids[: len(sequence)] = sequence
        labels = ids.roll(-1)  # as verl: the last token's label means nothing, and is scored
        bounds = torch.tensor([0, length], dtype=torch.int32)
        rows = table.token_rows(
            [len(sequence)], cu_seqlens=bounds, sequences=[number], context=context
        )
        own = torch.from_numpy(context_positions(bounds, *context))
        with replay.microbatch(rows):
            logits = model(
                input_ids=ids[own][None],
                position_ids=None,
                attention_mask=None,
                packed_seq_params=packed(bounds),
            )
        is_real = own < len(sequence)

        def loss(logits: torch.Tensor) -> Any:
            values = vocab_parallel_log_probs_from_logits(logits, labels[own][None])[0]
            scored.append(values.detach()[is_real])
            places.append(starts[number] + own[is_real])
            value = -values[is_real].float().sum() / num_tokens * num_data
            return value * len(tokens), {}

        return logits, loss

    with attach(engine.module, ReplayConfig(mode="R3")) as replay, engine.train_mode():
        engine.optimizer_zero_grad()
        with replay.replaying(table):
            get_forward_backward_func()(
                forward_step_func=step,
                data_iterator=iter(range(len(tokens))),
                model=engine.module,
                num_microbatches=len(tokens),
                seq_length=1,
                micro_batch_size=1,
                forward_only=size > 1,  # verl scales its loss by tokens there
            )
        found = verl_worker.main_gradients(engine.module)
    if not scored:
        return None, None, found
    return torch.cat(scored), torch.cat(places), found


def packed(bounds: torch.Tensor) -> PackedSeqParams:
    """A batch of one sequence without a mask of its own."""
    names = ("cu_seqlens_q", "cu_seqlens_kv", "cu_seqlens_q_padded", "cu_seqlens_kv_padded")
    length = int(bounds[-1])
    fields = dict.fromkeys(names, bounds) | {"max_seqlen_q": length, "max_seqlen_kv": length}
    return PackedSeqParams(qkv_format="thd", **fields)


def table_of(tokens: list[torch.Tensor], routed: list[torch.Tensor]) -> RouteTable:
    routes = []
    for sequence, ids_TLK in zip(tokens, routed, strict=True):
        ids_TLK = ids_TLK[: len(sequence) - 1].to(torch.uint8).numpy()
        routes.append(
            Routes(
                expert_ids_TLK=ids_TLK,
                covered_T=ids_TLK.any((1, 2)),
                layers=tuple(range(tiny_batch.LAYERS)),
                num_experts=tiny_batch.EXPERTS,
            )
        )
    return RouteTable.from_routes(routes)


def as_lora_actor(made: Any) -> Any:
    """The engine of an actor whose adapter, of no layer, can be turned off."""
    made.engine.peft_cls = SimpleNamespace(disable_adapter=lambda module: contextlib.nullcontext())
    return made.engine


def data_rank() -> int:
    return parallel_state.get_data_parallel_rank()


@contextlib.contextmanager
def _groups(layout: ParallelLayout):
    """Megatron's groups for a layout; verl finds them made."""
    parallel.initialize(layout, seed=1)
    try:
        yield
    finally:
        gc.collect()
        parallel.destroy(keep_world=True)


def _error(call: Any) -> str:
    try:
        call()
    except RoutingReplayError as error:
        return str(error)
    return "no error"


def _refused(**settings: Any) -> None:
    from routing_replay.adapters.verl_preflight import require_replayable

    fields = {"router_replay": SimpleNamespace(mode="disabled"), "dynamic_context_parallel": False}
    model = SimpleNamespace(hf_config=SimpleNamespace())
    require_replayable(SimpleNamespace(**(fields | settings)), model)
