"""Score a rollout batch under one setting after another, for `routing-replay bisect` and `noise`.

    torchrun --nproc-per-node 2 -m tools.score_arms RUN/last_batch --checkpoint DIR \
        [--rollout-checkpoint DIR] [--again 4] [--layers] \
        [--precisions float32] [--dispatchers allgather] [--specs te] [--attentions math]
    torchrun --nproc-per-node 2 -m tools.score_arms RUN/last_batch --checkpoint DIR \
        --expert-parallel 2 --layout-arm ep2

The folder holds batch.safetensors and routes.safetensors. What was scored is not scored again, so
a run that was stopped continues. The second form adds one arm under another parallel layout.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import os
import sys
from collections.abc import Iterable
from dataclasses import asdict, replace
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel

from recipes.model import parallel
from recipes.model.weights import load_hf
from recipes.study.results import code_version
from routing_replay.analysis.arms import AGAIN, LADDER, LAYOUT, ScoredArms, Scores
from routing_replay.analysis.attribution import Variant
from routing_replay.analysis.bisection import (
    arm_of_layers,
    halve,
    layers_cost,
    require_same_model,
)
from routing_replay.config import ReplayConfig
from routing_replay.errors import RoutingReplayError
from routing_replay.megatron import attach
from routing_replay.megatron.selection import probabilities
from routing_replay.megatron.watching import RouterCall
from routing_replay.routes.parts import open_table

# isort: split
import megatron.core

from .attribute_kl import Scorer, identity_of, layout_of, load_model, scoring_parser

# What decides the scores. With the versions of the libraries below them it tells arms apart that
# differ by more than their setting.
SOURCES = (
    *("routing_replay", "recipes/model", "recipes/minirl/policy"),
    *("tools/attribute_kl.py", "tools/score_arms.py"),
)
ATTENTIONS = {
    "math": SDPBackend.MATH,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


class LiveMass:
    """Watches the live router's probability of the replayed experts, by layer and row.

    Args:
        layers: All routed layers.
        num_rows: Of the table.
        device: Where the routers run.
    """

    def __init__(self, layers: tuple[int, ...], num_rows: int, device: torch.device):
        self._layers = layers
        shape = (len(layers), num_rows)
        self.mass_LR = torch.full(shape, -torch.inf, dtype=torch.float64, device=device)

    @torch.no_grad()
    def see(self, call: RouterCall) -> None:
        rows_T = torch.from_numpy(call.forward_pass.rows_T)
        tokens_M = (rows_T >= 0).nonzero().flatten().to(call.ids_TK.device)
        rows_M = rows_T[rows_T >= 0].to(call.ids_TK.device)
        probs_ME = probabilities(call.seam, call.live.scores_TE.detach()[tokens_M])
        mass_M = probs_ME.gather(1, call.ids_TK[tokens_M]).sum(1)
        self.mass_LR[self._layers.index(call.seam.layer), rows_M] = mass_M.double()

    def reduced(self) -> torch.Tensor:
        """Return the mass of all ranks' rows and layers on the host; nan where nobody saw it."""
        dist.all_reduce(self.mass_LR, op=dist.ReduceOp.MAX)
        return self.mass_LR.masked_fill(self.mass_LR == -torch.inf, torch.nan).cpu()


