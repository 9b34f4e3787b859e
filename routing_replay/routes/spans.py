"""Trajectories: training sequences that are stitched from the answers of several requests.

An agent's sequence is made of turns. Each turn is a request of its own, and its prompt repeats what
came before: as it was, re-rendered by a chat template, or compacted. The routing of token t depends
on all tokens up to t. A row of an answer therefore holds for a trajectory where both begin with the
same t + 1 tokens, and nowhere else. That one rule covers turns, branches, resumed generations and
rows that were requested as a delta.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from ..errors import RoutesError
from .origin import Origin, cause_of, num_uncovered
from .routes import Routes, concatenate


@dataclass(frozen=True, kw_only=True, eq=False)
class Sample:
    """One request of an engine and its answer.

    Args:
        prompt_ids: Tokens that the request gave, P of them.
        output_ids: Tokens that the engine sampled, N of them.
        mu_logprobs: float32 [N], log mu of each sampled token. NaN, if None.
        routes: Rows `start` .. P + N - 2 of the request; None if it returned none.
        start: First row of `routes`, above 0 for a delta.

    Raises:
        RoutesError: Log-probs or rows that do not fit the tokens.
    """

    prompt_ids: Sequence[int]
    output_ids: Sequence[int]
    mu_logprobs: np.ndarray | None = None
    routes: Routes | None = None
    start: int = 0
    tokens_T: np.ndarray = field(init=False, repr=False)

    def __post_init__(self) -> None:
        tokens_T = np.array([*self.prompt_ids, *self.output_ids], np.int64)
        object.__setattr__(self, "tokens_T", tokens_T)
        num_outputs = len(self.output_ids)
        if self.mu_logprobs is not None and np.shape(self.mu_logprobs) != (num_outputs,):
            raise RoutesError(
                "the log-probs of a sample do not fit its tokens",
                expected=f"{num_outputs} values",
                got=np.shape(self.mu_logprobs),
            )
        num_rows = 0 if self.routes is None else self.routes.num_rows
        if self.start < 0 or (num_rows and self.start + num_rows >= len(tokens_T)):
            raise RoutesError(
                "the routes of a sample do not fit its tokens",
                expected=f"rows within 0..{len(tokens_T) - 2}",
                got=f"{num_rows} rows from row {self.start}",
                fix="Pass the `start` of the request whose answer this is",
            )

    def shared_length(self, tokens_T: np.ndarray) -> int:
        """Return how many tokens at the beginning are the same."""
        length = min(len(tokens_T), len(self.tokens_T))
        differs_T = tokens_T[:length] != self.tokens_T[:length]
        return int(differs_T.argmax()) if differs_T.any() else length

    def covered(self, num_tokens: int) -> np.ndarray:
        """Return which of the first rows this sample covers: bool [num_tokens]."""
        covered_T = np.zeros(num_tokens, np.bool_)
        if self.routes is not None:
            rows = covered_T[self.start : self.start + self.routes.num_rows]
            rows[:] = self.routes.covered_T[: len(rows)]
        return covered_T


@dataclass(frozen=True, kw_only=True, eq=False)
class Span:
    """Consecutive tokens of a trajectory, with their origin.

    Args:
        sample: Whose tokens these are; None for tokens that no engine was asked about, such as the
            output of a tool.
        part: Of the sample: "prompt" or "output".
        offset: Of the first token within that part.
        length: Number of tokens; up to the end of the part, if None.
        token_ids: The tokens, if there is no sample.

    Raises:
        RoutesError: A range outside the part, or tokens beside a sample.
    """

    sample: Sample | None = None
    part: Literal["prompt", "output"] = "output"
    offset: int = 0
    length: int | None = None
    token_ids: Sequence[int] = ()

    def __post_init__(self) -> None:
        if self.part not in ("prompt", "output"):
            raise RoutesError("the part is unknown", expected="prompt or output", got=self.part)
        if (self.sample is None) == (len(self.token_ids) == 0):
            raise RoutesError(
                "a span has a sample or tokens of its own",
                expected="one of the two",
                got="neither" if self.sample is None else "both",
            )
        part = self._part()
        length = len(part) - self.offset if self.length is None else self.length
        if self.offset < 0 or length < 0 or self.offset + length > len(part):
            raise RoutesError(
                f"a span leaves its {self.part}",
                expected=f"a range within {len(part)} tokens",
                got=f"{length} tokens from offset {self.offset}",
            )
        object.__setattr__(self, "length", length)

    def _part(self) -> Sequence[int]:
        if self.sample is None:
            return self.token_ids
        return self.sample.prompt_ids if self.part == "prompt" else self.sample.output_ids

    @property
    def num_tokens(self) -> int:
        assert self.length is not None
        return self.length

    @property
    def position(self) -> int:
        """Position of the first token in the request's whole sequence."""
        is_output = self.sample is not None and self.part == "output"
        return self.offset + (len(self.sample.prompt_ids) if self.sample and is_output else 0)

    def tokens(self) -> Sequence[int]:
        return self._part()[self.offset : self.offset + self.num_tokens]


