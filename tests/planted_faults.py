"""A real Megatron model as rollout engine, another as trainer, and faults planted between them.

The engine's weights are rounded to bfloat16 and its routers too, so that a clean pair differs a
little everywhere, as two engines do.
"""

import dataclasses
import importlib.util
import json
from pathlib import Path

import numpy as np
import torch
from planted_engines import (
    Engine,
    Rollout,
    permute_experts,
    to_bfloat16,
    to_three_bits,
)

from routing_replay.analysis.attribution import Progress, Variant, attribute, plan, summarize
from routing_replay.analysis.comparison import compare_tables
from routing_replay.config import ReplayConfig
from routing_replay.metrics.policy_kl import policy_metrics
from routing_replay.metrics.typed import to_floats
from routing_replay.routes.routes import Routes
from routing_replay.routes.table import RouteTable

FAULTY_LAYER = 2
TOP_P = 0.9


def edited(table: RouteTable, edit) -> RouteTable:
    """A copy of the table whose faulty layer's ids [S, T, K] went through `edit`."""
    shape = (table.num_sequences, -1, table.shape.top_k)
    sequences = []
    ids_LTK, gates_LTK = table.expert_ids_LTK.copy(), table.gate_probs_LNK.copy()
    for values_LTK in (ids_LTK, gates_LTK):
        is_ids = values_LTK is ids_LTK
        values_STK = values_LTK[FAULTY_LAYER].reshape(shape)
        values_LTK[FAULTY_LAYER] = edit(values_STK, is_ids).reshape(values_LTK.shape[1:])
    for number in range(table.num_sequences):
        rows = slice(table.offsets_S1[number], table.offsets_S1[number + 1])
        sequences.append(
            Routes(
                expert_ids_TLK=np.ascontiguousarray(ids_LTK[:, rows].swapaxes(0, 1)),
                gate_probs_TLK=np.ascontiguousarray(gates_LTK[:, rows].swapaxes(0, 1)),
                layers=table.shape.layers,
                num_experts=table.shape.num_experts,
            )
        )
    return RouteTable.from_routes(sequences)


def with_few_gates(table: RouteTable) -> RouteTable:
    """The same routes with the gates of every seventh row only."""
    keeps_gates_T = np.arange(table.num_rows) % 7 == 3
    return RouteTable.from_routes(list(table.sequences()), keeps_gates_T=keeps_gates_T)


def shift(values_STK, is_ids):
    return np.roll(values_STK, 1, axis=1)


def renumber(values_STK, is_ids):
    experts = np.random.default_rng(3).permutation(8).astype(np.uint8)
    return experts[values_STK] if is_ids else values_STK


def examine(rank: int, folder: str) -> dict:
    """Every fault through replay, metrics and attribution; what the tools then say of it."""
    from megatron_worlds import megatron
    from tiny_models import write_tiny_qwen3_moe

    from recipes.model.model import build_model, transformer_config
    from recipes.model.parallel import ParallelLayout
    from recipes.model.weights import load_hf

    checkpoint = write_tiny_qwen3_moe(Path(folder) / "old", top_k=2)
    layout = ParallelLayout()
    with megatron(layout):
        config = transformer_config(checkpoint, layout)

        def fresh(path):
            chunks = build_model(config, layout)
            load_hf(chunks, path)
            return chunks

        clean_engine = Engine(fresh(checkpoint)[0], to_bfloat16)
        clean = clean_engine.sample()

        def with_router(rounded):
            engine = Engine(fresh(checkpoint)[0], to_bfloat16)
            engine.rounded_router(FAULTY_LAYER, rounded)
            return engine.sample()

        def edit(how):
            return dataclasses.replace(clean, table=edited(clean.table, how))

        rollouts = {
            "clean": clean,
            "another seed": clean_engine.sample(seed=1),
            "gates of a sample": dataclasses.replace(clean, table=with_few_gates(clean.table)),
            "coarse router": with_router(to_three_bits),
            "shifted": edit(shift),
            "renumbered": edit(renumber),
            "truncated": clean_engine.sample(top_p=TOP_P),
            "silently truncated": clean_engine.sample(top_p=TOP_P, is_silent=True),
        }
        trainer = Trainer(fresh(checkpoint))
        found = {name: trainer.look_at(rollout, folder, name) for name, rollout in rollouts.items()}
        misloaded = fresh(checkpoint)
        permute_experts(misloaded[0], FAULTY_LAYER)
        found["misloaded"] = Trainer(misloaded).look_at(clean, folder, "misloaded")
        updated = fresh(checkpoint)
        disturb(updated[0])
        found["stale"] = Trainer(updated).look_at(
            clean, folder, "stale", rollout_chunks=fresh(checkpoint)
        )
        return found


