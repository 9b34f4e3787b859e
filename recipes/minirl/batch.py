"""A step's sequences: padded arrays, saved once and memory-mapped by all ranks, cut per microbatch.

Every array is aligned to the inputs: position t of a row belongs to the forward that consumes
token t and predicts token t + 1. Suffixes here: S sequences of the step, B of a microbatch, T
positions.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from routing_replay.errors import DataError
from routing_replay.objectives.logprobs import Support
from routing_replay.routes.token_rows import RowSource, context_positions

PAD_ID = 0  # any id will do: padding is behind the sequence and outside every mask


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One response as the rollout engine gave it; nothing is decoded and encoded again.

    Args:
        prompt_ids: Token ids that the server was sent.
        response_ids: Token ids that it sampled, its end-of-text included.
        logp_mu: Their log-probs under the sampling distribution.
        routes: The expert routes; None where they were not asked for.
        reward: Set by the verifier.
        support: For each response token the ids that top-p and top-k left to choose from, if
            `logp_mu` is of that choice.
        support_mass: Mean probability of that choice before it was made.
        top_ids, top_logp_mu: [n, K], the engine's most likely tokens at each position, if asked
            for.
    """

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    logp_mu: tuple[float, ...]
    routes: object | None = None
    reward: float = 0.0
    support: Sequence[Sequence[int]] | None = None
    support_mass: float = 1.0
    top_ids: np.ndarray | None = None
    top_logp_mu: np.ndarray | None = None


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The sequences of a step, groups one after another.

    Args:
        input_ids_ST: int64; the last token of a sequence is consumed by nobody and left out.
        labels_ST: int64, the next token.
        mask_ST: bool, the label was sampled.
        logp_mu_ST: float32, log mu of the label where the mask holds.
        lengths_S: int64, tokens of the whole sequence, the last one included.
        rewards_S: float32, the verifier's.
        group_S: int64; sequences of one prompt have one number.
        num_prompts: int64, one number: prompts consumed for the batch, those left out included.
        advantages_S: float32; 0 until they are computed, which may need log-probs.
        support_ids_N, support_starts_ST, support_counts_ST: Keep Sampling Mask: the ids that could
            be sampled at a position are `counts` of `ids` from `starts` on; no ids: all of them.
        top_ids_STK, top_logp_mu_STK: int32 and float32, the engine's most likely tokens.
    """

    input_ids_ST: torch.Tensor
    labels_ST: torch.Tensor
    mask_ST: torch.Tensor
    logp_mu_ST: torch.Tensor
    lengths_S: torch.Tensor
    rewards_S: torch.Tensor
    group_S: torch.Tensor
    num_prompts: torch.Tensor
    advantages_S: torch.Tensor
    support_ids_N: torch.Tensor | None = None
    support_starts_ST: torch.Tensor | None = None
    support_counts_ST: torch.Tensor | None = None
    top_ids_STK: torch.Tensor | None = None
    top_logp_mu_STK: torch.Tensor | None = None

    @classmethod
    def from_samples(
        cls,
        samples: Sequence[Sample],
        group_size: int,
        multiple: int,
        num_prompts: int | None = None,
    ) -> Batch:
        """Pad to a common length that is a multiple of what the parallel layout divides it by."""
        num_groups = len(samples) // group_size
        longest = max(len(s.prompt_ids) + len(s.response_ids) - 1 for s in samples)
        shape = (len(samples), -(-longest // multiple) * multiple)
        input_ids_ST = torch.full(shape, PAD_ID)
        labels_ST = torch.full(shape, PAD_ID)
        mask_ST = torch.zeros(shape, dtype=torch.bool)
        for row, sample in enumerate(samples):
            tokens = torch.tensor(sample.prompt_ids + sample.response_ids)
            stop = len(tokens) - 1
            input_ids_ST[row, :stop] = tokens[:-1]
            labels_ST[row, :stop] = tokens[1:]
            mask_ST[row, len(sample.prompt_ids) - 1 : stop] = True
        logp_mu_ST = torch.zeros(shape)
        # Row by row, left to right: the order of the response tokens of all samples.
        logp_mu_ST[mask_ST] = torch.tensor([value for s in samples for value in s.logp_mu])
        return cls(
            input_ids_ST=input_ids_ST,
            labels_ST=labels_ST,
            mask_ST=mask_ST,
            logp_mu_ST=logp_mu_ST,
            lengths_S=torch.tensor([len(s.prompt_ids) + len(s.response_ids) for s in samples]),
            rewards_S=torch.tensor([s.reward for s in samples]),
            group_S=torch.arange(len(samples)) // group_size,
            num_prompts=torch.tensor(num_groups if num_prompts is None else num_prompts),
            advantages_S=torch.zeros(len(samples)),
            **_support_of(samples, mask_ST),
            **_top_of(samples, mask_ST),
        )

    def save(self, path: str | os.PathLike) -> None:
        """Write one safetensors file.

        Raises:
            DataError: The disk is full or not writable.
        """
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        tensors = {name: value.contiguous() for name, value in given.items() if value is not None}
        try:
            save_file(tensors, path)
        except OSError as error:
            raise DataError("the batch could not be saved", got=error, where=path) from error

    @classmethod
    def open(cls, path: str | os.PathLike) -> Batch:
        """Memory-map a saved batch."""
        with safe_open(Path(path), "pt") as file:
            return cls(**{name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118

    def token_rows(self, source: RowSource | None) -> torch.Tensor:
        """Return the row of each position's routes in a table or recording; -1 without one.

        Returns:
            int64 [S, T].
        """
        if source is None:
            return torch.full(self.input_ids_ST.shape, -1)
        return source.token_rows(self.lengths_S, width=self.input_ids_ST.shape[1])


def _support_of(samples: Sequence[Sample], mask_ST: torch.Tensor) -> dict[str, torch.Tensor]:
    """The supports of all response tokens, one after another; nothing without a sampling mask."""
    if samples[0].support is None:
        return {}
    supports = [ids for s in samples for ids in s.support]
    counts_ST = torch.zeros(mask_ST.shape, dtype=torch.int64)
    counts_ST[mask_ST] = torch.tensor([len(ids) for ids in supports])
    starts_ST = (counts_ST.flatten().cumsum(0) - counts_ST.flatten()).view(mask_ST.shape)
    return {
        "support_ids_N": torch.tensor([v for ids in supports for v in ids], dtype=torch.int32),
        "support_starts_ST": starts_ST,
        "support_counts_ST": counts_ST,
    }


def _top_of(samples: Sequence[Sample], mask_ST: torch.Tensor) -> dict[str, torch.Tensor]:
    """The engine's most likely tokens at each response token; nothing if not asked for."""
    if samples[0].top_ids is None:
        return {}
    shape = (*mask_ST.shape, samples[0].top_ids.shape[1])
    ids_STK, logp_STK = torch.zeros(shape, dtype=torch.int32), torch.zeros(shape)
    ids_STK[mask_ST] = torch.from_numpy(np.concatenate([s.top_ids for s in samples])).int()
    logp_STK[mask_ST] = torch.from_numpy(np.concatenate([s.top_logp_mu for s in samples])).float()
    return {"top_ids_STK": ids_STK, "top_logp_mu_STK": logp_STK}


