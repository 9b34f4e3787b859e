"""The trained policy on this rank: Megatron model, optimizer, replay, passes over a batch."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from recipes.model import parallel
from recipes.model.model import transformer_config
from routing_replay.errors import ConfigError
from routing_replay.megatron import attach
from routing_replay.megatron.router_shift import RouterShift
from routing_replay.metrics.policy_kl import Sequences, policy_metrics, update_metrics
from routing_replay.metrics.typed import Metric, all_reduce, masked_mean, merge
from routing_replay.objectives import Denominators, LossInputs, Objective
from routing_replay.objectives.logprobs import TokenScores, logprobs_at, token_logprobs

# isort: split
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func

from . import models
from .batch import Batch, Cut, Microbatch
from .config import RecipeConfig
from .inner_layer import reading_layer


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Log-probs and entropies of this rank's tokens, per minibatch and microbatch.

    Args:
        parts: Empty on ranks before the last pipeline stage.
        numbers: The minibatches that were scored.
    """

    parts: list[list[TokenScores]]
    numbers: Sequence[int]


@dataclass(frozen=True, kw_only=True)
class Given:
    """What an update takes as constant.

    Args:
        old: pi_old's scores of the batch.
        reference: Those of the frozen reference, where the loss has a KL to it.
        chosen: [S, T] by name in LossInputs: what was chosen or measured over the whole step.
    """

    old: Scores
    reference: Scores | None = None
    chosen: Mapping[str, torch.Tensor] = field(default_factory=dict)


