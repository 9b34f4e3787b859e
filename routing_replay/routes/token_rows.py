"""`token_rows`: for each token of a batch the row of its routes, in every layout of a batch.

A packed batch is one line of segments, one sequence each, that begin at `cu_seqlens`. A padded
batch [B, width] is a packed one whose segments are all `width` long. Context parallelism cuts each
segment alike. So one computation serves all layouts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..errors import TableError

if TYPE_CHECKING:
    import torch

    Integers = Sequence[int] | np.ndarray | torch.Tensor


class RowSource(ABC):
    """What has a row for each token of a step: a `RouteTable`, or a recording in progress."""

    @abstractmethod
    def rows(self, sequence: int, num_tokens: int) -> np.ndarray:
        """Return the row of each token of a sequence, or -1: int64 [num_tokens]."""

    def token_rows(
        self,
        lengths: Integers,
        *,
        width: int | None = None,
        cu_seqlens: Integers | None = None,
        sequences: Integers | None = None,
        context: tuple[int, int] = (0, 1),
    ) -> torch.Tensor:
        """Return the rows of a batch in the layout of its `input_ids`.

        Position t of a sequence gets the row of its token t. Padding and the last token get -1: no
        engine fed the last sampled token to the model. `input_ids` may leave the last token out.

        Args:
            lengths: Tokens of each sequence, prompt and response, without padding.
            width: Padded batch: positions of each sequence. The longest length, if None.
            cu_seqlens: Packed (THD) batch instead: int [B + 1], where the segments begin, alignment
                padding included (`cu_seqlens_q_padded`, where Megatron has one).
            sequences: Number of each sequence in this table, -1 for one that routes live. 0, 1, ...
                if None.
            context: (rank, size) of context parallelism: only this rank's positions, as Megatron's
                `get_batch_on_this_cp_rank` selects them.

        Returns:
            int64 on the CPU: [B, width / size] for a padded batch, [cu_seqlens[-1] / size] for a
            packed one.

        Raises:
            TableError: A layout that does not hold the sequences, or a sequence with more rows than
                tokens that were fed to the model.
        """
        import torch  # numpy suffices until a batch is built

        lengths_B = integers(lengths, "the lengths")
        numbers_B = np.arange(len(lengths_B))
        if sequences is not None:
            numbers_B = integers(sequences, "the sequences")
        if width is not None and cu_seqlens is not None:
            raise TableError("a batch is padded or packed", expected="width or cu_seqlens")
        if cu_seqlens is not None:
            bounds = integers(cu_seqlens, "cu_seqlens")
        else:
            width = int(lengths_B.max(initial=0)) if width is None else width
            bounds = width * np.arange(len(lengths_B) + 1)
        _check_segments(bounds, lengths_B, len(numbers_B))
        rows_T = np.full(bounds[-1], -1, np.int64)
        for start, length, number in zip(bounds[:-1], lengths_B, numbers_B, strict=True):
            if number >= 0:
                # Without the last token, for which `input_ids` may have no position.
                rows_T[start : start + length - 1] = self.rows(int(number), int(length))[:-1]
        rows_T = rows_T[context_positions(bounds, *context)]
        token_rows = torch.from_numpy(rows_T)
        return token_rows if width is None else token_rows.view(len(lengths_B), width // context[1])


def context_positions(bounds: Integers, rank: int, size: int) -> np.ndarray:
    """Return the positions of a batch that one context-parallel rank holds, in local order.

    Each segment is cut into `2 * size` chunks, of which rank r holds chunks r and
    `2 * size - 1 - r`: a causal mask then costs every rank the same.

    Args:
        bounds: Where the segments begin, and the end: [0, length] for one sequence, or for each
            line of a padded batch; `cu_seqlens` for a packed one.
        rank: Rank in the context-parallel group.
        size: Ranks of the group; 1 holds all positions.

    Returns:
        int64 [bounds[-1] / size].

    Raises:
        TableError: A segment that does not divide by `2 * size`, or a rank outside the group.

    Source: Megatron-Core's `get_batch_on_this_cp_rank` (per sequence; per document through
    Transformer Engine's `thd_get_partitioned_indices`).
    """
    bounds = integers(bounds, "cu_seqlens")
    if not 0 <= rank < size:
        raise TableError(
            "the context-parallel rank is outside its group",
            expected=f"a rank in 0..{size - 1}",
            got=rank,
        )
    if size == 1:
        return np.arange(bounds[-1])
    indivisible = np.flatnonzero(np.diff(bounds) % (2 * size))
    if len(indivisible):
        segment = indivisible[0]
        raise TableError(
            "a segment does not divide by context parallelism",
            expected=f"a multiple of 2 x {size} positions",
            got=int(np.diff(bounds)[segment]),
            where=f"segment {segment}",
            fix="Pad each sequence to such a multiple",
        )
    pieces = []
    for start, stop in zip(bounds[:-1], bounds[1:], strict=True):
        chunks = np.arange(start, stop).reshape(2 * size, -1)
        pieces += [chunks[rank], chunks[2 * size - 1 - rank]]
    return np.concatenate(pieces or [np.arange(0)])


def integers(values: Integers, what: str) -> np.ndarray:
    """Return 1-D integers of any library and device as int64.

    Raises:
        TableError: Another type or shape.
    """
    # Copying from a GPU waits for it: a data loader should pass lengths that lie on the host.
    values = values.cpu() if hasattr(values, "cpu") else values
    array = np.asarray(values)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise TableError(f"{what} are not one line of integers", got=f"{array.dtype} {array.shape}")
    return array.astype(np.int64)


def _check_segments(bounds: np.ndarray, lengths_B: np.ndarray, num_sequences: int) -> None:
    if not len(bounds) == len(lengths_B) + 1 == num_sequences + 1:
        raise TableError(
            "lengths, segments and sequences are of different numbers",
            expected="B lengths, B + 1 cu_seqlens, B sequences",
            got=f"{len(lengths_B)}, {len(bounds)}, {num_sequences}",
        )
    room_B = np.diff(bounds)
    if bounds[0] != 0 or (room_B < 0).any():
        raise TableError("cu_seqlens do not ascend from 0", got=bounds.tolist()[:8])
    # A batch without the last token of a sequence has one position less than tokens.
    wrong = np.flatnonzero((lengths_B < 1) | (lengths_B - 1 > room_B))
    if len(wrong):
        segment = wrong[0]
        raise TableError(
            "a sequence does not fit its positions",
            expected=f"1..{room_B[segment] + 1} tokens in {room_B[segment]} positions",
            got=int(lengths_B[segment]),
            where=f"segment {segment}",
            fix="Pass the number of tokens without padding, and truncate the routes as the tokens",
        )
