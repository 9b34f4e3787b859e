"""What the engine says of sampled tokens: log-probs, masks, versions; of one answer or several."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from routing_replay.errors import DataError, ServerError
from routing_replay.rollout import Completion, GenerateRequest

from .versions import token_versions

FINISHED = ("stop", "length")


def check_finished(completion: Completion) -> None:
    """Raise DataError for an answer that ended otherwise than by itself or by its length."""
    if completion.finish_reason not in FINISHED:
        raise DataError(
            "a response is not finished",
            expected=" or ".join(FINISHED),
            got=completion.finish_reason,
            where=completion.url,
            fix="The server's log says why; a sampling mask needs top_k within its "
            "--sampling-mask-max-tokens",
        )


def sampled_logprobs(request: GenerateRequest, completion: Completion) -> dict[str, Any]:
    """Return log mu of the sampled and of the most likely tokens, and versions: fields of Sample.

    Under a sampling mask the distribution is renormalised over the mask and is 0 outside.

    Raises:
        ServerError: The mask is missing.
    """
    scores: dict[str, Any] = {
        "logp_mu": completion.mu_logprobs,
        "top_ids": completion.top_ids,
        "top_logp_mu": completion.top_logprobs,
        "versions": token_versions(completion),
    }
    if not request.wants_sampling_mask:
        return scores
    if completion.sampling_mask is None or completion.mask_logprobs is None:
        raise ServerError(
            "the answer has no sampling mask",
            expected="meta_info.output_token_sampling_mask and output_token_sampling_logprobs",
            where=completion.url,
            fix="SGLang 0.5.20 and later return it; or train with --no-keep-sampling-mask",
        )
    scores["logp_mu"] = completion.mask_logprobs
    scores["support"] = completion.sampling_mask
    log_mass_T = completion.mu_logprobs - completion.mask_logprobs
    scores["support_mass"] = float(np.exp(log_mass_T).mean())
    if completion.top_ids is not None:
        pairs = zip(completion.top_ids, completion.sampling_mask, strict=True)
        inside_TK = np.array([np.isin(ids, mask) for ids, mask in pairs])
        within_TK = completion.top_logprobs - log_mass_T[:, None]
        scores["top_logp_mu"] = np.where(inside_TK, within_TK, -np.inf).astype(np.float32)
    return scores


def joined(scores: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Join the scores of a response's answers, whose tokens follow one another."""
    whole: dict[str, Any] = dict(scores[0])
    for later in scores[1:]:
        for name, values in later.items():
            if isinstance(values, np.ndarray):
                whole[name] = np.concatenate([whole[name], values])
            elif name != "support_mass" and values is not None:
                whole[name] = [*whole[name], *values]
    if "support_mass" in whole:
        lengths = [len(one["logp_mu"]) for one in scores]
        masses = [one["support_mass"] for one in scores]
        whole["support_mass"] = float(np.average(masses, weights=lengths))
    return whole
