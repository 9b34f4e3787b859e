"""`token_rows` of a context-parallel rank are those that Megatron's own slicing would keep."""

import inspect

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from recipes.model import cpu  # noqa: F401  (makes Megatron importable)
from routing_replay.routes.shape import MoEShape
from routing_replay.routes.table import RouteTable

# isort: split
from megatron.core.utils import get_batch_on_this_cp_rank


def sliced_by_megatron(token_rows, rank, size):
    """Megatron's part of a batch for one rank; a fake process group knows rank and size only."""
    dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())
    try:
        batch = {"tokens": token_rows, "cu_seqlens": None}
        sliced = get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=dist.group.WORLD)
        return sliced["tokens"]
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(
    "is_hybrid_cp" not in inspect.signature(get_batch_on_this_cp_rank).parameters,
    reason="this Megatron slices with another signature",
)
@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_padded_batch_is_sliced_as_megatron_slices_it(size):
    table = RouteTable.empty(MoEShape(layers=(0,), num_experts=4, top_k=1), [11, 7])
    table.covered_T[:] = np.arange(16) != 3
    whole = table.token_rows([11, 7], width=12)
    assert (whole >= 0).sum() == 15
    for rank in range(size):
        part = table.token_rows([11, 7], width=12, context=(rank, size))
        assert torch.equal(part, sliced_by_megatron(whole, rank, size))
