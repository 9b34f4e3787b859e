"""A real Megatron model as rollout engine, another as trainer, and faults planted between them.

The engine's weights are rounded to bfloat16 and its routers too, so that a clean pair differs a
little everywhere, as two engines do. It samples token by token from its own distribution.
"""

import dataclasses
import importlib.util
import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from routing_replay.analysis.arms import ScoredArms, Scores
from routing_replay.analysis.attribution import Progress, Variant, attribute, plan, summarize
from routing_replay.analysis.bisection import arm_of_layers, bisect, halve, layers_cost
from routing_replay.analysis.comparison import compare_tables
from routing_replay.config import ReplayConfig
from routing_replay.metrics.policy_kl import policy_metrics
from routing_replay.metrics.typed import to_floats
from routing_replay.routes.batch import RolloutBatch
from routing_replay.routes.routes import Routes
from routing_replay.routes.table import RouteTable

NUM_SEQUENCES, NUM_PROMPT, NUM_TOKENS = 64, 4, 28
FAULTY_LAYER = 2
TOP_P = 0.9
BATCH_FILE = "batch.safetensors"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rollout:
    """What an engine returns: tokens, log-probs of the sampled ones, routes."""

    tokens_ST: torch.Tensor
    logp_mu_ST: torch.Tensor
    table: RouteTable

    def batch(self) -> RolloutBatch:
        sampled_ST = torch.arange(NUM_TOKENS - 1) >= NUM_PROMPT - 1
        return RolloutBatch(
            input_ids_ST=self.tokens_ST[:, :-1],
            labels_ST=self.tokens_ST[:, 1:],
            mask_ST=sampled_ST.expand(NUM_SEQUENCES, -1),
            logp_mu_ST=self.logp_mu_ST,
            lengths_S=torch.full((NUM_SEQUENCES,), NUM_TOKENS),
        )


class Recorder:
    """Stands at a router's seam of the engine and keeps what it decided.

    Attributes:
        power: The combine weights are raised to it and renormalised.
    """

    layer_number = 0
    power = 1.0

    def __init__(self):
        self.ids_TK = self.gates_TK = self.weights_TK = None

    def note_weights(self, router, arguments, output):
        probs_TE, routing_map_TE = output
        if self.power != 1:
            probs_TE = probs_TE**self.power
            probs_TE = probs_TE / probs_TE.sum(1, keepdim=True)
        self.weights_TK = probs_TE.detach().gather(1, self.ids_TK).float()
        return probs_TE, routing_map_TE

    def get_replay_topk(
        self, scores, topk, num_groups=None, group_topk=None, default_compute_topk=None
    ):
        values, ids_TK = default_compute_topk(scores, topk, num_groups, group_topk)
        self.ids_TK = ids_TK
        self.gates_TK = scores.detach().float().softmax(-1).gather(1, ids_TK)
        return values, ids_TK


