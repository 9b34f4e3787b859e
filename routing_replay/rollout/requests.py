"""One rollout request and its answer, in the form of SGLang's `/generate`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..capture import CAPTURES, OURS, REQUEST_KEY
from ..errors import ServerError, unknown_name
from ..routes.payload import FIELD, decode, encode, to_base64
from ..routes.routes import Routes
from ..routes.shape import MoEShape

ABORT = "abort"
SENT_VERSION = "sent_weight_version"  # ours: of stored answers
# Fields of an answer with one item for each sampled token.
PER_TOKEN = (
    *("output_token_logprobs", "output_top_logprobs"),
    *("output_token_sampling_mask", "output_token_sampling_logprobs"),
)


@dataclass(frozen=True, kw_only=True)
class GenerateRequest:
    """A prompt to continue.

    Args:
        input_ids: Prompt tokens (and, when a partial rollout is resumed, those sampled so far).
        sampling: SGLang's sampling parameters: temperature, top_p, max_new_tokens, ... (its
            `SamplingParams`).
        capture: "off", "stock", "ids", "weights", "gates" or "logits"; the server's level bounds
            it.
        start: First row of the routes to return: a later turn needs only what is new.
        wants_sampling_mask: Also return the tokens that top-p and top-k left to choose from
            (SGLang >= 0.5.20; it asks for a finite top_k, at most its
            --sampling-mask-max-tokens).
        num_top_logprobs: Also return this many of the most likely tokens at each position.
        priority: Of what waits the greater goes first: in the client, and in the queue of a server
            that was started with --enable-priority-scheduling.
    """

    input_ids: Sequence[int]
    sampling: Mapping[str, Any] = field(default_factory=dict)
    capture: str = "ids"
    start: int = 0
    wants_sampling_mask: bool = False
    num_top_logprobs: int = 0
    priority: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the body of the request."""
        fields = request_fields(self.capture, self.start)
        custom = fields.pop("custom_params", None)
        sampling = dict(self.sampling) | ({"custom_params": custom} if custom else {})
        extra: dict[str, Any] = {}
        if self.wants_sampling_mask:
            extra["return_sampling_mask"] = True
        if self.num_top_logprobs:
            extra["top_logprobs_num"] = self.num_top_logprobs
        if self.priority is not None:
            extra["priority"] = self.priority
        return {
            "input_ids": [int(token) for token in self.input_ids],
            "sampling_params": sampling,
            "return_logprob": True,
            **extra,
            **fields,
        }


@dataclass(frozen=True, kw_only=True, eq=False)
class Completion:
    """What the server sampled.

    Args:
        output_ids: The n sampled tokens.
        mu_logprobs: float32 [n], the log-probability of each sampled token under mu: log softmax of
            (logits / temperature) over the WHOLE vocabulary. Temperature is in it, top-p, top-k
            and min-p are not: SGLang applies those afterwards, to the probabilities it samples
            from. A greedy request (temperature 0) has them at temperature 1. (A server started
            with SGLANG_RETURN_ORIGINAL_LOGPROB leaves the temperature out as well.)
        routes: Rows `start` .. prompt + n - 2; None if they were not requested.
        finish_reason: "stop", "length" or "abort".
        weight_version: Of the last token, as the server reports it.
        sent_version: Of the weights that had been published when the request was sent: no token is
            of older ones; -1: none had been.
        cached_tokens: Prompt tokens that came from the prefix cache.
        num_retractions: How often the request lost its place and was prefilled again.
        sampling_mask: For each sampled token the tokens that could be sampled, if requested.
        mask_logprobs: float32 [n], the log-probability of the sampled token within that mask
            (after top-p and top-k), if requested.
        top_ids, top_logprobs: int64 and float32 [n, K], mu's most likely tokens at each position
            and their log-probs, as `mu_logprobs` over the whole vocabulary; if requested.
        url: The server that answered.
    """

    output_ids: list[int]
    mu_logprobs: np.ndarray
    routes: Routes | None
    finish_reason: str
    weight_version: str
    cached_tokens: int
    num_retractions: int
    sampling_mask: list[list[int]] | None = None
    mask_logprobs: np.ndarray | None = None
    top_ids: np.ndarray | None = None
    top_logprobs: np.ndarray | None = None
    url: str = ""
    sent_version: int = -1


def request_fields(capture: str = "ids", start: int = 0) -> dict[str, Any]:
    """Return the fields that ask for routes.

    Add them to the body of an OpenAI request as they are. In a body for `/generate`, move
    "custom_params" into "sampling_params" (`GenerateRequest.to_json` does).

    Args:
        capture: "off", "stock" (SGLang's payload), or "ids", "weights", "gates", "logits" (ours).
        start: The first row to return.

    Raises:
        ConfigError: An unknown level.
    """
    if capture not in CAPTURES:
        raise unknown_name("capture level", capture, CAPTURES)
    if capture == "off":
        return {}
    fields: dict[str, Any] = {"return_routed_experts": True, "routed_experts_start_len": start}
    if capture in OURS:
        fields["custom_params"] = {REQUEST_KEY: capture}
    return fields