class Arms:
    """Scores the arms of one batch that are still missing; collective.

    Args:
        parsed: The command line.
    """

    def __init__(self, parsed: argparse.Namespace):
        self.parsed, self.layout = parsed, layout_of(parsed)
        self.table = open_table(parsed.batch / "routes.safetensors")
        fingerprint = identity_of(parsed) | {
            "trainer dtype": parsed.dtype,
            "temperature": str(parsed.temperature),
            "version of the code": versions(),
        }
        if not parsed.layout_arm:
            sizes = asdict(self.layout).items()
            fingerprint[LAYOUT] = ", ".join(f"{name} {size}" for name, size in sizes if size)
        self.arms = ScoredArms(parsed.batch, fingerprint)
        self.has_gates = self.table.combine_weights_LTK is not None
        self.layers = self.table.shape.layers
        dist.barrier()  # all have read before one writes

    @property
    def is_writer(self) -> bool:
        return dist.get_rank() == 0

    def scorer(self, **changes: Any) -> Scorer:
        """Return a scorer of a model that is built anew, under changed settings."""
        chunks = load_model(self.parsed, self.layout, **changes)
        # The mode follows from the routes: the rollout engine's, or the trainer's own.
        config = ReplayConfig(
            mode="R3" if self.table.source == "rollout" else "R2",
            weights="frozen" if self.has_gates else "live",
            agreement_every=0,
        )
        replay = attach(chunks, config)
        size, temperature = self.parsed.microbatch_size, self.parsed.temperature
        return Scorer(chunks, replay, self.arms.batch, self.table, size, temperature)

    def variant(self, has_gates: bool, replayed: Iterable[int] | None = None) -> Variant:
        layers = self.layers if replayed is None else tuple(replayed)
        return Variant(name="", replayed=layers, has_gates=has_gates)

    def score(
        self,
        name: str,
        scorer: Scorer,
        variant: Variant,
        live_routes: str | None = None,
        order_S: torch.Tensor | None = None,
    ) -> None:
        """Score one arm, unless it was; `order_S` puts the sequences into other microbatches."""
        if name in self.arms:
            return
        watcher = LiveMass(self.layers, self.table.num_rows, scorer.sharding.device)
        used = scorer if order_S is None else in_order(scorer, order_S)
        with scorer.replay.watching(watcher):
            logp_N, entropy_N = used.replayed(variant, live_routes)
        scores = Scores(logp_N=logp_N, entropy_N=entropy_N, live_mass_LR=watcher.reduced())
        self.arms.add(name, scores, self.is_writer)
        if self.is_writer:
            print(f"scored {name!r}", file=sys.stderr, flush=True)

    def run(self) -> None:
        """Score whatever the command line asks for."""
        parsed, base = self.parsed, self.variant(self.has_gates)
        if parsed.layout_arm:
            scorer = self.scorer()
            self.load_sampled(scorer)
            self.score(f"{LAYOUT} {parsed.layout_arm}", scorer, base)
            return
        scorer = self.scorer()
        live_routes = str(parsed.batch / "live_routes.safetensors")
        self.score(LADDER[0], scorer, self.variant(has_gates=False, replayed=()))
        self.score(LADDER[1], scorer, self.variant(has_gates=False), live_routes)
        if self.has_gates:
            self.score(LADDER[2], scorer, base)
        if parsed.layers:
            self.halve_layers(scorer)
        self.load_sampled(scorer)
        if parsed.rollout_checkpoint:
            self.score(LADDER[3], scorer, base)
        require_same_model(self.arms)  # before the many passes
        for number in range(1, parsed.again + 1):
            self.score(f"{AGAIN} {number}", scorer, base, order_S=self.shuffled(number))
        self.change_settings(base)

    def change_settings(self, base: Variant) -> None:
        """Score the arms that change one setting of the trainer."""
        parsed = self.parsed
        changes = [(f"precision {d}", {"dtype": getattr(torch, d)}) for d in parsed.precisions]
        changes += [(f"order {name}", {"dispatcher": name}) for name in parsed.dispatchers]
        changes += [(f"kernels {name}", {"spec": name}) for name in parsed.specs]
        changes += [(f"kernels {name}", {"spec": "local"}) for name in parsed.attentions]
        for name, settings in changes:
            if name in self.arms:
                continue
            scorer = self.scorer(**settings)
            self.load_sampled(scorer)
            with attention_of(name):
                self.score(name, scorer, base)

    def load_sampled(self, scorer: Scorer) -> None:
        """Load the weights that sampled, where they are not the trained ones."""
        if self.parsed.rollout_checkpoint:
            load_hf(scorer.chunks, self.parsed.rollout_checkpoint)

    def halve_layers(self, scorer: Scorer) -> None:
        """Score halves of the layers live, until one layer or no half explains the cost."""
        while True:
            _, part = halve(self.layers, lambda part: layers_cost(self.arms, part))
            if part is None:
                return
            replayed = [layer for layer in self.layers if layer not in part]
            self.score(arm_of_layers(part), scorer, self.variant(False, replayed))

    def shuffled(self, seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randperm(len(self.arms.batch.lengths_S), generator=generator)


def attention_of(arm: str) -> contextlib.AbstractContextManager[Any]:
    """Return the scope of an arm's attention: torch's choice, unless the arm names another."""
    backend = ATTENTIONS.get(arm.split()[1])
    return sdpa_kernel(backend) if backend else contextlib.nullcontext()


def versions() -> str:
    """Return what computes the scores: our sources, torch and megatron-core."""
    libraries = f"torch {torch.__version__}, Megatron {megatron.core.__version__}"
    return f"{code_version(SOURCES)}, {libraries}"


def in_order(scorer: Scorer, order_S: torch.Tensor) -> Scorer:
    """Return a scorer whose microbatches are those of the sequences in another order."""
    other, numbers = copy.copy(scorer), order_S.tolist()
    (packs,) = scorer.sharding.plan(scorer.batch.lengths_S[order_S])
    planned = tuple(tuple(numbers[number] for number in pack) for pack in packs)
    other.sharding = replace(scorer.sharding, planned=(planned,))
    return other


def make_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = scoring_parser(__doc__)
    parser.add_argument("--again", type=int, default=0, metavar="K", help="recomputations")
    parser.add_argument("--layers", action="store_true", help="search the layers by halves")
    parser.add_argument("--precisions", nargs="*", choices=("float32", "bfloat16"), default=[])
    parser.add_argument("--dispatchers", nargs="*", choices=("allgather", "alltoall"), default=[])
    parser.add_argument("--specs", nargs="*", choices=("te", "local"), default=[])
    parser.add_argument("--attentions", nargs="*", choices=tuple(ATTENTIONS), default=[])
    parser.add_argument("--layout-arm", default="", metavar="NAME", help="add this arm only")
    return parser


def main() -> int:
    """Run one rank."""
    parsed = make_parser().parse_args()
    try:
        parallel.initialize(layout_of(parsed), seed=1)
        Arms(parsed).run()
    except RoutingReplayError as error:
        print(f"score_arms: {error}", file=sys.stderr, flush=True)
        os._exit(1)  # other ranks may be inside a collective
    parallel.destroy()
    return 0


if __name__ == "__main__":
    sys.exit(main())