class Policy:
    """Model, optimizer and replay of this rank.

    Args:
        config: The recipe's configuration, `auto` resolved.
        checkpoint: Hugging Face folder that the weights are read from.
        reference: The same of the frozen reference, if the configuration needs one; `checkpoint`
            if None.
    """

    def __init__(self, config: RecipeConfig, checkpoint: Path, reference: Path | None = None):
        t = config.training
        self.config = config
        self.layout = models.layout_of(t)
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
        self.model_config.finalize_model_grads_func = finalize_model_grads
        self.chunks = models.trained(self.model_config, self.layout, checkpoint, t)
        self.optimizer = models.optimizer_of(self.chunks, t, dtype)
        has_router_shift = "router_shift_T" in config.make_objective().needs
        replay = config.replay
        if has_router_shift and replay.mode == "disabled":
            # RSPO names its tokens by a recording's rows, even where no route is replayed.
            replay = dataclasses.replace(replay, mode="R2")
        self.replay = attach(self.chunks, replay)
        self.router_shift = RouterShift(self.replay) if has_router_shift else None
        self.reference = None
        if config.needs_reference:
            folder = reference or checkpoint
            self.reference = models.frozen(self.model_config, self.layout, folder)
        self.tensor_group = parallel_state.get_tensor_model_parallel_group()
        self.is_last_stage = parallel_state.is_pipeline_last_stage(ignore_virtual=True)
        self.cut = Cut(
            data_rank=parallel_state.get_data_parallel_rank(),
            data_size=parallel_state.get_data_parallel_world_size(),
            context_rank=parallel_state.get_context_parallel_rank(),
            context_size=parallel_state.get_context_parallel_world_size(),
            minibatch_size=t.minibatch_size,
            microbatch_size=t.microbatch_size,
            device=next(self.chunks[0].parameters()).device,
        )

    @property
    def length_multiple(self) -> int:
        """What the layout divides a padded sequence by: tensor ranks, two chunks per context."""
        context = self.layout.context
        return self.layout.tensor * (2 * context if context > 1 else 1)

    # Passes

    def score(
        self, batch: Batch, token_rows_ST: torch.Tensor, minibatch: int | None = None
    ) -> Scores:
        """Forward passes over this rank's part of the batch, without gradient.

        Which routes are taken is decided by the scope of `self.replay` that is open around it.

        Args:
            batch: The whole step's batch.
            token_rows_ST: Rows of that scope's table, or -1.
            minibatch: Only this one; all if None.
        """
        return self._score(self.chunks, batch, token_rows_ST, minibatch)

    def score_reference(self, batch: Batch) -> Scores:
        """The frozen reference's scores; nothing is attached to it, so it routes live always."""
        return self._score(self.reference, batch, batch.token_rows(None), None)

    def update(
        self,
        batch: Batch,
        token_rows_ST: torch.Tensor,
        given: Given,
        objective: Objective,
        number: int,
    ) -> dict[str, Metric]:
        """One optimizer step on one minibatch.

        Args:
            batch: The whole step's batch.
            token_rows_ST: Rows of the table that is replayed around this call, or -1.
            given: What is constant: other policies' scores, choices over the step.
            objective: The loss.
            number: Of the minibatch.

        Returns:
            This rank's metrics.
        """
        plan = self.cut.sequences(len(batch.lengths_S))[number]
        microbatches = [self.cut.microbatch(batch, s, token_rows_ST) for s in plan]
        first = number * self.cut.minibatch_size
        mask_ST = batch.mask_ST[first : first + self.cut.minibatch_size]
        denominators = Denominators(
            num_sequences=len(mask_ST),
            num_tokens=int(mask_ST.sum()),
            max_length=self.config.rollout.max_new_tokens,
        )
        # Megatron averages over microbatches and data-parallel ranks; our denominators are global.
        scale = len(microbatches) * self.cut.data_size
        others = iter(self._others(given, number))

        def on_output(microbatch: Microbatch, logits):
            scores = self._token_scores(microbatch, logits)
            more = next(others) | self._chosen(microbatch, given.chosen)
            more |= self._most_likely(microbatch, logits)
            inputs = self._loss_inputs(microbatch, scores, denominators, more)
            outputs = objective(inputs)
            ratios = update_metrics(
                scores.logp_T,
                inputs.logp_old_T,
                inputs.logp_mu_T,
                inputs.mask_T,
                sequences=self._sequences(microbatch),
            )
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

    def remembering_routers(self, num_rows: int):
        """Around the old policy's pass, in a scope of so many rows: for RSPO's router shift."""
        if self.router_shift is None:
            return contextlib.nullcontext()
        return self.router_shift.remembering(num_rows)

    def reading(self, layer: int):
        """Within: logits are those of an inner layer; -1: of the whole model."""
        return reading_layer(self.chunks, layer) if layer >= 0 else contextlib.nullcontext()

    def dense(self, scores: Scores, shape) -> torch.Tensor:
        """Log-probs [S, T] of all ranks' tokens; collective over the ranks of the last stage."""
        parts = [[part.logp_T for part in of_minibatch] for of_minibatch in scores.parts]
        values_ST = self.cut.dense(parts, shape, scores.numbers)
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        torch.distributed.all_reduce(values_ST, group=group)
        return values_ST

    def discrepancy(self, batch: Batch, scores: Scores, suffix: str = "") -> dict[str, Metric]:
        """This rank's train-inference metrics of a pass: its scores against the engine's."""
        metrics: dict[str, Metric] = {}
        plan = self.cut.sequences(len(batch.lengths_S))
        all_live = batch.token_rows(None)
        for minibatch, of_minibatch in zip(plan, scores.parts, strict=self.is_last_stage):
            for sequences, part in zip(minibatch, of_minibatch, strict=True):
                m = self.cut.microbatch(batch, sequences, all_live)
                mask_T, logp_mu_T = m.mask_BT.flatten().to(self.cut.device), m.logp_mu_BT.flatten()
                found = policy_metrics(
                    part.logp_T, logp_mu_T, mask_T, suffix=suffix, sequences=self._sequences(m)
                )
                if not suffix:
                    found["entropy"] = masked_mean(part.entropy_T, mask_T)
                metrics = merge(metrics, found)
        return metrics

    def live_ratios(self, batch: Batch, live_old: Scores, number: int) -> dict[str, Metric]:
        """This rank's r and w without replay, of a minibatch before its update.

        Args:
            batch: The whole step's batch.
            live_old: pi_old's scores of the batch, of a pass without replay.
            number: Of the minibatch.
        """
        all_live = batch.token_rows(None)
        parts = self.score(batch, all_live, number).parts
        metrics: dict[str, Metric] = {}
        if not self.is_last_stage:
            return metrics
        plan = self.cut.sequences(len(batch.lengths_S))[number]
        for sequences, part, old in zip(plan, parts[0], live_old.parts[number], strict=True):
            m = self.cut.microbatch(batch, sequences, all_live)
            found = update_metrics(
                part.logp_T,
                old.logp_T,
                m.logp_mu_BT.flatten(),
                m.mask_BT.flatten().to(self.cut.device),
                suffix="_live",
                sequences=self._sequences(m),
            )
            metrics = merge(metrics, found)
        return metrics

    def reduce(self, metrics: dict[str, Metric]) -> dict[str, Metric]:
        """Metrics of tokens over all ranks; collective.

        Tensor-parallel ranks hold the same tokens, so one of them speaks for all.
        """
        is_speaker = parallel_state.get_tensor_model_parallel_rank() == 0
        device = "cpu" if self.cut.device.type == "cpu" else self.cut.device
        return all_reduce(metrics if is_speaker else {}, device=device)

    def _score(self, chunks, batch: Batch, token_rows_ST, minibatch: int | None) -> Scores:
        plan = self.cut.sequences(len(batch.lengths_S))
        numbers = range(len(plan)) if minibatch is None else [minibatch]
        microbatches = [
            self.cut.microbatch(batch, sequences, token_rows_ST)
            for number in numbers
            for sequences in plan[number]
        ]

        def on_output(microbatch: Microbatch, logits, non_loss_data: bool = True):
            return self._token_scores(microbatch, logits)

        with torch.no_grad():
            collected = self._run(
                chunks, microbatches, on_output, forward_only=True, collect_non_loss_data=True
            )
        found = iter(collected)
        if not self.is_last_stage:
            return Scores(parts=[], numbers=numbers)
        return Scores(parts=[[next(found) for _ in plan[n]] for n in numbers], numbers=numbers)

    def _run(
        self,
        chunks: list,
        microbatches: Sequence[Microbatch],
        on_output: Callable,
        **options,
    ) -> list:
        """Megatron's schedule over the microbatches; what `on_output` gave, on the last stage."""

        def forward_step(iterator: Iterator[Microbatch], model):
            m = next(iterator)
            with self._announced(chunks, m):
                output = model(m.input_ids_BT, m.position_ids_BT, None)
            return output, lambda *args, **kwargs: on_output(m, *args, **kwargs)

        several = len(chunks) > 1
        iterators = [iter(microbatches) for _ in chunks]
        size, length = microbatches[0].input_ids_BT.shape
        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iterators if several else iterators[0],
            model=chunks if several else chunks[0],
            num_microbatches=len(microbatches),
            seq_length=length * self.cut.context_size,
            micro_batch_size=size,
            **options,
        )

    def _announced(self, chunks: list, m: Microbatch):
        """Replay is attached to the policy's own chunks alone."""
        if chunks is not self.chunks:
            return contextlib.nullcontext()
        return self.replay.microbatch(m.token_rows_BT, mask=m.mask_BT)

    def _token_scores(self, microbatch: Microbatch, logits_BTV: torch.Tensor) -> TokenScores:
        return token_logprobs(
            logits_BTV.flatten(0, 1),
            microbatch.labels_BT.flatten(),
            reuse_logits=True,
            **self._distribution(microbatch),
        )

    def _most_likely(self, m: Microbatch, logits_BTV: torch.Tensor) -> dict[str, torch.Tensor]:
        """pi_theta at mu's most likely tokens, if the batch has these."""
        if m.top_ids_TK is None:
            return {}
        logits_TV = logits_BTV.detach().flatten(0, 1)
        theta_TK = logprobs_at(logits_TV, m.top_ids_TK, **self._distribution(m))
        return {
            "sampled_ids_T": m.labels_BT.flatten(),
            "topk_ids_TK": m.top_ids_TK,
            "topk_logp_mu_TK": m.top_logp_mu_TK,
            "topk_logp_theta_TK": theta_TK,
        }

    def _distribution(self, microbatch: Microbatch) -> dict:
        """How logits become the policy: as the rollout sampled."""
        return {
            "temperature": self.config.rollout.temperature,
            "group": self.tensor_group if self.layout.tensor > 1 else None,
            "support": microbatch.support,
        }

    def _others(self, given: Given, number: int) -> list[dict[str, torch.Tensor]]:
        """Other policies' log-probs, for each microbatch of a minibatch."""
        if not self.is_last_stage:
            return []
        others = [{"logp_old_T": part.logp_T} for part in given.old.parts[number]]
        if given.reference is not None:
            for of_microbatch, part in zip(others, given.reference.parts[number], strict=True):
                of_microbatch["logp_ref_T"] = part.logp_T
        return others

    def _chosen(self, m: Microbatch, chosen: Mapping[str, torch.Tensor]) -> dict:
        parts = {name: self.cut.part(v_ST, m.sequences) for name, v_ST in chosen.items()}
        return {name: part.flatten().to(self.cut.device) for name, part in parts.items()}

    def _loss_inputs(self, m: Microbatch, scores, denominators, more: dict) -> LossInputs:
        sequences = self._sequences(m)
        return LossInputs(
            logp_theta_T=scores.logp_T,
            entropy_T=scores.entropy_T,
            logp_mu_T=m.logp_mu_BT.flatten(),
            advantages_T=m.advantages_BT.flatten(),
            mask_T=m.mask_BT.flatten().to(self.cut.device),
            sequence_T=sequences.index_T,
            num_sequences=sequences.count,
            denominators=denominators,
            context_group=sequences.context_group,
            **more,
        )

    def _sequences(self, m: Microbatch) -> Sequences:
        """Which sequence of the microbatch each of its tokens here belongs to."""
        size, length = m.mask_BT.shape
        has_context = self.cut.context_size > 1
        return Sequences(
            index_T=torch.arange(size, device=self.cut.device).repeat_interleave(length),
            count=size,
            context_group=parallel_state.get_context_parallel_group() if has_context else None,
        )
