"""Aborted answers: the request for what is missing, and the parts joined to one answer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from ..routes.routes import Routes, concatenate
from .requests import Completion, GenerateRequest

# With these, a token's distribution depends on which tokens before it were sampled, not given.
# Beside each stands the value that has no effect.
OF_A_WHOLE_ANSWER = {
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
    "repetition_penalty": 1.0,
} | dict.fromkeys(("json_schema", "regex", "ebnf", "structural_tag", "stop", "stop_regex"))


def standing(completion: Completion, num_unchecked: int) -> Completion:
    """Return the part of an aborted answer that a continuation can follow.

    SGLang ends an aborted request with its next step, and does not look for a stop token in it. A
    continuation after a stop token would be no answer of the model. The tokens of that step are
    sampled again, which is exact: the abort was decided before them.

    Args:
        completion: The aborted answer.
        num_unchecked: Tokens of a step: 1, or the drafts of a speculative server.
    """
    num_kept = max(0, len(completion.output_ids) - num_unchecked)
    num_dropped = len(completion.output_ids) - num_kept
    routes = completion.routes
    return replace(
        completion,
        output_ids=completion.output_ids[:num_kept],
        mu_logprobs=completion.mu_logprobs[:num_kept],
        routes=None if routes is None else routes[: max(0, routes.num_rows - num_dropped)],
        sampling_mask=_first(completion.sampling_mask, num_kept),
        mask_logprobs=_first(completion.mask_logprobs, num_kept),
        top_ids=_first(completion.top_ids, num_kept),
        top_logprobs=_first(completion.top_logprobs, num_kept),
    )


def rest_of(request: GenerateRequest, completion: Completion) -> GenerateRequest | None:
    """Return the request that continues an aborted answer, or None if there is none.

    The continued answer is distributed as the whole one would have been, so penalties, grammars and
    stop strings, which look at an answer as a whole, cannot be continued. Neither can an answer
    without a token, nor a request without a limit of its own.

    Args:
        request: The whole request.
        completion: What stands of the answer so far.
    """
    num_new, settings = len(completion.output_ids), dict(request.sampling)
    limit = settings.get("max_new_tokens")
    if not num_new or limit is None or limit <= num_new:
        return None
    if any((settings.get(name) or none) != none for name, none in OF_A_WHOLE_ANSWER.items()):
        return None
    settings["max_new_tokens"] = limit - num_new
    if settings.get("min_new_tokens"):
        settings["min_new_tokens"] = max(0, settings["min_new_tokens"] - num_new)
    input_ids = [*request.input_ids, *completion.output_ids]
    # The last token was sampled and not fed: its row comes with the rest.
    start = max(request.start, len(input_ids) - 1)
    return replace(request, input_ids=input_ids, sampling=settings, start=start)


def joined(first: Completion, second: Completion) -> Completion:
    """Return one answer of two parts, the second of which continues the first.

    Tokens, log-probs, masks and rows stand one after another, each as its own pass computed it; a
    row keeps its origin and its weight version.
    """
    if not second.output_ids:
        return replace(first, finish_reason=second.finish_reason, url=second.url)
    return replace(
        second,
        output_ids=[*first.output_ids, *second.output_ids],
        mu_logprobs=np.concatenate([first.mu_logprobs, second.mu_logprobs]),
        routes=_joined_routes(first.routes, second.routes),
        cached_tokens=first.cached_tokens,
        num_retractions=first.num_retractions + second.num_retractions,
        sent_version=first.sent_version,
        sampling_mask=_joined_lists(first.sampling_mask, second.sampling_mask),
        mask_logprobs=_joined_arrays(first.mask_logprobs, second.mask_logprobs),
        top_ids=_joined_arrays(first.top_ids, second.top_ids),
        top_logprobs=_joined_arrays(first.top_logprobs, second.top_logprobs),
    )


def _first(values: Any, count: int) -> Any:
    return None if values is None else values[:count]


def _joined_routes(first: Routes | None, second: Routes | None) -> Routes | None:
    return None if first is None or second is None else concatenate([first, second])


def _joined_lists(
    first: list[list[int]] | None, second: list[list[int]] | None
) -> list[list[int]] | None:
    return None if first is None or second is None else [*first, *second]


def _joined_arrays(first: np.ndarray | None, second: np.ndarray | None) -> np.ndarray | None:
    return None if first is None or second is None else np.concatenate([first, second])