@dataclass(frozen=True, kw_only=True, eq=False)
class Trajectory:
    """A training sequence of T tokens with the routes and log-probs of the requests that made it.

    Args:
        tokens_T: int64.
        routes: T - 1 rows. Each row keeps the weight version under which it was computed, or the
            cause why it is not covered (`routes.origin_T`).
        is_sampled_T: bool, an engine sampled the token.
        is_own_context_T: bool, the engine sampled the token after the tokens that precede it here.
            Elsewhere `mu_logprobs_T` is the log-prob in another context.
        mu_logprobs_T: float32, log mu of each sampled token; NaN for the others.
    """

    tokens_T: np.ndarray
    routes: Routes
    is_sampled_T: np.ndarray
    is_own_context_T: np.ndarray
    mu_logprobs_T: np.ndarray

    @classmethod
    def from_spans(cls, spans: Sequence[Span], earlier: Sequence[Sample] = ()) -> Trajectory:
        """Stitch a trajectory together.

        A row comes from the span's own request. Where that one has none, it comes from the first
        other request that was given the same tokens up to there: the last token of an answer and
        the output of a tool have their rows in the prefill of the next turn.

        Args:
            spans: In the order of the sequence.
            earlier: Further requests that hold rows, such as those before a delta.

        Raises:
            RoutesError: A gap or an overlap between spans, samples of different models, no sample
                with routes.
        """
        tokens_T = np.array([token for span in spans for token in span.tokens()], np.int64)
        starts = np.cumsum([0] + [span.num_tokens for span in spans])[:-1].tolist()
        samples = _unique([*(span.sample for span in spans), *earlier])
        shared = {sample: sample.shared_length(tokens_T) for sample in samples}
        _check_continuity(spans, starts, shared)
        routes = _gather(samples, _sources(spans, starts, shared, len(tokens_T))[:-1])
        causes_T = _causes(spans, starts, shared, len(tokens_T))[:-1]
        origin_T = np.where(routes.covered_T, routes.origin_T, causes_T)
        return cls(
            tokens_T=tokens_T,
            routes=replace(routes, origin_T=origin_T),
            **_sampled_columns(spans, starts, shared, len(tokens_T)),
        )

    def num_uncovered(self) -> Mapping[str, int]:
        """Return how many rows are not covered, by cause; the last token has no row."""
        return num_uncovered([self.routes])


def num_known_rows(samples: Sequence[Sample], token_ids: Sequence[int]) -> int:
    """Return how many rows at the beginning of a prompt some samples cover without a gap.

    A request for the prompt needs the rows from there on (`GenerateRequest.start`).
    """
    tokens_T = np.asarray(token_ids, np.int64)
    covered_T = np.zeros(len(tokens_T) + 1, np.bool_)
    for sample in samples:
        shared = sample.shared_length(tokens_T)
        covered_T[:shared] |= sample.covered(shared)
    return int(covered_T.argmin())


def _unique(samples: Sequence[Sample | None]) -> list[Sample]:
    return list(dict.fromkeys(sample for sample in samples if sample is not None))


def _check_continuity(
    spans: Sequence[Span], starts: Sequence[int], shared: Mapping[Sample, int]
) -> None:
    """Raise where a span neither continues the trajectory nor its own sample's previous span."""
    previous: Span | None = None
    for number, (span, start) in enumerate(zip(spans, starts, strict=True)):
        expected = None
        # An answer that repeats the tokens which its prompt lacks is no overlap, only short of
        # context.
        is_late = span.position > start or span.part == "prompt"
        if span.sample is not None and shared[span.sample] >= start and is_late:
            expected = start
        elif previous is not None and span.sample is previous.sample is not None:
            expected = previous.position + previous.num_tokens
        if expected is not None and span.position != expected:
            what = "a gap" if span.position > expected else "an overlap"
            raise RoutesError(
                f"the spans leave {what} of {abs(span.position - expected)} tokens",
                expected=f"position {expected} of the request",
                got=f"position {span.position}",
                where=f"span {number}, token {start} of the trajectory",
                fix="Add a span for the tokens between; tokens that no engine saw get "
                "Span(token_ids=...)",
            )
        previous = span