class Engine:
    """A Megatron model that samples, with its weights rounded to bfloat16."""

    def __init__(self, chunk):
        from routing_replay.megatron.routers import find_routers

        self.chunk = chunk
        with torch.no_grad():
            for parameter in chunk.parameters():
                parameter.copy_(parameter.bfloat16())
        self.routers = [found.router for found in find_routers([chunk])]
        self.recorders = [Recorder() for _ in self.routers]
        for router, recorder in zip(self.routers, self.recorders, strict=True):
            router.router_replay = recorder
            router.register_forward_hook(recorder.note_weights)

    def rounded_router(self, layer: int, rounded) -> None:
        """This layer's router rounds its logits."""
        router = self.routers[layer]
        gating = router.gating
        router.gating = lambda hidden: rounded(gating(hidden))

    @torch.no_grad()
    def sample(self, top_p: float = 1.0, seed: int = 0, is_silent: bool = False) -> Rollout:
        """Sequences of one length from random prompts.

        `is_silent` reports the log-probs from before top-p, as SGLang does.
        """
        generator = torch.Generator().manual_seed(seed)
        vocab = self.chunk.vocab_size
        tokens_ST = torch.randint(vocab, (NUM_SEQUENCES, NUM_PROMPT), generator=generator)
        logps = []
        while tokens_ST.shape[1] < NUM_TOKENS:
            log_probs_SV = self._logits(tokens_ST)[:, -1].log_softmax(-1)
            truncated_SV = truncate(log_probs_SV, top_p)
            chosen_S1 = torch.multinomial(truncated_SV.exp(), 1, generator=generator)
            reported_SV = log_probs_SV if is_silent else truncated_SV
            logps.append(reported_SV.gather(1, chosen_S1))
            tokens_ST = torch.cat([tokens_ST, chosen_S1], 1)
        self._logits(tokens_ST[:, :-1])  # routes of the whole sequences, as a cache would keep them
        prompt_SP = torch.zeros(NUM_SEQUENCES, NUM_PROMPT - 1)
        return Rollout(
            tokens_ST=tokens_ST, logp_mu_ST=torch.cat([prompt_SP, *logps], 1), table=self._table()
        )

    def _logits(self, tokens_ST):
        positions_ST = torch.arange(tokens_ST.shape[1]).expand(len(tokens_ST), -1)
        return self.chunk(tokens_ST, positions_ST, None).float()

    def _table(self) -> RouteTable:
        def by_sequence(name):
            # Routers see [position, sequence] order.
            values = torch.stack([getattr(r, name) for r in self.recorders], 1)
            return values.unflatten(0, (NUM_TOKENS - 1, NUM_SEQUENCES)).swapaxes(0, 1).numpy()

        ids_STLK, gates_STLK = by_sequence("ids_TK"), by_sequence("gates_TK")
        weights_STLK = by_sequence("weights_TK")
        return RouteTable.from_routes(
            [
                Routes(
                    expert_ids_TLK=ids_TLK.astype(np.uint8),
                    gate_probs_TLK=gates_TLK.astype(np.float16),
                    combine_weights_TLK=weights_TLK,
                    layers=range(len(self.routers)),
                    num_experts=self.routers[0].config.num_moe_experts,
                )
                for ids_TLK, gates_TLK, weights_TLK in zip(
                    ids_STLK, gates_STLK, weights_STLK, strict=True
                )
            ]
        )


def to_three_bits(logits_TE):
    """As numbers with three bits of mantissa."""
    return logits_TE.to(torch.float8_e4m3fn).float()


def to_halves(logits_TE):
    """To multiples of 0.5, of logits near 0.8: routes that cost more than all other layers' do."""
    return (2 * logits_TE).round() / 2


def truncate(log_probs_SV: torch.Tensor, top_p: float) -> torch.Tensor:
    """The distribution after top-p, renormalised, as an engine reports it."""
    if top_p == 1.0:
        return log_probs_SV
    sorted_SV, order_SV = log_probs_SV.sort(descending=True)
    before_SV = sorted_SV.exp().cumsum(-1) - sorted_SV.exp()
    kept_SV = torch.zeros_like(before_SV, dtype=torch.bool).scatter(1, order_SV, before_SV < top_p)
    return log_probs_SV.masked_fill(~kept_SV, -torch.inf).log_softmax(-1)


def edited(table: RouteTable, edit) -> RouteTable:
    """A copy of the table whose faulty layer's ids [S, T, K] went through `edit`."""
    shape = (NUM_SEQUENCES, NUM_TOKENS - 1, table.shape.top_k)
    sequences = []
    ids_LTK, gates_LTK = table.expert_ids_LTK.copy(), table.gate_probs_LNK.copy()
    for values_LTK in (ids_LTK, gates_LTK):
        is_ids = values_LTK is ids_LTK
        values_STK = values_LTK[FAULTY_LAYER].reshape(shape)
        values_LTK[FAULTY_LAYER] = edit(values_STK, is_ids).reshape(values_LTK.shape[1:])
    for number in range(NUM_SEQUENCES):
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

        clean_engine = Engine(fresh(checkpoint)[0])
        clean = clean_engine.sample()
        sharp_engine = Engine(fresh(checkpoint)[0])
        sharp_engine.recorders[FAULTY_LAYER].power = 3.0

        def with_router(rounded):
            engine = Engine(fresh(checkpoint)[0])
            engine.rounded_router(FAULTY_LAYER, rounded)
            return engine.sample()

        def edit(how):
            return dataclasses.replace(clean, table=edited(clean.table, how))

        rollouts = {
            "clean": clean,
            "another seed": clean_engine.sample(seed=1),
            "gates of a sample": dataclasses.replace(clean, table=with_few_gates(clean.table)),
            "coarse router": with_router(to_three_bits),
            "broken router": with_router(to_halves),
            "shifted": edit(shift),
            "renumbered": edit(renumber),
            "truncated": clean_engine.sample(top_p=TOP_P),
            "silently truncated": clean_engine.sample(top_p=TOP_P, is_silent=True),
        }
        trainer = Trainer(fresh(checkpoint))
        found = {name: trainer.look_at(rollout, folder, name) for name, rollout in rollouts.items()}
        found["other weights"] = Trainer(fresh(checkpoint), weights="frozen").look_at(
            sharp_engine.sample(), folder, "other weights"
        )
        misloaded = fresh(checkpoint)
        permute_experts(misloaded[0])
        found["misloaded"] = Trainer(misloaded).look_at(clean, folder, "misloaded")
        updated = fresh(checkpoint)
        disturb(updated[0])
        found["stale"] = Trainer(updated).look_at(
            clean, folder, "stale", rollout_chunks=fresh(checkpoint)
        )
        return found


