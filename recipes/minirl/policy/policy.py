"""The trained policy on this rank: Megatron model, optimizer, replay, passes over a batch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from recipes.model import memory, parallel
from recipes.model.model import transformer_config
from routing_replay.errors import ConfigError
from routing_replay.megatron import attach
from routing_replay.megatron.patch_dispatch_sizes import why_not
from routing_replay.megatron.placement import place_experts
from routing_replay.megatron.router_shift import RouterShift
from routing_replay.metrics.policy_kl import policy_metrics
from routing_replay.metrics.typed import Metric, all_reduce, masked_mean, merge
from routing_replay.metrics.version_lag import lag_suffix
from routing_replay.objectives import Denominators, Objective
from routing_replay.objectives.logprobs import TokenScores
from routing_replay.routes.step_routes import StepRoutes
from routing_replay.routes.token_rows import RowSource

# isort: split
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func

from ..launch.plan import memory_estimate
from ..rollout.batch import Batch, version_lag
from ..settings.config import RecipeConfig
from . import models
from .inner_layer import inner_logits
from .microbatches import Microbatch, Sharding
from .scoring import Scorer, Scores
from .step_plan import PlannedStep, plan_step


@dataclass(frozen=True, kw_only=True)
class FixedScores:
    """What an update takes as constant.

    Args:
        old: pi_old's scores of the batch.
        reference: Those of the frozen reference, where the loss has a KL to it.
        chosen: [N] by name in LossInputs: what was chosen or measured over the whole step.
        has_mu: The trained policy is the one that sampled. An inner layer's policy did not.
    """

    old: Scores
    reference: Scores | None = None
    chosen: Mapping[str, torch.Tensor] = field(default_factory=dict)
    has_mu: bool = True


class Policy:
    """Model, optimizer and replay of this rank.

    `weight_version` counts the steps that the weights were trained for. The training loop sets it.

    Args:
        config: The recipe's configuration, `auto` resolved.
        checkpoint: Hugging Face folder of the weights.
        reference: That of the frozen reference, if the configuration needs one; None: `checkpoint`.
    """

    weight_version = 0

    def __init__(self, config: RecipeConfig, checkpoint: Path, reference: Path | None = None):
        t = config.training
        self.config = config
        self.layout = models.parallel_layout(t)
        parallel.initialize(self.layout, seed=config.run.seed + 1)
        dtype = getattr(torch, t.trainer_dtype)
        self.model_config = transformer_config(
            checkpoint, self.layout, dtype=dtype, recompute=t.recompute, spec=t.layer_spec
        )
        if self.model_config.padded_vocab_size != self.model_config.vocab_size:
            raise ConfigError(
                "tensor_parallel must divide the vocabulary",
                expected=f"a divisor of {self.model_config.vocab_size}",
                got=t.tensor_parallel,
            )
        available = memory.device_memory()
        if available is not None:
            needed = memory_estimate(config, self.model_config, self.layout)
            memory.require_fit(needed, available)
        self.model_config.finalize_model_grads_func = finalize_model_grads
        # Microbatches are as long as their own longest sequence.
        self.model_config.variable_seq_lengths = self.layout.pipeline > 1
        self.chunks = models.trained(self.model_config, self.layout, checkpoint, t)
        self.optimizer = models.make_optimizer(self.chunks, t, dtype)
        has_router_shift = "router_shift_T" in config.make_objective().needs
        replay_config = config.replay
        if has_router_shift and replay_config.mode == "disabled":
            # RSPO names its tokens by a recording's rows, even where no route is replayed.
            replay_config = replace(replay_config, mode="R2")
        self.replay = attach(self.chunks, replay_config)
        self.router_shift = RouterShift(self.replay) if has_router_shift else None
        self.placed = None
        if t.plan in ("placement", "both"):
            self.placed = place_experts(self.chunks, self.optimizer)
        self.planned: PlannedStep | None = None
        self.has_sizes = not why_not(self.chunks, self.replay.shape.layers)
        self.reference = None
        if config.needs_reference:
            folder = reference or checkpoint
            self.reference = models.frozen(self.model_config, self.layout, folder, t)
        self.scorer = Scorer(
            temperature=config.rollout.temperature,
            tensor_group=parallel_state.get_tensor_model_parallel_group()
            if self.layout.tensor > 1
            else None,
            context_group=parallel_state.get_context_parallel_group()
            if self.layout.context > 1
            else None,
        )
        self.stages = _stages(self.replay.local_layers)
        # Of the ranks that train the same sequences and layers.
        self.is_first_of_sequences = (
            parallel_state.get_tensor_model_parallel_rank() == 0
            and parallel_state.get_context_parallel_rank() == 0
        )
        self.is_last_stage = parallel_state.is_pipeline_last_stage(ignore_virtual=True)
        self.sharding = Sharding(
            data_rank=parallel_state.get_data_parallel_rank(),
            data_size=parallel_state.get_data_parallel_world_size(),
            context_rank=parallel_state.get_context_parallel_rank(),
            context_size=parallel_state.get_context_parallel_world_size(),
            minibatch_size=t.minibatch_size,
            microbatch_size=t.microbatch_size,
            microbatch_tokens=t.microbatch_tokens,
            multiple=self.layout.tensor
            * (2 * self.layout.context if self.layout.context > 1 else 1),
            device=next(self.chunks[0].parameters()).device,
        )

    def score(self, batch: Batch, source: RowSource | None, minibatch: int | None = None) -> Scores:
        """Score this rank's part of the batch by forward passes without gradient.

        Which routes are taken is decided by the scope of `self.replay` that is open around it.

        Args:
            batch: The whole step's batch.
            source: That scope's table or recording; None without one.
            minibatch: Only this one; all if None.
        """
        return self._score(self.chunks, batch, source, minibatch)

    def score_reference(self, batch: Batch) -> Scores:
        """Score with the frozen reference. Nothing is attached to it: it always routes live."""
        assert self.reference is not None
        return self._score(self.reference, batch, None, None)

    def update(
        self,
        batch: Batch,
        source: RowSource | None,
        fixed: FixedScores,
        objective: Objective,
        number: int,
    ) -> dict[str, Metric]:
        """Take one optimizer step on one minibatch.

        Args:
            batch: The whole step's batch.
            source: The table that is replayed around this call; None without one.
            fixed: What is constant: other policies' scores, choices over the step.
            objective: The loss.
            number: Of the minibatch.

        Returns:
            This rank's metrics.
        """
        microbatches = [
            self._with_fixed(self.sharding.microbatch(batch, sequences, source), batch, fixed)
            for sequences in self.sharding.plan(batch.lengths_S)[number]
        ]
        denominators = self._denominators(batch, number)
        # Megatron averages over microbatches and data-parallel ranks; our denominators are global.
        scale = len(microbatches) * self.sharding.data_size

        def on_output(
            m: Microbatch, logits_BTV: torch.Tensor
        ) -> tuple[torch.Tensor, dict[str, Metric]]:
            inputs = self.scorer.loss_inputs(m, logits_BTV, denominators)
            outputs = objective(inputs)
            logp_mu_T = inputs.logp_mu_T if fixed.has_mu else None
            ratios = self.scorer.ratios(m, inputs.logp_theta_T, inputs.logp_old_T, logp_mu_T)
            return outputs.loss * scale, outputs.metrics | ratios

        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        collected = self._run(self.chunks, microbatches, on_output, forward_only=False)
        _, grad_norm, _ = self.optimizer.step()
        metrics: dict[str, Metric] = {}
        for of_microbatch in collected:
            metrics = merge(metrics, of_microbatch)
        if self.is_last_stage and grad_norm is not None:
            metrics["grad_norm"] = masked_mean(torch.tensor([grad_norm]), torch.ones(1))
        return metrics

    def plan(self, batch: Batch, table: StepRoutes) -> PlannedStep:
        """Plan a step by its routes; collective."""
        placement = None if self.placed is None else self.placed.placement
        return plan_step(self.config.training, self.sharding, batch, table, placement)

    def follow(self, planned: PlannedStep | None) -> None:
        """Take the microbatches of a plan, and bring the experts to their ranks; collective.

        Args:
            planned: None takes Megatron's natural microbatches; the experts stay.
        """
        self.planned, bins = planned, None
        if planned is not None:
            data_rank = self.sharding.data_rank
            bins = tuple(ranks[data_rank] for ranks in planned.packing.bins)
            if self.placed is not None:
                self.placed.move(planned.placement)
        self.sharding = replace(self.sharding, planned=bins)

    def planned_counts(self, minibatch: int | None = None) -> dict[str, Any]:
        """Return what `replaying` is told of a scope over one minibatch, or all."""
        if self.planned is None:
            return {}
        numbers = None if minibatch is None else [minibatch]
        return self.planned.counts(self.sharding.data_rank, numbers, self.has_sizes)

    def natural_experts(self) -> contextlib.AbstractContextManager[None]:
        """Within: every expert on Megatron's own rank, as checkpoints hold them; collective."""
        return contextlib.nullcontext() if self.placed is None else self.placed.natural()

    def remembering_routers(self, num_rows: int) -> contextlib.AbstractContextManager[None]:
        """Open the scope around the old policy's pass that RSPO's router shift compares with."""
        if self.router_shift is None:
            return contextlib.nullcontext()
        return self.router_shift.remembering(num_rows)

    def logits_from_layer(self, layer: int) -> contextlib.AbstractContextManager[None]:
        """Within: logits are those of an inner layer; -1: of the whole model."""
        return inner_logits(self.chunks, layer) if layer >= 0 else contextlib.nullcontext()

    def dense(self, scores: Scores, batch: Batch) -> torch.Tensor:
        """Return log-probs [N] of all ranks' tokens; collective over the last stage's ranks."""
        values_N = self.sharding.scatter({s: part.logp_T for s, part in scores.items()}, batch)
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        torch.distributed.all_reduce(values_N, group=group)
        return values_N

    def discrepancy(self, batch: Batch, scores: Scores, suffix: str = "") -> dict[str, Metric]:
        """Return this rank's train-inference metrics of a pass: its scores against the engine's.

        Tokens of older weights have metrics of their own, by their version lag.
        """
        metrics: dict[str, Metric] = {}
        lags = batch.lag_N(self.weight_version)[batch.mask_N].unique().tolist()
        for m, part in self._scored_microbatches(batch, scores):
            mask_T = m.mask_BT.flatten()
            lag_T = version_lag(m.version_BT.flatten(), self.weight_version)
            for lag in lags:
                metrics = merge(
                    metrics,
                    policy_metrics(
                        part.logp_T,
                        m.logp_mu_BT.flatten(),
                        mask_T & (lag_T == lag),
                        suffix=suffix + lag_suffix(lag),
                        sequences=self.scorer.sequences(m),
                    ),
                )
            if not suffix:
                metrics = merge(metrics, {"entropy": masked_mean(part.entropy_T, mask_T)})
        return metrics

    def live_ratios(self, batch: Batch, live_old: Scores, number: int) -> dict[str, Metric]:
        """Return this rank's r and w without replay, of a minibatch before its update.

        Args:
            batch: The whole step's batch.
            live_old: pi_old's scores of the batch, of a pass without replay.
            number: Of the minibatch.
        """
        live = self.score(batch, None, number)
        metrics: dict[str, Metric] = {}
        for m, part in self._scored_microbatches(batch, live):
            old_T, mu_T = live_old[m.sequences].logp_T, m.logp_mu_BT.flatten()
            metrics = merge(metrics, self.scorer.ratios(m, part.logp_T, old_T, mu_T, "_live"))
        return metrics

    def reduce(self, metrics: dict[str, Metric]) -> dict[str, Metric]:
        """Reduce metrics of tokens over all ranks; collective.

        Tensor-parallel ranks hold the same tokens, so only one of them contributes.
        """
        contributes = parallel_state.get_tensor_model_parallel_rank() == 0
        device = "cpu" if self.sharding.device.type == "cpu" else self.sharding.device
        return all_reduce(metrics if contributes else {}, device=device)

    def _score(
        self,
        chunks: list[torch.nn.Module],
        batch: Batch,
        source: RowSource | None,
        minibatch: int | None,
    ) -> Scores:
        plan = self.sharding.plan(batch.lengths_S)
        numbers = range(len(plan)) if minibatch is None else [minibatch]
        microbatches = [
            self.sharding.microbatch(batch, sequences, source)
            for number in numbers
            for sequences in plan[number]
        ]
        scores: Scores = {}

        def on_output(m: Microbatch, logits_BTV: torch.Tensor, non_loss_data: bool = True) -> None:
            scores[m.sequences] = self.scorer.token_scores(m, logits_BTV)

        with torch.no_grad():
            self._run(
                chunks, microbatches, on_output, forward_only=True, collect_non_loss_data=True
            )
        return scores

    def _run(
        self,
        chunks: list[torch.nn.Module],
        microbatches: Sequence[Microbatch],
        on_output: Callable[..., Any],
        **options: Any,
    ) -> list[Any]:
        """Run Megatron's schedule; return what `on_output` returned, on the last stage."""

        def forward_step(
            iterator: Iterator[Microbatch], model: torch.nn.Module
        ) -> tuple[torch.Tensor, Callable[..., Any]]:
            m = next(iterator)
            with self._announced(chunks, m):
                output = model(m.input_ids_BT, m.position_ids_BT, None, **self._forward_options(m))
            return output, lambda *args, **kwargs: on_output(m, *args, **kwargs)

        several = len(chunks) > 1
        iterators = [iter(microbatches) for _ in chunks]
        size, length = microbatches[0].input_ids_BT.shape
        outputs: list[Any] = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iterators if several else iterators[0],
            model=chunks if several else chunks[0],
            num_microbatches=len(microbatches),
            seq_length=length * self.sharding.context_size,  # of the first one: see __init__
            micro_batch_size=size,
            **options,
        )
        return outputs

    def _announced(
        self, chunks: list[torch.nn.Module], m: Microbatch
    ) -> contextlib.AbstractContextManager[None]:
        """Tell replay whose tokens these are. The reference's chunks have no replay attached."""
        if chunks is not self.chunks:
            return contextlib.nullcontext()
        return self.replay.microbatch(m.token_rows_BT, mask=m.host_mask_BT)

    def _forward_options(self, m: Microbatch) -> dict[str, Any]:
        # token_logprobs converts bf16 logits chunk by chunk; Megatron would copy all of them.
        options: dict[str, Any] = {"fp32_output": False} if self.model_config.bf16 else {}
        if m.packed_lengths is not None:
            longest = max(m.packed_lengths)
            options["packed_seq_params"] = PackedSeqParams(
                qkv_format="thd",
                cu_seqlens_q=m.bounds,
                cu_seqlens_kv=m.bounds,
                max_seqlen_q=longest,
                max_seqlen_kv=longest,
            )
        return options

    def _with_fixed(self, m: Microbatch, batch: Batch, fixed: FixedScores) -> Microbatch:
        """Return the microbatch with its part of the loss's constants, on the last stage."""
        if not self.is_last_stage:
            return m
        constants = {"logp_old_T": fixed.old[m.sequences].logp_T}
        if fixed.reference is not None:
            constants["logp_ref_T"] = fixed.reference[m.sequences].logp_T
        grid = self.sharding.grid(batch.lengths_S, m.sequences)
        for name, values_N in fixed.chosen.items():
            constants[name] = grid.take(values_N).flatten()
        return replace(m, fixed=constants)

    def _denominators(self, batch: Batch, number: int) -> Denominators:
        size = self.sharding.minibatch_size
        minibatch = batch.positions(number * size, (number + 1) * size)
        return Denominators(
            num_sequences=size,
            num_tokens=int(batch.mask_N[minibatch].sum()),
            max_length=self.config.rollout.max_new_tokens,
        )

    def _scored_microbatches(
        self, batch: Batch, scores: Scores
    ) -> Iterator[tuple[Microbatch, TokenScores]]:
        for sequences, part in scores.items():
            yield self.sharding.microbatch(batch, sequences, None), part


def _stages(layers: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """Return the routed layers of each pipeline stage that has any; collective."""
    of_ranks: list[tuple[int, ...]] = [()] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(of_ranks, layers)
    return tuple(sorted({of_rank for of_rank in of_ranks if of_rank}))
