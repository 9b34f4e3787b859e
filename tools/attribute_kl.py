"""Attribute the KL of a rollout batch to each layer's routing, with a checkpoint's weights.

    torchrun --nproc-per-node 2 tools/attribute_kl.py RUN/last_batch --checkpoint DIR \
        [--rollout-checkpoint DIR] [--families without only first] [--expert-parallel 2] \
        [--output RUN/attribution.json]

The folder holds batch.safetensors and routes.safetensors. Every layout gives the same numbers. A
run that was stopped continues. `routing-replay report` shows the output of a run's folder.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from recipes.minirl.policy.microbatches import Grid, Sharding, token_rows
from recipes.model import parallel
from recipes.model.model import build_model, transformer_config
from recipes.model.weights import load_hf
from routing_replay.analysis import attribution
from routing_replay.analysis.attribution import Progress, Variant
from routing_replay.config import ReplayConfig
from routing_replay.errors import DataError, RoutingReplayError
from routing_replay.megatron import Replay, attach
from routing_replay.objectives.logprobs import token_logprobs
from routing_replay.routes.batch import RolloutBatch
from routing_replay.routes.parts import open_table
from routing_replay.routes.table import RouteTable

# isort: split
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module

BAR_WIDTH = 24


class Scorer:
    """Scores a batch under this rank's model, for one variant after another.

    Args:
        chunks: This rank's model chunks, attached.
        replay: Their handle.
        batch: The whole batch, equal on all ranks.
        table: Its routes.
        microbatch_size: Longest sequences per forward pass of a rank; shorter ones are packed.
        temperature: The rollout's sampling temperature.
    """

    def __init__(
        self,
        chunks: list[torch.nn.Module],
        replay: Replay,
        batch: RolloutBatch,
        table: RouteTable,
        microbatch_size: int,
        temperature: float,
    ):
        config: Any = chunks[0].config
        require_vocabulary(batch, config.vocab_size)
        self.chunks, self.replay, self.table = chunks, replay, table
        self.temperature = temperature
        context = parallel_state.get_context_parallel_world_size()
        tensor = parallel_state.get_tensor_model_parallel_world_size()
        multiple = tensor * (2 * context if context > 1 else 1)
        self.batch = batch
        longest = -(-(int(batch.lengths_S.max()) - 1) // multiple) * multiple
        self.sharding = Sharding(
            data_rank=parallel_state.get_data_parallel_rank(),
            data_size=parallel_state.get_data_parallel_world_size(),
            context_rank=parallel_state.get_context_parallel_rank(),
            context_size=context,
            minibatch_size=len(batch.lengths_S),
            microbatch_tokens=microbatch_size * longest,
            multiple=multiple,
            device=next(chunks[0].parameters()).device,
        )

    def score(self, variant: Variant, live_routes: str | None = None) -> torch.Tensor:
        """Return `sequence_sums` of the whole batch; collective, the same on every rank.

        Args:
            variant: Which layers replay.
            live_routes: File for the routes that this pass would have taken live.
        """
        logp_N, entropy_N = self.replayed(variant, live_routes)
        return attribution.sequence_sums(logp_N, entropy_N, self.batch)

    def replayed(
        self, variant: Variant, live_routes: str | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return log-probs and entropies [N] of the batch under a variant, as `score`."""
        scope = self.replay.replaying(
            self.table,
            record_live=live_routes is not None,
            layers=variant.replayed,
            has_weights=variant.has_gates,
        )
        with scope as recorded:
            logp_N, entropy_N = self.run()
        if recorded is not None:
            recorded.table(live_routes)
        return logp_N, entropy_N

    @torch.no_grad()
    def run(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return log-probs and entropies [N] of the batch; collective."""
        scores: dict[tuple[int, ...], tuple[torch.Tensor, torch.Tensor]] = {}

        def forward_step(
            iterator: Iterator[tuple[int, ...]], model: torch.nn.Module
        ) -> tuple[torch.Tensor, Any]:
            sequences = next(iterator)
            grid = self.sharding.grid(self.batch.lengths_S, sequences)
            rows_BT = token_rows(self.batch, sequences, grid, self.table)
            with self.replay.microbatch(rows_BT):
                output = self._forward(model, grid)

            def on_output(logits_BTV: torch.Tensor, **_: bool) -> None:
                scores[sequences] = self._token_scores(logits_BTV, grid)

            return output, on_output

        plan = self.sharding.plan(self.batch.lengths_S)[0]
        several = len(self.chunks) > 1
        iterators = [iter(plan) for _ in self.chunks]
        longest = max(sum(self.sharding.grid(self.batch.lengths_S, s).lengths) for s in plan)
        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iterators if several else iterators[0],
            model=self.chunks if several else self.chunks[0],
            num_microbatches=len(plan),
            seq_length=longest,
            micro_batch_size=1,
            forward_only=True,
            collect_non_loss_data=True,
        )
        logp_N, entropy_N = (self._gather({s: v[i] for s, v in scores.items()}) for i in (0, 1))
        return logp_N, entropy_N

    def _forward(self, model: torch.nn.Module, grid: Grid) -> torch.Tensor:
        bounds, longest = self.sharding.to_device(grid.bounds()), max(grid.lengths)
        output: torch.Tensor = model(
            self.sharding.to_device(grid.take(self.batch.input_ids_N)),
            self.sharding.to_device(grid.position_BT),
            None,
            packed_seq_params=PackedSeqParams(
                qkv_format="thd",
                cu_seqlens_q=bounds,
                cu_seqlens_kv=bounds,
                max_seqlen_q=longest,
                max_seqlen_kv=longest,
            ),
        )
        return output

    def _token_scores(
        self, logits_BTV: torch.Tensor, grid: Grid
    ) -> tuple[torch.Tensor, torch.Tensor]:
        is_split = parallel_state.get_tensor_model_parallel_world_size() > 1
        scores = token_logprobs(
            logits_BTV.flatten(0, 1),
            grid.take(self.batch.labels_N).flatten().to(logits_BTV.device),
            temperature=self.temperature,
            group=parallel_state.get_tensor_model_parallel_group() if is_split else None,
        )
        return scores.logp_T, scores.entropy_T

    def _gather(self, values: dict[tuple[int, ...], torch.Tensor]) -> torch.Tensor:
        """Sum every rank's share; tensor-parallel ranks hold equal values, so one contributes."""
        if parallel_state.get_tensor_model_parallel_rank() > 0:
            values = {}
        values_N = self.sharding.scatter(values, self.batch)
        dist.all_reduce(values_N)
        return values_N.cpu()


def require_vocabulary(batch: RolloutBatch, vocab_size: int) -> None:
    """Raise if the checkpoint does not know the batch's tokens.

    Raises:
        DataError: Tokens outside the vocabulary.
    """
    largest = int(max(batch.input_ids_N.max(), batch.labels_N.max()))
    if largest >= vocab_size:
        raise DataError(
            "the batch holds tokens that the checkpoint does not know",
            expected=f"ids below its vocabulary size, {vocab_size}",
            got=largest,
            fix="Name the checkpoint of the model that sampled the batch",
        )


class Bar:
    """A line on standard error: finished passes, the last KL, the remaining time."""

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
    """Run the whole attribution on this rank; collective."""
    layout = layout_of(parsed)
    parallel.initialize(layout, seed=1)
    chunks = load_model(parsed, layout)
    batch = RolloutBatch.open(parsed.batch / "batch.safetensors")
    table = open_table(parsed.batch / "routes.safetensors")
    # The mode follows from the routes: the rollout engine's, or the trainer's own.
    mode = "R3" if table.source == "rollout" else "R2"
    has_gates = table.combine_weights_LTK is not None
    weights = "frozen" if has_gates else "live"
    replay = attach(chunks, ReplayConfig(mode=mode, weights=weights, agreement_every=0))
    layers = replay.shape.layers
    has_rollout_weights = bool(parsed.rollout_checkpoint)
    variants = attribution.plan(layers, parsed.families, has_rollout_weights, has_gates)
    progress = open_progress(parsed, batch, has_gates)
    bar = Bar(len(variants), len(progress.sums))
    scorer = Scorer(chunks, replay, batch, table, parsed.microbatch_size, parsed.temperature)

    def score(variant: Variant) -> torch.Tensor:
        if variant.is_rollout_weights:
            load_hf(chunks, parsed.rollout_checkpoint)
        return scorer.score(variant, parsed.live_routes if variant.name == "all" else None)

    def stay_silent(variant: Variant, kl: float) -> None:
        """Other ranks than 0 draw no bar."""

    attribution.attribute(variants, score, progress, bar if dist.get_rank() == 0 else stay_silent)
    wanted = {variant.name for variant in variants}
    sums = {name: rows for name, rows in progress.sums.items() if name in wanted}
    return attribution.summarize(layers, sums, parsed.estimator)


def layout_of(parsed: argparse.Namespace) -> parallel.ParallelLayout:
    """Return the parallel sizes of the flags."""
    sizes = ("tensor", "pipeline", "context", "expert")
    return parallel.ParallelLayout(
        **{name: getattr(parsed, f"{name}_parallel") for name in sizes}, expert_tensor=1
    )


def load_model(
    parsed: argparse.Namespace, layout: parallel.ParallelLayout, **changes: Any
) -> list[torch.nn.Module]:
    """Return this rank's chunks with the checkpoint's weights.

    Args:
        parsed: Checkpoint and dtype.
        layout: Parallel sizes.
        **changes: Arguments of `transformer_config`, in place of those of the flags.
    """
    settings: dict[str, Any] = {"dtype": getattr(torch, parsed.dtype)}
    settings["variable_seq_lengths"] = layout.pipeline > 1  # packs differ in length
    config = transformer_config(parsed.checkpoint, layout, **(settings | changes))
    chunks: list[torch.nn.Module] = build_model(config, layout)
    if config.bf16:
        chunks = [Float16Module(config, chunk) for chunk in chunks]
    load_hf(chunks, parsed.checkpoint)
    return chunks


def open_progress(parsed: argparse.Namespace, batch: RolloutBatch, has_gates: bool) -> Progress:
    """Open the saved progress: every rank reads it, rank 0 continues it."""
    output = Path(parsed.output)
    path = output.with_name(f"{output.stem}.progress.json")
    fingerprint = {
        "batch": batch.fingerprint,
        **identity_of(parsed),
        "dtype": parsed.dtype,
        "temperature": str(parsed.temperature),
        "combine weights": str(has_gates),
    }
    progress = Progress(path, fingerprint)
    dist.barrier()  # all have read before one writes
    if dist.get_rank() != 0:
        progress.stop_writing()
    return progress


def identity_of(parsed: argparse.Namespace) -> dict[str, str]:
    """Return what identifies the checkpoints of the flags, as rank 0 sees their files; collective.

    A path alone does not: training writes other weights to it.
    """
    rollout = parsed.rollout_checkpoint or parsed.checkpoint
    paths = {"checkpoint": parsed.checkpoint, "rollout checkpoint": rollout}
    identities = [{name: f"{path.resolve()} {_state(path)}" for name, path in paths.items()}]
    dist.broadcast_object_list(identities, src=0)
    return identities[0]


def _state(folder: Path) -> str:
    """Names, sizes and times of a folder's files, as a short digest."""
    stats = [(path.name, path.stat()) for path in sorted(folder.glob("*"))]
    text = repr([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def make_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = scoring_parser(__doc__)
    parser.add_argument("--families", nargs="+", choices=attribution.FAMILIES, default=["without"])
    parser.add_argument("--estimator", choices=("k1", "k3"), default="k3")
    parser.add_argument(
        "--live-routes",
        metavar="FILE",
        help="also write the trainer's own routes of the replaying pass, for `routing-replay diff`",
    )
    parser.add_argument("--output", default="attribution.json")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    return parser


def scoring_parser(description: str) -> argparse.ArgumentParser:
    """Return the flags of a tool that scores a batch: inputs, weights, passes, parallel sizes."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("batch", type=Path, help="folder with batch and routes")
    parser.add_argument("--checkpoint", type=Path, required=True, help="weights that are trained")
    parser.add_argument("--rollout-checkpoint", type=Path, help="weights that sampled (staleness)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--temperature", type=float, default=1.0, help="of the rollout's sampling")
    parser.add_argument(
        "--microbatch-size", type=int, default=16, help="longest sequences per forward pass"
    )
    for name in ("tensor", "pipeline", "context", "expert"):
        parser.add_argument(f"--{name}-parallel", type=int, default=1)
    return parser


def main() -> int:
    """Run one rank; rank 0 writes the output and prints it."""
    parsed = make_parser().parse_args()
    try:
        result = run(parsed)
    except RoutingReplayError as error:
        print(f"attribute_kl: {error}", file=sys.stderr, flush=True)
        os._exit(1)  # other ranks may be inside a collective
    if dist.get_rank() == 0:
        Path(parsed.output).write_text(json.dumps(result.as_dict()), encoding="utf-8")
        print(json.dumps(result.as_dict()) if parsed.json else result.text())
        print(f"\nwritten to {parsed.output}", file=sys.stderr)
    parallel.destroy()
    return 0


if __name__ == "__main__":
    sys.exit(main())
