"""Context parallelism with contiguous slices, beside Megatron's zigzag ones.

Stock Megatron numbers the positions of a context rank's tokens in zigzag order only. A trainer that
slices sequences contiguously brings its own rotary embedding and attention mask; `slices(True)` is
such a trainer's part. Replay knows nothing of it: rows ride with the tokens.
"""

import contextlib
from unittest import mock

import numpy as np
import torch

from routing_replay.routes.token_rows import context_positions


def positions(rank, ranks, length, is_contiguous):
    """Positions of a sequence that one context rank holds, in local order; int64."""
    if is_contiguous:
        return np.arange(length).reshape(ranks, -1)[rank]
    return context_positions([0, length], rank, ranks)


@contextlib.contextmanager
def slices(is_contiguous):
    """Within: the local model's attention and rotary embedding expect such slices."""
    from megatron.core.models.common.embeddings import rope_utils, rotary_pos_embedding

    from recipes.model import local_modules

    if not is_contiguous:
        yield
        return
    with (
        mock.patch.object(local_modules, "zigzag_positions", _attention_positions),
        mock.patch.object(rotary_pos_embedding, "get_pos_emb_on_this_cp_rank", _padded_angles),
        mock.patch.object(rope_utils, "_get_thd_freqs_on_this_cp_rank", _packed_angles),
    ):
        yield


def _attention_positions(rank, ranks, length, device=None):
    return rank * length + torch.arange(length, device=device)


def _padded_angles(angles, seq_dim, cp_group):
    return angles.chunk(cp_group.size(), dim=seq_dim)[cp_group.rank()]


def _packed_angles(cp_rank, cp_size, x, angles, offset=0):
    start = offset + cp_rank * x.size(0)
    return angles[start : start + x.size(0)]
