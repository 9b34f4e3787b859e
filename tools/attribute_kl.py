"""What each layer's routing costs the policy, on a saved rollout batch and a checkpoint.

    torchrun --nproc-per-node 2 tools/attribute_kl.py RUN/last_batch --checkpoint DIR \
        [--rollout-checkpoint DIR] [--families without only first] [--expert-parallel 2] \
        [--output RUN/attribution.json]

The folder holds batch.safetensors and routes.safetensors. Any layout gives the same numbers. A run
that was stopped goes on where it was. `routing-replay report` shows the output of a run's folder.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from routing_replay.analysis import attribution
from routing_replay.analysis.attribution import Progress, Variant
from routing_replay.config import ReplayConfig
from routing_replay.errors import RoutingReplayError
from routing_replay.objectives.logprobs import TokenScores, token_logprobs
from routing_replay.routes.batch import RolloutBatch
from routing_replay.routes.table import RouteTable
from routing_replay.routes.token_rows import context_positions

from recipes.model import parallel  # isort: skip
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module

from recipes.model.model import build_model, transformer_config
from recipes.model.weights import load_hf
from routing_replay.megatron import Replay, attach
from routing_replay.megatron.routers import find_routers

BAR_WIDTH = 24


class LayerSwitch:
    """Stands before a replaying router's seam and lets the layers that are not chosen route live.

    The seam still runs, so the receipt of the pass stays complete.
    """

    def __init__(self, router, chosen: set[int]):
        self._seam = router.router_replay
        self._chosen = chosen
        self.layer_number = self._seam.layer_number

    def get_replay_topk(
        self, scores, topk, num_groups=None, group_topk=None, default_compute_topk=None
    ):
        arguments = (scores, topk, num_groups, group_topk)
        replayed = self._seam.get_replay_topk(*arguments, default_compute_topk)
        if self._seam.layer in self._chosen:
            return replayed
        return default_compute_topk(*arguments)


@contextlib.contextmanager
def layer_switches(chunks) -> Iterator[set[int]]:
    """The set of the layers that replay; fill it between passes."""
    chosen: set[int] = set()
    routers = [found.router for found in find_routers(chunks)]
    seams = [router.router_replay for router in routers]
    for router in routers:
        router.router_replay = LayerSwitch(router, chosen)
    try:
        yield chosen
    finally:
        for router, seam in zip(routers, seams, strict=True):
            router.router_replay = seam


class Scorer:
    """Log-probs of a batch under the model of this rank, for one variant after another.

    Args:
        chunks: This rank's model chunks, attached.
        replay: Their handle.
        batch: The whole batch, alike on all ranks.
        table: Its routes.
        microbatch_size: Sequences per forward pass of a rank.
        temperature: Of the rollout's sampling.
    """

    def __init__(
        self,
        chunks: list,
        replay: Replay,
        batch: RolloutBatch,
        table: RouteTable,
        microbatch_size: int,
        temperature: float,
    ):
        self.chunks, self.replay, self.batch, self.table = chunks, replay, batch, table
        self.temperature = temperature
        self.device = next(chunks[0].parameters()).device
        width = batch.input_ids_ST.shape[1]
        self.token_rows_ST = table.token_rows(batch.lengths_S, width=width)
        rank, size = (
            parallel_state.get_data_parallel_rank(),
            parallel_state.get_data_parallel_world_size(),
        )
        # Pipeline stages exchange tensors of one shape: every microbatch is whole, the last ones
        # repeat sequence 0 with an empty mask, and every rank has as many.
        num_sequences = len(batch.lengths_S)
        per_rank = -(-num_sequences // (size * microbatch_size)) * microbatch_size
        mine = list(range(rank * per_rank, min((rank + 1) * per_rank, num_sequences)))
        mine += [-1] * (per_rank - len(mine))
        self.microbatches = [
            mine[i : i + microbatch_size] for i in range(0, per_rank, microbatch_size)
        ]
        rank = parallel_state.get_context_parallel_rank()
        size = parallel_state.get_context_parallel_world_size()
        self.positions_T = torch.from_numpy(context_positions([0, width], rank, size))

    def score(
        self, variant: Variant, chosen: set[int], live_routes: str | None = None
    ) -> torch.Tensor:
        """`sequence_sums` of the whole batch; collective, the same on every rank.

        Args:
            variant: Which layers replay.
            chosen: The set of `layer_switches`.
            live_routes: File for the routes that this pass would have taken live.
        """
        chosen.clear()
        chosen.update(variant.replayed)
        scope = self.replay.replaying(self.table, record_live=live_routes is not None)
        with torch.no_grad(), scope as recorded:
            parts = self.run()
        if recorded is not None:
            recorded.table(live_routes)
        num_columns = len(attribution.COLUMNS)
        sums_S4 = torch.zeros(len(self.batch.lengths_S), num_columns, dtype=torch.float64)
        # Tensor-parallel ranks hold equal log-probs: one of them speaks.
        if parts and parallel_state.get_tensor_model_parallel_rank() == 0:
            for sequences, scores in parts:
                for place, sequence in enumerate(sequences):
                    if sequence >= 0:
                        sums_S4[sequence] += self._sums(sequence, scores, place)
        if dist.get_backend() == "nccl":
            reduced = sums_S4.to(self.device)
            dist.all_reduce(reduced)
            return reduced.cpu()
        dist.all_reduce(sums_S4)
        return sums_S4

    def _sums(self, sequence: int, scores: TokenScores, place: int) -> torch.Tensor:
        columns = (self.batch.logp_mu_ST, self.batch.mask_ST)
        logp_mu_T, mask_T = (column[sequence, self.positions_T] for column in columns)
        logp_T, entropy_T = (x[place].cpu() for x in (scores.logp_T, scores.entropy_T))
        rows = (logp_T, entropy_T, logp_mu_T, mask_T)
        return attribution.sequence_sums(*(row_T[None] for row_T in rows))[0]

    def run(self) -> list[tuple[list[int], TokenScores]]:
        """(sequences, scores [B, T]) of each microbatch, on the last stage; else nothing."""

        def forward_step(iterator, model):
            sequences = next(iterator)
            rows = torch.tensor([max(s, 0) for s in sequences])
            cut = [
                column[rows][:, self.positions_T]
                for column in (self.batch.input_ids_ST, self.batch.labels_ST, self.token_rows_ST)
            ]
            input_ids_BT, labels_BT, token_rows_BT = cut
            token_rows_BT[torch.tensor(sequences) < 0] = -1  # filling: nobody's routes
            positions_BT = self.positions_T.expand(len(rows), -1).to(self.device)
            with self.replay.microbatch(token_rows_BT.contiguous()):
                output = model(input_ids_BT.to(self.device), positions_BT, None)
            return output, lambda logits, **_: (sequences, self._scores(logits, labels_BT))

        several = len(self.chunks) > 1
        iterators = [iter(self.microbatches) for _ in self.chunks]
        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iterators if several else iterators[0],
            model=self.chunks if several else self.chunks[0],
            num_microbatches=len(self.microbatches),
            seq_length=self.batch.input_ids_ST.shape[1],
            micro_batch_size=len(self.microbatches[0]),
            forward_only=True,
            collect_non_loss_data=True,
        )

    def _scores(self, logits_BTV: torch.Tensor, labels_BT: torch.Tensor) -> TokenScores:
        is_split = parallel_state.get_tensor_model_parallel_world_size() > 1
        found = token_logprobs(
            logits_BTV.flatten(0, 1),
            labels_BT.flatten().to(logits_BTV.device),
            temperature=self.temperature,
            group=parallel_state.get_tensor_model_parallel_group() if is_split else None,
        )
        shape = labels_BT.shape
        return TokenScores(logp_T=found.logp_T.view(shape), entropy_T=found.entropy_T.view(shape))


def padded(batch: RolloutBatch, multiple: int) -> RolloutBatch:
    """The batch with its length padded to what the parallel layout divides."""
    length = batch.input_ids_ST.shape[1]
    extra = -length % multiple
    columns = {
        name: torch.nn.functional.pad(getattr(batch, name), (0, extra))
        for name in ("input_ids_ST", "labels_ST", "mask_ST", "logp_mu_ST")
    }
    return RolloutBatch(**columns, lengths_S=batch.lengths_S, fingerprint=batch.fingerprint)


class Bar:
    """One line on standard error: passes done, the last KL, the time that is left."""

    def __init__(self, num_passes: int, num_done: int):
        self.num_passes, self.num_done, self.num_here = num_passes, num_done, 0
        self.started = time.monotonic()

    def __call__(self, variant: Variant, kl: float) -> None:
        self.num_done += 1
        self.num_here += 1
        left_s = (time.monotonic() - self.started) / self.num_here
        left_s *= self.num_passes - self.num_done
        filled = BAR_WIDTH * self.num_done // self.num_passes
        bar = "#" * filled + "." * (BAR_WIDTH - filled)
        ended = "\n" if self.num_done == self.num_passes or not sys.stderr.isatty() else "\r"
        text = f"[{bar}] {self.num_done}/{self.num_passes} {variant.name:12s} KL {kl:.3e}"
        print(f"{text}, {left_s:.0f} s left ", end=ended, file=sys.stderr, flush=True)


def run(parsed: argparse.Namespace) -> attribution.Attribution:
    """The whole attribution on this rank; collective."""
    sizes = ("tensor", "pipeline", "context", "expert")
    layout = parallel.ParallelLayout(
        **{name: getattr(parsed, f"{name}_parallel") for name in sizes}, expert_tensor=1
    )
    parallel.initialize(layout, seed=1)
    dtype = getattr(torch, parsed.dtype)
    config = transformer_config(parsed.checkpoint, layout, dtype=dtype)
    chunks = build_model(config, layout)
    load_hf(chunks, parsed.checkpoint)
    wrapped = [Float16Module(config, c) for c in chunks] if config.bf16 else chunks
    context = layout.context
    multiple = layout.tensor * (2 * context if context > 1 else 1)
    batch = padded(RolloutBatch.open(parsed.batch / "batch.safetensors"), multiple)
    table = RouteTable.open(parsed.batch / "routes.safetensors")
    mode = {"rollout": "R3", "training": "R2"}[table.source]
    replay = attach(wrapped, ReplayConfig(mode=mode, agreement_every=0))
    layers = replay.shape.layers
    variants = attribution.plan(layers, parsed.families, bool(parsed.rollout_checkpoint))
    progress = open_progress(parsed, batch)
    is_first = dist.get_rank() == 0
    bar = Bar(len(variants), len(progress.sums))
    scorer = Scorer(wrapped, replay, batch, table, parsed.microbatch_size, parsed.temperature)
    with layer_switches(wrapped) as chosen:

        def score(variant: Variant) -> torch.Tensor:
            if variant.is_rollout_weights:
                load_hf(chunks, parsed.rollout_checkpoint)
            is_whole = variant.name == "all"
            return scorer.score(variant, chosen, parsed.live_routes if is_whole else None)

        attribution.attribute(
            variants, score, progress, bar if is_first else lambda variant, kl: None
        )
    wanted = {variant.name for variant in variants}
    sums = {name: rows for name, rows in progress.sums.items() if name in wanted}
    return attribution.summarize(layers, sums, parsed.estimator)


def open_progress(parsed: argparse.Namespace, batch: RolloutBatch) -> Progress:
    """Every rank reads it; the first one writes it on."""
    output = Path(parsed.output)
    path = output.with_name(f"{output.stem}.progress.json")
    fingerprint = {
        "batch": batch.fingerprint,
        "checkpoint": str(parsed.checkpoint.resolve()),
        "rollout checkpoint": str(
            parsed.rollout_checkpoint and parsed.rollout_checkpoint.resolve()
        ),
        "dtype": parsed.dtype,
        "temperature": str(parsed.temperature),
    }
    progress = Progress(path, fingerprint)
    dist.barrier()  # all have read before one writes
    if dist.get_rank() != 0:
        progress.stop_writing()
    return progress


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("batch", type=Path, help="folder with batch and routes")
    parser.add_argument("--checkpoint", type=Path, required=True, help="weights that are trained")
    parser.add_argument("--rollout-checkpoint", type=Path, help="weights that sampled (staleness)")
    parser.add_argument("--families", nargs="+", choices=attribution.FAMILIES, default=["without"])
    parser.add_argument("--estimator", choices=("k1", "k3"), default="k3")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--temperature", type=float, default=1.0, help="of the rollout's sampling")
    parser.add_argument("--microbatch-size", type=int, default=16)
    for name in ("tensor", "pipeline", "context", "expert"):
        parser.add_argument(f"--{name}-parallel", type=int, default=1)
    parser.add_argument(
        "--live-routes",
        metavar="FILE",
        help="also write the trainer's own routes of the replaying pass, for `routing-replay diff`",
    )
    parser.add_argument("--output", default="attribution.json")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    return parser


def main() -> int:
    parsed = make_parser().parse_args()
    try:
        found = run(parsed)
    except RoutingReplayError as error:
        print(f"attribute_kl: {error}", file=sys.stderr, flush=True)
        os._exit(1)  # other ranks may be inside a collective
    if dist.get_rank() == 0:
        Path(parsed.output).write_text(json.dumps(found.as_dict()), encoding="utf-8")
        print(json.dumps(found.as_dict()) if parsed.json else found.text())
        print(f"\nwritten to {parsed.output}", file=sys.stderr)
    parallel.destroy()
    return 0


if __name__ == "__main__":
    sys.exit(main())
