"""Rows of a batch by its tokens, for training loops that pass no sample numbers on.

A sequence of a table is identified by the tokens that were fed to the model. The longest prefix of
a segment that is such a sequence gives the segment's rows; what follows it (padding) routes live.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np

from ..errors import TableError
from ..routes.table import RouteTable

# An odd multiplier of a polynomial hash modulo 2**64 (the golden ratio's fraction). A hit is always
# compared token by token, so its quality decides the speed only.
BASE = np.uint64(0x9E3779B97F4A7C15)


class ContentIndex:
    """The sequences of a table by their tokens.

    Sequences with equal tokens (a group that repeats a short answer) cannot be told apart. Rows on
    which their routes agree are used; the others route live and are counted.

    Args:
        table: Routes of the sequences.
        token_ids_T: The token that each row's forward consumed, any integer type.

    Attributes:
        num_ambiguous: Rows so far that route live because equal sequences disagree about them.

    Raises:
        TableError: Not one token for each row.
    """

    def __init__(self, table: RouteTable, token_ids_T: np.ndarray):
        token_ids_T = np.asarray(token_ids_T)
        if token_ids_T.shape != (table.num_rows,):
            raise TableError(
                "the token ids do not match the rows of the table",
                expected=f"one token for each of {table.num_rows} rows",
                got=list(token_ids_T.shape),
                where=table.where,
                fix="Save the tokens that were fed to the model: all but the last of each sequence",
            )
        self.table = table
        self.num_ambiguous = 0
        self._token_ids_T = token_ids_T.astype(np.int64)
        self._equal: dict[tuple[int, int], list[list[int]]] = defaultdict(list)
        self._rows: dict[int, np.ndarray] = {}
        for sequence in range(table.num_sequences):
            self._add(sequence)
        self._hashes = np.array([h for h, _ in self._equal], np.uint64)

    def rows(self, token_ids_BS: np.ndarray, cu_seqlens: Sequence[int] | None = None) -> np.ndarray:
        """Return `token_rows` of a microbatch.

        Args:
            token_ids_BS: Fed tokens [b, s], whole sequences (before any context-parallel slicing).
            cu_seqlens: Starts and end of the packed segments of one row, padding included; None if
                each row of the batch is one segment.

        Returns:
            int64 [b, s]; -1 routes live.
        """
        rows_BS = np.full(token_ids_BS.shape, -1, np.int64)
        for row, start, stop in _segments(token_ids_BS.shape, cu_seqlens):
            found_T = self._segment_rows(token_ids_BS[row, start:stop].astype(np.int64))
            rows_BS[row, start : start + len(found_T)] = found_T
        return rows_BS

    def sequence_of(self, fed_T: np.ndarray) -> int | None:
        """Return the first sequence of the table that consumed exactly these tokens, or None."""
        fed_T = np.asarray(fed_T).astype(np.int64)
        if not len(fed_T):
            return None
        for group in self._equal.get((int(prefix_hashes(fed_T)[-1]), len(fed_T)), ()):
            if np.array_equal(self._tokens(group[0]), fed_T):
                return group[0]
        return None

    def _add(self, sequence: int) -> None:
        tokens_T = self._tokens(sequence)
        if not len(tokens_T):
            return
        groups = self._equal[int(prefix_hashes(tokens_T)[-1]), len(tokens_T)]
        for group in groups:
            if np.array_equal(self._tokens(group[0]), tokens_T):
                group.append(sequence)
                return
        groups.append([sequence])

    def _segment_rows(self, tokens_T: np.ndarray) -> np.ndarray:
        """Rows of the longest prefix that is a sequence of the table; empty if there is none."""
        hashes_T = prefix_hashes(tokens_T)
        for stop in np.flatnonzero(np.isin(hashes_T, self._hashes))[::-1] + 1:
            for group in self._equal.get((int(hashes_T[stop - 1]), int(stop)), ()):
                if np.array_equal(self._tokens(group[0]), tokens_T[:stop]):
                    return self._group_rows(group)
        return np.empty(0, np.int64)

    def _group_rows(self, group: list[int]) -> np.ndarray:
        first = group[0]
        if first not in self._rows:
            self._rows[first] = self._agreed_rows(group)
        rows_T = self._rows[first]
        covered_T = self.table.covered_T[self._slice(first)]
        self.num_ambiguous += int(np.count_nonzero(covered_T & (rows_T < 0)))
        return rows_T

    def _agreed_rows(self, group: list[int]) -> np.ndarray:
        first = self._slice(group[0])
        agreed_T = np.array(self.table.covered_T[first])
        ids_LTK = np.sort(self.table.expert_ids_LTK[:, first], axis=-1)
        for sequence in group[1:]:
            other = self._slice(sequence)
            same_LT = (np.sort(self.table.expert_ids_LTK[:, other], axis=-1) == ids_LTK).all(-1)
            agreed_T &= self.table.covered_T[other] & same_LT.all(0)
        return np.where(agreed_T, np.arange(first.start, first.stop), -1)

    def _tokens(self, sequence: int) -> np.ndarray:
        return self._token_ids_T[self._slice(sequence)]

    def _slice(self, sequence: int) -> slice:
        start, stop = self.table.offsets_S1[sequence : sequence + 2]
        return slice(int(start), int(stop))


def prefix_hashes(tokens_T: np.ndarray) -> np.ndarray:
    """Return the hash of every prefix, uint64 [T]: sum of (token_i + 1) * BASE**(i+1) mod 2**64."""
    with np.errstate(over="ignore"):
        powers_T = np.cumprod(np.full(len(tokens_T), BASE))
        return np.cumsum((tokens_T.astype(np.uint64) + np.uint64(1)) * powers_T)


def _segments(
    shape: tuple[int, ...], cu_seqlens: Sequence[int] | None
) -> Iterator[tuple[int, int, int]]:
    """(row, start, stop) of every segment."""
    num_rows, length = shape
    if cu_seqlens is None:
        yield from ((row, 0, length) for row in range(num_rows))
        return
    bounds = [int(bound) for bound in cu_seqlens]
    if num_rows != 1 or bounds[0] != 0 or bounds[-1] > length or sorted(bounds) != bounds:
        raise TableError(
            "cu_seqlens do not describe the packed tokens",
            expected=f"ascending from 0 to at most {length}, for one row of tokens",
            got=f"{bounds[0]}..{bounds[-1]} for tokens of shape {list(shape)}",
        )
    yield from ((0, start, stop) for start, stop in zip(bounds[:-1], bounds[1:], strict=True))