@dataclass(frozen=True, kw_only=True)
class Microbatch:
    """What one rank feeds to the model at once; [B, T] each, T being this rank's positions.

    `token_rows_BT` and `mask_BT` stay on the CPU, the rest is on the model's device. `support` and
    `top_*` are of the flattened positions; `sequences` are its rows of the batch.
    """

    sequences: range

    input_ids_BT: torch.Tensor
    position_ids_BT: torch.Tensor
    labels_BT: torch.Tensor
    mask_BT: torch.Tensor
    logp_mu_BT: torch.Tensor
    advantages_BT: torch.Tensor
    token_rows_BT: torch.Tensor
    support: Support | None = None
    top_ids_TK: torch.Tensor | None = None
    top_logp_mu_TK: torch.Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Cut:
    """How a batch is cut for one rank.

    Args:
        data_rank, data_size: Data parallelism: its part of the sequences of every minibatch.
        context_rank, context_size: Context parallelism: its part of every sequence.
        minibatch_size: Sequences per update, over all ranks.
        microbatch_size: Sequences per forward pass of this rank, at most its share.
        device: Of the model.
    """

    data_rank: int
    data_size: int
    context_rank: int
    context_size: int
    minibatch_size: int
    microbatch_size: int
    device: torch.device

    def sequences(self, num_sequences: int) -> list[list[range]]:
        """For each minibatch this rank's microbatches, as ranges of sequences."""
        share = self.minibatch_size // self.data_size
        size = min(self.microbatch_size, share)
        firsts = range(self.data_rank * share, num_sequences, self.minibatch_size)
        return [
            [range(start, start + size) for start in range(first, first + share, size)]
            for first in firsts
        ]

    def microbatch(self, batch: Batch, sequences: range, token_rows_ST: torch.Tensor) -> Microbatch:
        """One microbatch; `token_rows` are sliced exactly as the input ids."""
        mask_BT = self.part(batch.mask_ST, sequences)
        advantages_BT = batch.advantages_S[sequences.start : sequences.stop, None]
        return Microbatch(
            sequences=sequences,
            input_ids_BT=self.part(batch.input_ids_ST, sequences).to(self.device),
            position_ids_BT=self._positions(batch.input_ids_ST.shape[1])
            .expand(len(sequences), -1)
            .to(self.device),
            labels_BT=self.part(batch.labels_ST, sequences).to(self.device),
            mask_BT=mask_BT,
            logp_mu_BT=self.part(batch.logp_mu_ST, sequences).to(self.device),
            advantages_BT=advantages_BT.expand(mask_BT.shape).to(self.device),
            token_rows_BT=self.part(token_rows_ST, sequences).contiguous(),
            support=self._support(batch, sequences),
            top_ids_TK=self._top(batch.top_ids_STK, sequences, torch.int64),
            top_logp_mu_TK=self._top(batch.top_logp_mu_STK, sequences, torch.float32),
        )

    def part(self, values_ST: torch.Tensor, sequences: range) -> torch.Tensor:
        """Some sequences, this rank's positions."""
        positions_T = self._positions(values_ST.shape[1])
        return values_ST[sequences.start : sequences.stop][:, positions_T]

    def dense(self, parts: Sequence[Sequence[torch.Tensor]], shape, numbers) -> torch.Tensor:
        """[S, T] with this rank's tokens in their places and 0 elsewhere: the reverse of `part`.

        Args:
            parts: For each of the minibatches `numbers` and each microbatch its tokens, flat.
            shape: Of the batch.
        """
        values_ST = torch.zeros(shape, device=self.device)
        positions_T = self._positions(shape[1]).to(self.device)
        plan = self.sequences(shape[0])
        for number, of_minibatch in zip(numbers, parts, strict=True):
            for sequences, values_T in zip(plan[number], of_minibatch, strict=True):
                rows = torch.arange(sequences.start, sequences.stop, device=self.device)
                values_ST[rows[:, None], positions_T] = values_T.float().view(len(sequences), -1)
        return values_ST

    def _support(self, batch: Batch, sequences: range) -> Support | None:
        if batch.support_ids_N is None:
            return None
        starts_T, counts_T = (
            self.part(v, sequences).flatten()
            for v in (batch.support_starts_ST, batch.support_counts_ST)
        )
        offsets_T1 = torch.nn.functional.pad(counts_T.cumsum(0), (1, 0))
        within_N = torch.arange(int(offsets_T1[-1])) - offsets_T1[:-1].repeat_interleave(counts_T)
        ids_N = batch.support_ids_N[starts_T.repeat_interleave(counts_T) + within_N]
        return Support(ids_N=ids_N.long().to(self.device), offsets_T1=offsets_T1)

    def _top(self, values_STK, sequences: range, dtype) -> torch.Tensor | None:
        if values_STK is None:
            return None
        return self.part(values_STK, sequences).flatten(0, 1).to(self.device, dtype)

    def _positions(self, length: int) -> torch.Tensor:
        bounds = [0, length]
        return torch.from_numpy(context_positions(bounds, self.context_rank, self.context_size))
