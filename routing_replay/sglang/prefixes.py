"""Names of prefixes: which tokens a shared row was computed for.

A slot changes hands in more ways than the capture can see: a host cache, a storage backend or
another server's transfer fills it without a forward pass. So a row carries a hash of all tokens up
to its own, and a request takes another request's row only if that is the hash of its own tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

# The attribute of SGLang's requests that holds the hashes of their tokens.
ATTRIBUTE = "routing_replay_prefixes"
UNNAMED = 0
# splitmix64 (Steele, Lea, Flood, OOPSLA 2014): every bit of a hash depends on every bit of a token.
STEP, FIRST, SECOND = (
    np.uint64(c) for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)


def prefix_hashes(token_ids: Sequence[int], start: int = 0, before: int = 0) -> np.ndarray:
    """Return for each token the hash of all tokens up to it, uint64 [T].

    The hash is a sum of hashes of (position, token): one pass of numpy, and a list of tokens can
    be continued. Two prefixes share one by chance in 2^64.

    Args:
        token_ids: T tokens, the first of them at position `start`.
        start: Number of tokens before them.
        before: Hash of the tokens before them, or a seed.
    """
    tokens_T = np.array(token_ids, np.int64).view(np.uint64)
    position_T = np.arange(start + 1, start + 1 + len(tokens_T), dtype=np.uint64)
    mixed_T = tokens_T ^ (position_T * STEP)
    for shift, factor in ((30, FIRST), (27, SECOND)):
        mixed_T = (mixed_T ^ (mixed_T >> np.uint64(shift))) * factor
    mixed_T ^= mixed_T >> np.uint64(31)
    return np.cumsum(mixed_T, dtype=np.uint64) + np.uint64(before)


def of_request(req: Any) -> np.ndarray:
    """Return the hashes of a request's prompt and of its output so far; kept with the request."""
    known_T: np.ndarray | None = getattr(req, ATTRIBUTE, None)
    if known_T is None:
        # Equal tokens under another adapter or another salt are another prefix.
        seed = hash(getattr(req, "extra_key", None)) % 2**64
        known_T = prefix_hashes(req.origin_input_ids, before=seed)
    num_output = len(known_T) - len(req.origin_input_ids)
    if num_output < len(req.output_ids):
        before = int(known_T[-1]) if len(known_T) else 0
        new_T = prefix_hashes(req.output_ids[num_output:], len(known_T), before)
        known_T = np.concatenate([known_T, new_T])
    setattr(req, ATTRIBUTE, known_T)
    return known_T
