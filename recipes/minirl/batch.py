"""A step's sequences: padded arrays, saved once and memory-mapped by all ranks, cut per microbatch.

Every array is aligned to the inputs: position t of a row belongs to the forward that consumes
token t and predicts token t + 1. Suffixes here: S sequences of the step, B of a microbatch, T
positions.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from routing_replay.errors import DataError

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
    """

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    logp_mu: tuple[float, ...]
    routes: object | None = None
    reward: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The sequences of a step, groups one after another.

    Args:
        input_ids_ST: int64; the last token of a sequence is consumed by nobody and left out.
        labels_ST: int64, the next token.
        mask_ST: bool, the label was sampled.
        logp_mu_ST: float32, log mu of the label where the mask holds.
        lengths_S: int64, tokens of the whole sequence, the last one included.
        advantages_S: float32.
    """

    input_ids_ST: torch.Tensor
    labels_ST: torch.Tensor
    mask_ST: torch.Tensor
    logp_mu_ST: torch.Tensor
    lengths_S: torch.Tensor
    advantages_S: torch.Tensor

    @classmethod
    def from_samples(
        cls, samples: Sequence[Sample], advantages_S: torch.Tensor, multiple: int
    ) -> Batch:
        """Pad to a common length that is a multiple of what the parallel layout divides it by."""
        longest = max(len(s.prompt_ids) + len(s.response_ids) - 1 for s in samples)
        shape = (len(samples), -(-longest // multiple) * multiple)
        input_ids_ST = torch.full(shape, PAD_ID)
        labels_ST = torch.full(shape, PAD_ID)
        mask_ST = torch.zeros(shape, dtype=torch.bool)
        logp_mu_ST = torch.zeros(shape)
        for row, sample in enumerate(samples):
            tokens = torch.tensor(sample.prompt_ids + sample.response_ids)
            stop = len(tokens) - 1
            response = slice(len(sample.prompt_ids) - 1, stop)
            input_ids_ST[row, :stop] = tokens[:-1]
            labels_ST[row, :stop] = tokens[1:]
            mask_ST[row, response] = True
            logp_mu_ST[row, response] = torch.tensor(sample.logp_mu)
        lengths = [len(s.prompt_ids) + len(s.response_ids) for s in samples]
        return cls(
            input_ids_ST=input_ids_ST,
            labels_ST=labels_ST,
            mask_ST=mask_ST,
            logp_mu_ST=logp_mu_ST,
            lengths_S=torch.tensor(lengths),
            advantages_S=advantages_S.float(),
        )

    def save(self, path: str | os.PathLike) -> None:
        """Write one safetensors file.

        Raises:
            DataError: The disk is full or not writable.
        """
        tensors = {f.name: getattr(self, f.name).contiguous() for f in fields(self)}
        try:
            save_file(tensors, path)
        except OSError as error:
            raise DataError("the batch could not be saved", got=error, where=path) from error

    @classmethod
    def open(cls, path: str | os.PathLike) -> Batch:
        """Memory-map a saved batch."""
        with safe_open(Path(path), "pt") as file:
            return cls(**{f.name: file.get_tensor(f.name) for f in fields(cls)})

    def token_rows(self, rows_of: Callable[[int, int], np.ndarray] | None) -> torch.Tensor:
        """For every position the row of its routes, or -1.

        Args:
            rows_of: (sequence, number of tokens) -> its rows, as `RouteTable.rows`; None: all live.

        Returns:
            int64 [S, T].
        """
        token_rows_ST = torch.full(self.input_ids_ST.shape, -1)
        if rows_of is not None:
            for sequence, length in enumerate(self.lengths_S.tolist()):
                rows = rows_of(sequence, length)[: length - 1]
                token_rows_ST[sequence, : length - 1] = torch.from_numpy(rows)
        return token_rows_ST


@dataclass(frozen=True, kw_only=True)
class Microbatch:
    """What one rank feeds to the model at once; [B, T] each, T being this rank's positions.

    `token_rows_BT` and `mask_BT` stay on the CPU, the rest is on the model's device.
    """

    input_ids_BT: torch.Tensor
    position_ids_BT: torch.Tensor
    labels_BT: torch.Tensor
    mask_BT: torch.Tensor
    logp_mu_BT: torch.Tensor
    advantages_BT: torch.Tensor
    token_rows_BT: torch.Tensor


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
        rows = slice(sequences.start, sequences.stop)
        positions_T = self._positions(batch.input_ids_ST.shape[1])
        advantages_BT = batch.advantages_S[rows, None].expand(-1, len(positions_T))

        def part(values_ST):
            return values_ST[rows][:, positions_T]

        return Microbatch(
            input_ids_BT=part(batch.input_ids_ST).to(self.device),
            position_ids_BT=positions_T.expand(len(sequences), -1).to(self.device),
            labels_BT=part(batch.labels_ST).to(self.device),
            mask_BT=part(batch.mask_ST),
            logp_mu_BT=part(batch.logp_mu_ST).to(self.device),
            advantages_BT=advantages_BT.to(self.device),
            token_rows_BT=part(token_rows_ST).contiguous(),
        )

    def _positions(self, length: int) -> torch.Tensor:
        """Megatron's zigzag: of 2 C chunks rank c of C holds chunks c and 2 C - 1 - c."""
        positions_T = torch.arange(length)
        if self.context_size == 1:
            return positions_T
        chunks = positions_T.chunk(2 * self.context_size)
        return torch.cat([chunks[self.context_rank], chunks[-1 - self.context_rank]])
