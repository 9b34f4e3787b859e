"""`token_rows` against a token-by-token oracle, in every layout; and what it refuses."""

import itertools

import numpy as np
import oracles
import pytest
import torch

from routing_replay.errors import TableError
from routing_replay.routes.routes import Routes
from routing_replay.routes.table import RouteTable
from routing_replay.routes.token_rows import context_positions

LENGTHS = (9, 5, 12, 1)  # tokens; the table holds one row less of each


@pytest.fixture(scope="module")
def table():
    """Rows 0..7, 8..11, 12..22 and none; row 10 and the first two of sequence 2 are uncovered."""
    sequences = []
    for length in LENGTHS:
        ids_TLK = np.zeros((length - 1, 1, 1), np.uint8)
        sequences.append(Routes(expert_ids_TLK=ids_TLK, layers=(0,), num_experts=4))
    table = RouteTable.from_routes(sequences)
    table.covered_T[[10, 12, 13]] = False
    return table


def test_a_padded_batch_by_hand(table):
    assert table.token_rows(LENGTHS[:2], width=10).tolist() == [
        [0, 1, 2, 3, 4, 5, 6, 7, -1, -1],  # 9 tokens: 8 rows, the last token, one of padding
        [8, 9, -1, 11, -1, -1, -1, -1, -1, -1],  # row 10 is not covered
    ]


def test_a_packed_batch_by_hand(table):
    # Sequence 1 in five positions and three of alignment padding, then an empty one, then 3.
    sequences = torch.tensor([1, -1, 3], dtype=torch.int32)
    rows_T = table.token_rows([5, 1, 1], cu_seqlens=[0, 8, 8, 10], sequences=sequences)
    assert rows_T.tolist() == [8, 9, -1, 11, -1, -1, -1, -1, -1, -1]


def test_context_slices_by_hand(table):
    # Width 8, two ranks, chunks of two: rank 0 holds 0 1 and 6 7, rank 1 holds 2 3 4 5.
    part = [table.token_rows([9], width=8, context=(rank, 2)).tolist() for rank in (0, 1)]
    assert part == [[[0, 1, 6, 7]], [[2, 3, 4, 5]]]


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("sequences", list(itertools.permutations(range(4), 3))[::3] + [(2, -1, 0)])
def test_every_layout_agrees_with_the_oracle(table, size, sequences):
    lengths = [LENGTHS[s] for s in sequences]
    for rank in range(size):
        width = -(-12 // (2 * size)) * 2 * size
        padded = table.token_rows(lengths, width=width, sequences=sequences, context=(rank, size))
        batch = [(s, n, width) for s, n in zip(sequences, lengths, strict=True)]
        assert padded.dtype == torch.int64 and padded.shape == (3, width // size)
        assert padded.flatten().tolist() == oracles.token_rows(table, batch, rank, size)

        rooms = [-(-n // (2 * size)) * 2 * size for n in lengths]
        cu_seqlens = torch.tensor([0, *rooms]).cumsum(0).int()
        packed = table.token_rows(
            torch.tensor(lengths), cu_seqlens=cu_seqlens, sequences=sequences, context=(rank, size)
        )
        batch = list(zip(sequences, lengths, rooms, strict=True))
        assert packed.tolist() == oracles.token_rows(table, batch, rank, size)


def test_the_ranks_of_a_context_group_hold_every_position_once():
    bounds = [0, 16, 16, 40]
    held = np.concatenate([context_positions(bounds, rank, 4) for rank in range(4)])
    assert sorted(held) == list(range(40))


def test_megatron_slices_a_padded_batch_alike(table):
    """The index of `_get_batch_on_this_cp_rank_per_sequence_balancing`, as Megatron computes it."""
    whole = table.token_rows(LENGTHS[:3], width=12)
    for rank in range(3):
        chunks = whole.view(3, 6, 2)[:, [rank, 6 - rank - 1]]
        part = table.token_rows(LENGTHS[:3], width=12, context=(rank, 3))
        assert torch.equal(part, chunks.reshape(3, -1))


def test_transformer_engine_slices_a_packed_batch_alike():
    """The formula of its `thd_partition_indices_kernel`, one token of a rank at a time."""
    bounds, size = np.array([0, 8, 24, 24, 28]), 2
    for rank in range(size):
        local, index = bounds // size, []
        for token in range(local[-1]):
            segment = int(np.searchsorted(local, token, side="right")) - 1
            half = (local[segment + 1] - local[segment]) // 2
            within = token - local[segment]
            offset = rank if within < half else 2 * (size - 1) - rank
            index.append(within + local[segment] * size + half * offset)
        assert context_positions(bounds, rank, size).tolist() == index


def test_the_width_is_the_longest_length_unless_told(table):
    assert table.token_rows(LENGTHS[:2]).shape == (2, 9)
    assert table.token_rows([], width=4).shape == (0, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lengths": [9], "width": 7}, r"does not fit its positions; expected 1..8 tokens in 7"),
        ({"lengths": [0], "width": 7}, r"does not fit its positions.*got 0 \[segment 0\]"),
        ({"lengths": [8], "width": 8}, "more rows than tokens that were fed to the model"),
        ({"lengths": [9, 5], "cu_seqlens": [0, 9]}, r"of different numbers.*got 2, 2, 2"),
        ({"lengths": [9], "sequences": [0, 1]}, r"of different numbers.*got 1, 2, 2"),
        ({"lengths": [9], "cu_seqlens": [1, 10]}, r"do not ascend from 0; got \[1, 10\]"),
        ({"lengths": [1, 1], "cu_seqlens": [0, 4, 2]}, "do not ascend from 0"),
        ({"lengths": [9.0]}, "the lengths are not one line of integers; got float64"),
        ({"lengths": [[9]]}, r"the lengths are not one line of integers; got int64 \(1, 1\)"),
        ({"lengths": [9], "sequences": [4]}, r"no such sequence; expected 0..3; got 4 \[memory\]"),
        ({"lengths": [9], "width": 9, "context": (0, 2)}, "a multiple of 2 x 2 positions; got 9"),
        ({"lengths": [9], "width": 12, "context": (2, 2)}, r"a rank in 0..1; got 2"),
        (
            {"lengths": [9], "width": 12, "cu_seqlens": [0, 12]},
            "is padded or packed",
        ),
        ({"lengths": [9], "context": (0, 0)}, "rank is outside its group"),
    ],
)
def test_layouts_that_cannot_be_are_refused(table, arguments, message):
    with pytest.raises(TableError, match=message):
        table.token_rows(**arguments)
