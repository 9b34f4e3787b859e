"""A framework of 60 lines that knows nothing of replay, and what its actor does under a `Job`.

Two ranks, expert-parallel: each has its own sequences, so tables of different sizes.
"""

from __future__ import annotations

import copy
import types

import numpy as np
import torch

from routing_replay.errors import RoutingReplayError
from routing_replay.metrics.sinks import scalars

VOCAB, LAYERS, EXPERTS, TOP_K, WIDTH, MICRO = 64, 2, 8, 2, 12, 2
LENGTHS = ([12, 5, 9, 3], [7, 8, 2, 11])  # of each rank's sequences
NUM_ROWS = sum(sum(lengths) - len(lengths) for lengths in LENGTHS)


class Iterator:
    """Microbatches of a rollout, as frameworks cut them: by a position that moves."""

    def __init__(self, rollout):
        self.rollout, self.position = rollout, 0

    def get(self, key):
        values = self.rollout[key][self.position : self.position + MICRO]
        self.position += MICRO
        return values


def get_batch(iterator):
    """The framework's layout: padded to one width with zeros."""
    tokens = iterator.get("tokens")
    return torch.stack([torch.nn.functional.pad(t, (0, WIDTH - len(t))) for t in tokens])


def build_framework():
    """The framework's training module, with its own name for Megatron's schedule."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    module = types.ModuleType("framework")
    module.get_forward_backward_func = lambda *args: get_forward_backward_func(*args)

    def run(chunks, rollout, forward_only):
        """Log-probs [S, WIDTH] of the rollout, with or without a backward."""
        logp = []

        def forward_step(iterator, model):
            tokens = get_batch(iterator)
            positions = torch.arange(WIDTH).expand(len(tokens), -1)
            output = model(tokens, positions, None, labels=tokens.roll(-1, 1))

            def loss(output):
                logp.append(-output.detach())
                return output.mean(), {}

            return output, loss

        with torch.set_grad_enabled(not forward_only):
            module.get_forward_backward_func()(
                forward_step_func=forward_step,
                data_iterator=Iterator(rollout),
                model=chunks[0],
                num_microbatches=len(rollout["tokens"]) // MICRO,
                seq_length=WIDTH,
                micro_batch_size=MICRO,
                forward_only=forward_only,
            )
        return torch.cat(logp)

    module.run = run
    return module


def rollout_of(rank):
    generator = np.random.default_rng(rank)
    tokens = [torch.from_numpy(generator.integers(1, VOCAB, n)) for n in LENGTHS[rank]]
    scores = [generator.random((n, LAYERS, EXPERTS)) for n in LENGTHS[rank]]
    routed = [torch.from_numpy(np.argsort(s, -1)[..., :TOP_K].astype(np.int32)) for s in scores]
    return {"tokens": tokens, "routed": routed, "is_actor": True}


def lay_out(iterator, numbers):
    twin = copy.copy(iterator)
    twin.rollout = {"tokens": numbers}
    return get_batch(twin)


class Dispatched:
    """A witness on the stock routers: the experts of every token of the last pass."""

    def __init__(self, chunks):
        from megatron.core.transformer.moe.router import TopKRouter

        self.maps = {}
        for module in chunks[0].modules():
            if isinstance(module, TopKRouter):
                module.register_forward_hook(self.see)

    def see(self, router, arguments, output):
        self.maps.setdefault(router.layer_number - 1, []).append(output[1].clone())

    def take(self):
        """bool [L, S, WIDTH, E] of the pass, then forget it."""
        layers = [torch.cat([self.batch(m) for m in maps]) for _, maps in sorted(self.maps.items())]
        self.maps = {}
        return torch.stack(layers)

    @staticmethod
    def batch(map_TE):  # Megatron's order is sequence-major
        return map_TE.reshape(WIDTH, MICRO, EXPERTS).transpose(0, 1)


def wrong_tokens(maps_LSWE, routed):
    """Fed tokens that were not dispatched to exactly their routes, over all layers."""
    wrong = 0
    for s, ids_TLK in enumerate(routed):
        for layer in range(LAYERS):
            ids_TK = ids_TLK[:-1, layer].long()
            expected = torch.zeros(len(ids_TK), EXPERTS, dtype=torch.bool).scatter(1, ids_TK, True)
            wrong += int((maps_LSWE[layer, s, : len(ids_TK)] != expected).any(1).sum())
    return wrong


def build_model():
    from transformers import Qwen3MoeConfig

    from recipes.model.model import build_model, transformer_config
    from recipes.model.parallel import ParallelLayout

    layout = ParallelLayout(expert=2)
    hf = Qwen3MoeConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=32,
        moe_intermediate_size=16,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
    )
    return build_model(transformer_config(hf, layout, spec="local"), layout)


def failure(function):
    try:
        function()
    except RoutingReplayError as error:
        return str(error)
    return None


def new_job(mode, chunks, framework, folder="", max_uncovered=1.0):
    """A job on a framework's module, and a switch for what its batches are."""
    from routing_replay.adapters.batch import StepBatch
    from routing_replay.adapters.job import Job
    from routing_replay.adapters.settings import AdapterSettings

    settings = AdapterSettings(mode=mode, metrics_dir=folder, max_uncovered=max_uncovered)
    job = Job(settings, "framework 1.0")
    batches = {}

    def batch_of(call):
        rollout = call.data_iterator.rollout
        if not rollout["is_actor"]:
            return None
        key = id(rollout)
        if key not in batches:
            batches[key] = StepBatch(rollout["tokens"], rollout.get("routed"))
        return batches[key]

    job.wrap_schedules(framework, batch_of, lay_out)
    return job