def _causes(
    spans: Sequence[Span], starts: Sequence[int], shared: Mapping[Sample, int], num_tokens: int
) -> np.ndarray:
    """Why each token's own request does not cover its row, as if none did: uint8 of `Origin`."""
    causes_T = np.full(num_tokens, Origin.INJECTED, np.uint8)
    for span, start in zip(spans, starts, strict=True):
        if span.sample is None:
            continue
        sample, end = span.sample, start + span.num_tokens
        causes_T[start:end] = Origin.NOT_CAPTURED
        if sample.routes is not None:
            low, high = max(start, sample.start), min(end, sample.start + sample.routes.num_rows)
            rows = slice(low - sample.start, max(low, high) - sample.start)
            engine_T = cause_of(sample.routes.covered_T[rows], sample.routes.origin_T[rows])
            causes_T[low : max(low, high)] = engine_T
        if span.position + span.num_tokens == len(sample.tokens_T):
            causes_T[end - 1] = Origin.NOT_FED
        causes_T[max(start, min(end, shared[sample])) : end] = Origin.OTHER_CONTEXT
    return causes_T


def _sources(
    spans: Sequence[Span],
    starts: Sequence[int],
    shared: Mapping[Sample, int],
    num_tokens: int,
) -> np.ndarray:
    """For each token its row among the rows of all samples, in their order; -1 for none."""
    source_T = np.full(num_tokens, -1, np.int64)
    own: dict[Sample, np.ndarray] = {sample: np.zeros(num_tokens, np.bool_) for sample in shared}
    for span, start in zip(spans, starts, strict=True):
        if span.sample is not None:
            own[span.sample][start : start + span.num_tokens] = True
    candidates, first_row = [], 0
    for sample, num_shared in shared.items():
        usable_T = sample.covered(num_tokens)
        usable_T[num_shared:] = False
        candidates.append((usable_T, first_row - sample.start, own[sample]))
        first_row += 0 if sample.routes is None else sample.routes.num_rows
    for is_own_pass in (True, False):
        for usable_T, shift, own_T in candidates:
            rows = np.flatnonzero(usable_T & (source_T < 0) & (own_T | (not is_own_pass)))
            source_T[rows] = rows + shift
    # The last token of a trajectory has no row, even if a request went on from it.
    source_T[-1:] = -1
    return source_T


def _gather(samples: Sequence[Sample], source_T: np.ndarray) -> Routes:
    """The rows of all samples at `source_T`; uncovered where it is -1."""
    parts = [s.routes for s in samples if s.routes is not None and s.routes.num_rows]
    if not parts:
        raise RoutesError(
            "no sample of the trajectory has routes",
            expected="routes in one sample or more",
            got=f"{len(samples)} samples without",
            fix="Ask for a capture level in the requests",
        )
    return concatenate(parts).take(source_T)


def _sampled_columns(
    spans: Sequence[Span], starts: Sequence[int], shared: Mapping[Sample, int], num_tokens: int
) -> dict[str, np.ndarray]:
    """The columns that say which tokens were sampled, and with which log-probs."""
    is_sampled_T = np.zeros(num_tokens, np.bool_)
    is_own_context_T = np.zeros(num_tokens, np.bool_)
    mu_logprobs_T = np.full(num_tokens, np.nan, np.float32)
    for span, start in zip(spans, starts, strict=True):
        if span.sample is None or span.part != "output":
            continue
        end = start + span.num_tokens
        is_sampled_T[start:end] = True
        # Token t was sampled after tokens 0 .. t - 1: it may itself be the first that differs.
        if span.position == start:
            is_own_context_T[start : min(end, shared[span.sample] + 1)] = True
        if span.sample.mu_logprobs is not None:
            values = span.sample.mu_logprobs[span.offset : span.offset + span.num_tokens]
            mu_logprobs_T[start:end] = values
    return {
        "is_sampled_T": is_sampled_T,
        "is_own_context_T": is_own_context_T,
        "mu_logprobs_T": mu_logprobs_T,
    }
