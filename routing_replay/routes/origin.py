"""Which forward pass a row comes from, or why none is known, and the bound on unknown rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import IntEnum
from typing import Protocol

import numpy as np

from ..errors import RoutesError


class Origin(IntEnum):
    """The forward pass of the engine that produced a row; from EVICTED on, why it is not covered.

    An uncovered row of ABSENT was never captured, and nobody can say why.
    """

    ABSENT = 0
    PREFILL = 1
    DECODE = 2
    EVICTED = 3  # the cache brought the prefix back from a place that keeps no rows
    SPECULATIVE = 4  # of a verified draft whose acceptance the capture did not see
    RETRACTED = 5  # computed twice, and the engine does not say which pass the row is of
    ABORTED = 6  # the request ended before its prefill was complete
    STALE = 7  # of older weights than were asked for
    INJECTED = 8  # no request was given this token in this context
    NOT_FED = 9  # the last token of an answer, which no later request continued
    OTHER_CONTEXT = 10  # the request saw other tokens before this one
    NOT_CAPTURED = 11  # outside the rows that the request returned
    TRANSFERRED = 12  # another server computed its keys and values, and has the row


COVERED = (Origin.PREFILL, Origin.DECODE)
# Uncovered because the caller wanted it so: these rows do not count against a bound.
INTENDED = (Origin.STALE, Origin.INJECTED, Origin.NOT_FED)


class Rows(Protocol):
    """Rows with their origins: the routes of a sequence, or a table."""

    @property
    def covered_T(self) -> np.ndarray: ...

    @property
    def origin_T(self) -> np.ndarray: ...


def is_covered(origin_T: np.ndarray) -> np.ndarray:
    """Return whether rows of these origins are covered, bool [T]."""
    prefill, decode = COVERED
    return np.asarray((origin_T == prefill) | (origin_T == decode))


def cause_of(covered_T: np.ndarray, origin_T: np.ndarray) -> np.ndarray:
    """Return the origins, with ABSENT for uncovered rows that name a forward pass; uint8 [T]."""
    causes_T = np.where(~covered_T & is_covered(origin_T), Origin.ABSENT, origin_T)
    return causes_T.astype(np.uint8)


def num_uncovered(parts: Iterable[Rows]) -> dict[str, int]:
    """Return how many rows are not covered, by the name of their cause in lower case."""
    counts = np.zeros(len(Origin), np.int64)
    for rows in parts:
        uncovered_T = ~rows.covered_T
        causes_T = cause_of(rows.covered_T, rows.origin_T)[uncovered_T]
        counts += np.bincount(causes_T, minlength=len(Origin))
    return {origin.name.lower(): int(counts[origin]) for origin in Origin if counts[origin]}


def require_covered(
    parts: Iterable[Rows], max_uncovered: float, where: object = None
) -> dict[str, float]:
    """Return the fractions of uncovered rows by cause; raise where too many are not covered.

    Args:
        parts: Routes of sequences, or tables.
        max_uncovered: Largest fraction of all rows that may be uncovered. Rows that the caller left
            uncovered on purpose (`INTENDED`) do not count.
        where: What the error names.

    Raises:
        RoutesError: More rows are uncovered; it names the causes.
    """
    parts = list(parts)
    num_rows = sum(len(rows.covered_T) for rows in parts)
    return require_few_uncovered(num_uncovered(parts), num_rows, max_uncovered, where)


def require_few_uncovered(
    counts: Mapping[str, int], num_rows: int, max_uncovered: float, where: object = None
) -> dict[str, float]:
    """Do as `require_covered`, from counts of uncovered rows by cause, of `num_rows` rows."""
    intended = {origin.name.lower() for origin in INTENDED}
    lost = {cause: count for cause, count in counts.items() if cause not in intended}
    if sum(lost.values()) > max_uncovered * num_rows:
        causes = ", ".join(f"{cause} {count}" for cause, count in lost.items())
        raise RoutesError(
            "too many rows are not covered by routes",
            expected=f"at most {max_uncovered:.2%} of {num_rows} rows",
            got=f"{sum(lost.values()) / num_rows:.2%}: {causes}",
            where=where,
            fix="docs/capture.md says what each cause means; or raise max_uncovered",
        )
    return {cause: count / num_rows for cause, count in counts.items()}