def permute_experts(chunk) -> None:
    """The faulty layer's experts behind another layer of the router's numbers."""
    experts = chunk.decoder.layers[FAULTY_LAYER].mlp.experts.local_experts
    before = [
        {n: p.clone() for n, p in expert.state_dict().items() if p is not None}
        for expert in experts
    ]
    for place, expert in enumerate(experts):
        expert.load_state_dict(before[(place + 1) % len(before)], strict=False)


def disturb(chunk) -> None:
    """An update: every weight moves by 3 % of its matrix's size."""
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in chunk.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.03 * parameter.std() * noise)


class Trainer:
    """The attached model, and the tools looking at one rollout through it."""

    def __init__(self, chunks, weights="live"):
        from routing_replay.megatron import attach

        self.chunks, self.has_weights = chunks, weights != "live"
        config = ReplayConfig(mode="R3", weights=weights, agreement_tokens=0)
        self.replay = attach(chunks, config)

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
        counts_T = batch.mask_ST.flatten()
        with torch.no_grad(), self.replay.replaying(rollout.table, record_live=True) as recorded:
            logp_ST = self._logp(scorer)
        metrics |= self.replay.metrics()
        live_ST = self._logp(scorer)
        logp_mu_T = batch.logp_mu_ST.flatten()
        metrics |= policy_metrics(logp_ST.flatten(), logp_mu_T, counts_T)
        metrics |= policy_metrics(live_ST.flatten(), logp_mu_T, counts_T, suffix="_live")
        compared = compare_tables(rollout.table, recorded.table())
        return {
            "metrics": to_floats(metrics),
            "findings": findings(to_floats(metrics), Path(folder) / f"run {name}"),
            "explanations": {r.layer: r.explanation for r in compared.layers if r.explanation},
            "attribution": self._attribute(scorer, rollout, old),
            "bisection": self._bisect(scorer, rollout, Path(folder) / f"batch {name}", old),
        }

    def _bisect(self, scorer, rollout, folder, old):
        """The arms that tools/score_arms.py scores, and what is made of them."""
        folder.mkdir()
        columns = dataclasses.asdict(rollout.batch())
        columns.pop("fingerprint")
        save_file({n: c.contiguous().clone() for n, c in columns.items()}, folder / BATCH_FILE)
        arms, layers = ScoredArms(folder), rollout.table.shape.layers

        def score(name, scorer, replayed, has_gates=False):
            variant = Variant(name=name, replayed=tuple(replayed), has_gates=has_gates)
            logp_ST, entropy_ST = scorer.replayed(variant)
            arms.add(name, Scores(logp_ST=logp_ST, entropy_ST=entropy_ST))

        score("live", scorer, ())
        score("routes", scorer, layers)
        if self.has_weights:
            score("weights", scorer, layers, has_gates=True)
        if old is not None:
            score("checkpoint", old, layers)
        while (part := halve(layers, lambda part: layers_cost(arms, part))[1]) is not None:
            score(arm_of_layers(part), scorer, [i for i in layers if i not in part])
        return bisect(arms, layers)

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