def run(rank, folder):
    """What each rank saw, by name."""
    from megatron_worlds import megatron

    from recipes.model.parallel import ParallelLayout

    with megatron(ParallelLayout(expert=2)):
        chunks = build_model()
        seen = Dispatched(chunks)
        stock = build_framework()
        rollout = rollout_of(rank)
        live = stock.run(chunks, rollout, forward_only=False)
        own_maps = seen.take()
        return {
            "R3": replaying(chunks, seen, rollout, live, folder),
            "R2": recording(chunks, seen, rollout, live, own_maps),
            "gaps": gaps(rank, chunks, rollout),
            "failures": failures(rank, chunks, rollout),
        }


def replaying(chunks, seen, rollout, live, folder):
    framework = build_framework()
    job = new_job("R3", chunks, framework, folder)
    first = framework.run(chunks, rollout, forward_only=True)
    wrong = [wrong_tokens(seen.take(), rollout["routed"])]
    update = framework.run(chunks, rollout, forward_only=False)
    wrong.append(wrong_tokens(seen.take(), rollout["routed"]))
    metrics = scalars(job.metrics)
    reference = framework.run(chunks, rollout | {"is_actor": False}, forward_only=False)
    seen.take()
    own = own_loop(job, chunks, rollout)
    seen.take()
    job.require_replayed()
    job.attach(chunks).remove()
    return {
        "wrong": wrong,
        "differs from live": not torch.equal(update, live),
        "equals our own loop": torch.equal(update, own) and torch.allclose(first, own, atol=1e-5),
        "the reference is stock": torch.equal(reference, live),
        "metrics": metrics,
    }


def own_loop(job, chunks, rollout):
    """The same pass in a loop of ours: rows from the table, no framework, no job."""
    from routing_replay.adapters.batch import StepBatch

    replay = job.attach(chunks)
    table = StepBatch(rollout["tokens"], rollout["routed"]).table(replay.shape)
    lengths = [len(t) for t in rollout["tokens"]]
    logp = []
    with replay.replaying(table):
        for start in range(0, len(lengths), MICRO):
            which = range(start, start + MICRO)
            tokens = get_batch(Iterator({"tokens": [rollout["tokens"][i] for i in which]}))
            rows = table.token_rows([lengths[i] for i in which], width=WIDTH, sequences=which)
            with replay.microbatch(rows):
                output = chunks[0](
                    tokens,
                    torch.arange(WIDTH).expand(MICRO, -1),
                    None,
                    labels=tokens.roll(-1, 1),
                )
            output.mean().backward()
            logp.append(-output.detach())
    return torch.cat(logp)


def recording(chunks, seen, rollout, live, own_maps):
    framework = build_framework()
    job = new_job("R2", chunks, framework)
    refused = failure(lambda: framework.run(chunks, rollout, forward_only=False))
    framework.run(chunks, rollout, forward_only=True)
    seen.take()
    # Mini-batches of the update take the sequences in another order.
    order = [2, 3, 0, 1]
    shuffled = {"tokens": [rollout["tokens"][i] for i in order], "is_actor": True}
    update = framework.run(chunks, shuffled, forward_only=False)
    seen.take()
    routers = [m for m in chunks[0].modules() if type(m).__name__ == "TopKRouter"]
    before = [r.weight.detach().clone() for r in routers]
    with torch.no_grad():
        for router in routers:
            router.weight += torch.randn(router.weight.shape)
    framework.run(chunks, shuffled, forward_only=False)
    fed = [slice(0, n - 1) for n in (len(t) for t in shuffled["tokens"])]
    maps = seen.take()
    with torch.no_grad():
        for router, weight in zip(routers, before, strict=True):
            router.weight.copy_(weight)
    kept = all(torch.equal(maps[:, s, t], own_maps[:, order[s], t]) for s, t in enumerate(fed))
    job.attach(chunks).remove()
    return {
        "without a recording": refused,
        "own routes are the stock pass": torch.equal(update, live[order]),
        "moved routers take the recorded experts": kept,
    }


def gaps(rank, chunks, rollout):
    """The last four fed rows of rank 1's first sequence were never captured."""
    routed = [ids.clone() for ids in rollout["routed"]]
    if rank:
        routed[0][2:] = 0
    rollout, results = rollout | {"routed": routed}, {}
    for name, bound in {"at the bound": 4 / 24, "above it": 3 / 24}.items():
        framework = build_framework()
        job = new_job("R3", chunks, framework, max_uncovered=bound)
        results[name] = failure(lambda run=framework.run: run(chunks, rollout, False))
        job.attach(chunks).remove()
        results[f"metrics {name}"] = job.metrics
    return results


def failures(rank, chunks, rollout):
    framework = build_framework()
    job = new_job("R3", chunks, framework)
    plain = {"tokens": rollout["tokens"], "is_actor": True}
    one_rank = failure(lambda: framework.run(chunks, plain if rank else rollout, False))
    cut = rollout | {"routed": rollout["routed"][: len(LENGTHS[rank]) - rank]}
    filtered = failure(lambda: framework.run(chunks, cut, False))
    zeros = plain | {"routed": [torch.zeros_like(r) for r in rollout["routed"]]}
    empty = failure(lambda: framework.run(chunks, zeros, False))
    ended = failure(job.require_replayed)
    framework.run(chunks, rollout, False)
    mid_job = failure(lambda: framework.run(chunks, zeros, False))
    other = failure(lambda: job.attach([torch.nn.Linear(1, 1)]))
    job.attach(chunks).remove()
    return {
        "one rank": one_rank,
        "filtered": filtered,
        "first": empty,
        "end": ended,
        "mid": mid_job,
        "other": other,
    }
