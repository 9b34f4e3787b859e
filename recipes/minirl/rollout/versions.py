"""Which weights sampled: of each token, of a response, of a step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from routing_replay.rollout import Completion

from .batch import Sample

UNKNOWN = -1


def token_versions(completion: Completion) -> np.ndarray:
    """Return the version of the weights that sampled each token; -1 of a server that has none.

    A row has the version of the forward that predicted the next token. Without rows, or of rows
    without a version, it is the one that the request was sent under: no token is older.

    Returns:
        int64, one for each sampled token.
    """
    version = completion.weight_version
    sent = completion.sent_version
    if sent == UNKNOWN and version.isdigit():
        sent = int(version)
    count, routes = len(completion.output_ids), completion.routes
    if routes is None or routes.num_rows < count:
        return np.full(count, sent)
    versions_N = routes.weight_version_T[routes.num_rows - count :].astype(np.int64)
    return np.where(versions_N == UNKNOWN, sent, versions_N)


def num_old_context(sample: Sample) -> int:
    """Return how many sampled tokens follow rows of older weights; 0 without rows.

    After an update in place they attended to keys and values of those weights.
    """
    if sample.routes is None:
        return 0
    versions_T = sample.routes.weight_version_T
    known_T = np.where(versions_T == UNKNOWN, np.iinfo(versions_T.dtype).max, versions_T)
    is_old_T = versions_T > np.minimum.accumulate(known_T)
    return int(is_old_T[sample.predicts_sampled_T[: len(is_old_T)]].sum())


def version_metrics(
    samples: Sequence[Sample], weight_version: int, is_in_place: bool
) -> dict[str, float]:
    """Describe by how many versions a step's responses are older than the weights trained on them.

    Args:
        samples: The step's.
        weight_version: Of the trained weights.
        is_in_place: Responses went on through updates with the keys and values that they had.
    """
    known = [s.versions for s in samples if s.versions is not None and s.weight_version != UNKNOWN]
    lags = [weight_version - int(versions_N.min()) for versions_N in known] or [0]
    mixed = [versions_N.min() != versions_N.max() for versions_N in known] or [False]
    metrics = {
        "rollout/version_lag": float(np.mean(lags)),
        "rollout/version_lag_max": float(max(lags)),
        "rollout/mixed_version_fraction": float(np.mean(mixed)),
    }
    if is_in_place:
        num_tokens = sum(len(sample.logp_mu) for sample in samples)
        num_old = sum(sample.num_old_context for sample in samples)
        metrics["rollout/old_context_fraction"] = num_old / max(1, num_tokens)
    return metrics