def disturb(chunk) -> None:
    """An update: every weight moves by 3 % of its matrix's size."""
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in chunk.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.03 * parameter.std() * noise)


class Trainer:
    """The attached model, and the tools looking at one rollout through it."""

    def __init__(self, chunks):
        from routing_replay.megatron import attach

        self.chunks = chunks
        self.replay = attach(chunks, ReplayConfig(mode="R3", agreement_tokens=0))

    def look_at(self, rollout: Rollout, folder: str, name: str, rollout_chunks=None) -> dict:
        """Findings of a run of one step, the comparison of routes, and the attribution."""
        batch = rollout.batch()
        tool = load_tool()
        scorer = tool.Scorer(self.chunks, self.replay, batch, rollout.table, 32, 1.0)
        old = None
        if rollout_chunks is not None:
            replay = Trainer(rollout_chunks).replay
            old = tool.Scorer(rollout_chunks, replay, batch, rollout.table, 32, 1.0)
        metrics = {}
        counts_T = batch.mask_N
        with torch.no_grad(), self.replay.replaying(rollout.table, record_live=True) as recorded:
            logp_T = self._logp(scorer)
        metrics |= self.replay.metrics()
        live_T = self._logp(scorer)
        logp_mu_T = batch.logp_mu_N
        metrics |= policy_metrics(logp_T, logp_mu_T, counts_T)
        metrics |= policy_metrics(live_T, logp_mu_T, counts_T, suffix="_live")
        compared = compare_tables(rollout.table, recorded.table())
        return {
            "metrics": to_floats(metrics),
            "findings": findings(to_floats(metrics), Path(folder) / f"run {name}"),
            "explanations": {r.layer: r.explanation for r in compared.layers if r.explanation},
            "attribution": self._attribute(scorer, rollout, old),
        }

    def _logp(self, scorer) -> torch.Tensor:
        with torch.no_grad():
            return scorer.run()[0]

    def _attribute(self, scorer, rollout, old):
        layers = rollout.table.shape.layers
        progress = Progress(None, {})

        def score(variant: Variant):
            return (old if variant.is_rollout_weights else scorer).score(variant)

        attribute(plan(layers, ("without",), old is not None), score, progress)
        return summarize(layers, progress.sums)


def findings(metrics: dict, run_dir: Path) -> list[str]:
    """What `routing-replay report` would say."""
    from routing_replay.metrics.sinks import JsonLinesSink
    from routing_replay.report.findings import diagnose, sentence
    from routing_replay.report.run import read_run

    JsonLinesSink(run_dir).write(0, metrics)
    (run_dir / "config.json").write_text(json.dumps({"mode": "R3"}))
    return [f"{finding.level}: {sentence(finding)}" for finding in diagnose(read_run(run_dir))]


def load_tool():
    """tools/attribute_kl.py as a module; nothing imports tools/ by name."""
    path = Path(__file__).parents[1] / "tools" / "attribute_kl.py"
    spec = importlib.util.spec_from_file_location("attribute_kl", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