def completion_of(
    answer: Mapping[str, Any], request: GenerateRequest, url: str, model: MoEShape | None
) -> Completion:
    """Return the completion in one answer of `/generate`.

    Args:
        answer: The JSON of the answer.
        request: The request that it answers.
        url: The server, for errors.
        model: As for `RolloutClient`.

    Raises:
        ServerError: The answer lacks a part of the request.
        PayloadError, RoutesError: Its routes are missing, damaged, or of another model.
    """
    meta_info = answer.get("meta_info") if isinstance(answer, Mapping) else None
    if isinstance(meta_info, Mapping):
        meta_info = _without_lost_tokens(meta_info, request)
    logprobs = meta_info.get("output_token_logprobs") if isinstance(meta_info, Mapping) else None
    if meta_info is None or logprobs is None:
        raise ServerError(
            "the answer has no log-probs",
            expected="meta_info.output_token_logprobs",
            got=_keys(meta_info if meta_info is not None else answer),
            where=url,
            fix="A gateway before the server may drop fields: probe() tells",
        )
    output_ids = [int(token) for _, token, *_ in logprobs]
    num_tokens = len(request.input_ids) + len(output_ids)
    mask_logprobs = meta_info.get("output_token_sampling_logprobs")
    top_ids, top_logprobs = _top_of(meta_info, request, url)
    return Completion(
        output_ids=output_ids,
        mu_logprobs=np.array([value for value, *_ in logprobs], np.float32),
        routes=_routes_of(meta_info, request, num_tokens, model, url),
        finish_reason=_finish_reason(meta_info),
        weight_version=str(meta_info.get("weight_version", "")),
        cached_tokens=int(meta_info.get("cached_tokens") or 0),
        num_retractions=int(meta_info.get("num_retractions") or 0),
        sampling_mask=meta_info.get("output_token_sampling_mask"),
        mask_logprobs=None if mask_logprobs is None else np.array(mask_logprobs, np.float32),
        top_ids=top_ids,
        top_logprobs=top_logprobs,
        url=url,
        sent_version=int(meta_info.get(SENT_VERSION, -1)),
    )


def _finish_reason(meta_info: Mapping[str, Any]) -> str:
    return str((meta_info.get("finish_reason") or {}).get("type", ""))


def _without_lost_tokens(
    meta_info: Mapping[str, Any], request: GenerateRequest
) -> Mapping[str, Any]:
    """Leave out the tokens of a request that was aborted while it waited to run again.

    SGLang answers for a retracted request without its rows, and with a part of its tokens.
    """
    has_rows = request.capture == "off" or meta_info.get(FIELD) is not None
    if has_rows or _finish_reason(meta_info) != ABORT:
        return meta_info
    return {n: [] if n in PER_TOKEN and v is not None else v for n, v in meta_info.items()}


def answer_of(completion: Completion, start: int) -> dict[str, Any]:
    """Return the answer of `/generate` that `completion_of` reads as this completion.

    Args:
        completion: To store or to send; a continued answer becomes one whole answer.
        start: Of its request.
    """
    logprobs = zip(completion.mu_logprobs.tolist(), completion.output_ids, strict=True)
    meta_info: dict[str, Any] = {
        "output_token_logprobs": list(logprobs),
        "finish_reason": {"type": completion.finish_reason},
        "weight_version": completion.weight_version,
        "cached_tokens": completion.cached_tokens,
        "num_retractions": completion.num_retractions,
        SENT_VERSION: completion.sent_version,
        "output_token_sampling_mask": completion.sampling_mask,
    }
    if completion.mask_logprobs is not None:
        meta_info["output_token_sampling_logprobs"] = completion.mask_logprobs.tolist()
    if completion.top_ids is not None and completion.top_logprobs is not None:
        rows = zip(completion.top_logprobs.tolist(), completion.top_ids.tolist(), strict=True)
        meta_info["output_top_logprobs"] = [list(zip(*row, strict=True)) for row in rows]
    if completion.routes is not None:
        meta_info[FIELD] = to_base64(encode(completion.routes, start=start))
    return {"meta_info": meta_info}


def _top_of(
    meta_info: Mapping[str, Any], request: GenerateRequest, url: str
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Return ids and log-probs [n, K] of the most likely tokens, if requested."""
    if not request.num_top_logprobs:
        return None, None
    rows = meta_info.get("output_top_logprobs")
    shape = (len(meta_info["output_token_logprobs"]), request.num_top_logprobs)
    if rows is None or len(rows) != shape[0] or any(len(row) != shape[1] for row in rows):
        raise ServerError(
            "the answer lacks the most likely tokens",
            expected=f"meta_info.output_top_logprobs, {shape[1]} of each of {shape[0]} positions",
            got=_keys(meta_info) if rows is None else [len(row) for row in rows][:8],
            where=url,
            fix="Ask for no more than the vocabulary has",
        )
    ids = np.array([[token for _, token, *_ in row] for row in rows], np.int64)
    values = np.array([[value for value, *_ in row] for row in rows], np.float32)
    return ids.reshape(shape), values.reshape(shape)


def _routes_of(
    meta_info: Mapping[str, Any],
    request: GenerateRequest,
    num_tokens: int,
    model: MoEShape | None,
    url: str,
) -> Routes | None:
    # An aborted request that never ran has sampled nothing; there is nothing to replay either.
    has_none = meta_info.get(FIELD) is None and not meta_info.get("output_token_logprobs")
    if request.capture == "off" or has_none:
        return None
    routes = decode(
        meta_info,
        num_tokens=num_tokens,
        shape=model,
        start=min(request.start, num_tokens - 1),
        accept_stock=request.capture == "stock",
    )
    # Gates only measure; without weights a job would replay something else than it was told to.
    if request.capture == "weights" and routes.combine_weights_TLK is None:
        raise ServerError(
            "the answer has no combine weights",
            expected="a weight for each selected expert",
            got="ids alone",
            where=url,
            fix="Start the server with the capture level weights (ROUTING_REPLAY_CAPTURE=weights); "
            "a router inside a kernel of the model's own reports none",
        )
    return routes


def _keys(answer: object) -> str:
    return ", ".join(sorted(answer)) if isinstance(answer, Mapping) else type(answer).__name__
