"""A conversation: its requests ask only for rows that no earlier answer holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..routes.spans import Sample, Span, Trajectory, num_known_rows
from .requests import Completion, GenerateRequest


def sample_of(request: GenerateRequest, completion: Completion) -> Sample:
    """Return a request and its answer as a part of trajectories."""
    has_routes = completion.routes is not None
    return Sample(
        prompt_ids=list(request.input_ids),
        output_ids=completion.output_ids,
        mu_logprobs=completion.mu_logprobs,
        routes=completion.routes,
        start=min(request.start, _last_row(request, completion)) if has_routes else 0,
    )


def _last_row(request: GenerateRequest, completion: Completion) -> int:
    return len(request.input_ids) + len(completion.output_ids) - 1


class Conversation:
    """The requests of one agent: turns, branches of one prefix, resumed generations.

    The bytes of routes that travel grow with the new tokens of a turn, not with its prompt.
    """

    def __init__(self) -> None:
        self.samples: list[Sample] = []

    def request(
        self,
        input_ids: Sequence[int],
        sampling: Mapping[str, Any],
        capture: str = "ids",
        **options: Any,
    ) -> GenerateRequest:
        """Return the request for the rows of a prompt, and its answer, that are not known yet.

        Args:
            input_ids: The whole prompt, earlier turns included.
            sampling, capture, options: As for `GenerateRequest`.
        """
        start = num_known_rows(self.samples, input_ids)
        return GenerateRequest(
            input_ids=input_ids, sampling=sampling, capture=capture, start=start, **options
        )

    def add(self, request: GenerateRequest, completion: Completion) -> Sample:
        """Keep an answer, and return it as a part of trajectories."""
        self.samples.append(sample_of(request, completion))
        return self.samples[-1]

    def trajectory(self, spans: Sequence[Span]) -> Trajectory:
        """Return the trajectory of some spans, with rows from every answer of the conversation.

        Raises:
            RoutesError: As `Trajectory.from_spans`.
        """
        return Trajectory.from_spans(spans, earlier=self.samples)
