"""recipes.minirl.policy.microbatches: who computes which tokens, padded and packed."""

from dataclasses import replace

import pytest
import torch
from test_minirl_batch import SAMPLES, a_batch

from recipes.minirl.policy.microbatches import Sharding, balanced_packs
from recipes.minirl.rollout.batch import Batch, Sample
from routing_replay.routes.shape import MoEShape
from routing_replay.routes.table import RouteTable

# 9 to 1 positions: the lengths in tokens are one more.
LENGTHS_S = torch.arange(10, 2, -1)


def sharding(**changes):
    return Sharding(**{"minibatch_size": 4, "microbatch_size": 2} | changes)


def long_batch(multiple=4):
    """Eight sequences of 8 to 1 responses, whose tokens and log-probs are all different."""
    samples = [
        Sample(
            prompt_ids=(100 + i,),
            response_ids=tuple(range(10 * i, 10 * i + 8 - i)),
            logp_mu=tuple(-1 - i - t / 10 for t in range(8 - i)),
        )
        for i in range(8)
    ]
    return Batch.from_samples(samples, 2, multiple)


@pytest.mark.parametrize("tokens", [0, 16])
@pytest.mark.parametrize("data_size", [1, 2, 4])
def test_ranks_share_every_minibatch_without_gap_or_overlap(data_size, tokens):
    plans = [
        sharding(data_rank=rank, data_size=data_size, microbatch_tokens=tokens).plan(LENGTHS_S)
        for rank in range(data_size)
    ]
    for minibatch in range(2):
        numbers = sorted(n for plan in plans for part in plan[minibatch] for n in part)
        assert numbers == list(range(4 * minibatch, 4 * minibatch + 4))
        # Experts are spread over data-parallel ranks, which therefore run in step.
        assert len({len(plan[minibatch]) for plan in plans}) == 1


def test_a_microbatch_is_never_larger_than_the_share_of_its_rank():
    plan = sharding(data_size=4, microbatch_size=128).plan(LENGTHS_S)
    assert plan == [[(0,)], [(4,)]]


def test_a_padded_microbatch_is_as_long_as_its_own_longest_sequence():
    batch = long_batch(multiple=2)
    parts = [sharding(multiple=2).microbatch(batch, (s, s + 1), None) for s in (0, 2, 6)]
    # Sequence i has 8 - i positions; the longest of the step has 8.
    assert [part.input_ids_BT.shape for part in parts] == [(2, 8), (2, 6), (2, 2)]


def test_packs_keep_the_token_budget_and_are_balanced():
    # Sequences 0..3 have 9, 8, 7, 6 positions: two packs of 15, which is the least that two can be.
    assert sharding(microbatch_tokens=16).plan(LENGTHS_S)[0] == [(0, 3), (1, 2)]
    # 14 tokens are not enough for two packs, three must do: 9, 8, 7 + 6.
    assert sharding(microbatch_tokens=14).plan(LENGTHS_S)[0] == [(0,), (1,), (2, 3)]
    assert sharding(microbatch_tokens=100).plan(LENGTHS_S)[0] == [(0, 1, 2, 3)]


def test_a_sequence_beyond_the_budget_stands_alone():
    assert sharding(microbatch_tokens=1).plan(LENGTHS_S)[0] == [(0,), (1,), (2,), (3,)]


def test_packs_are_never_empty():
    assert balanced_packs([3, 3, 3], range(3), 3) == [(0,), (1,), (2,)]


def test_packed_sequences_follow_each_other_with_their_own_positions():
    batch = long_batch(multiple=1)
    part = sharding(microbatch_tokens=16).microbatch(batch, (4, 6, 7), None)
    # Sequences 4, 6, 7 have 4, 2, 1 positions.
    assert part.position_ids_BT.tolist() == [[0, 1, 2, 3, 0, 1, 0]]
    assert part.index_T.tolist() == [0, 0, 0, 0, 1, 1, 2]
    assert part.bounds.tolist() == [0, 4, 6, 7]
    assert part.packed_lengths == (4, 2, 1)
    assert part.labels_BT.tolist() == [[40, 41, 42, 43, 60, 61, 70]]
    assert part.mask_BT.all()


def test_a_long_tail_costs_hardly_any_padding_when_packed():
    # Response lengths of a log-normal with mean 6,500, cut at 16,000; 4 ranks of 512 sequences.
    generator = torch.Generator().manual_seed(0)
    lengths_S = torch.randn(512, generator=generator).mul(0.7).exp().mul(5200).long()
    lengths_S = lengths_S.clamp(16, 16_000)
    shared = {"minibatch_size": 512, "data_size": 4, "multiple": 2, "microbatch_tokens": 32_768}
    packs = [p for r in range(4) for p in Sharding(data_rank=r, **shared).plan(lengths_S)[0]]
    grid_tokens = [sum(Sharding(**shared).grid(lengths_S, pack).lengths) for pack in packs]
    assert sum(grid_tokens) / int((lengths_S - 1).sum()) < 1.001
    # The ranks wait for each other at every layer: the slowest counts.
    assert max(grid_tokens) * len(packs) / int((lengths_S - 1).sum()) < 1.05
    assert max(grid_tokens) <= 32_768


@pytest.mark.parametrize("tokens", [0, 8])
def test_context_parallel_ranks_hold_two_chunks_each_and_all_positions_together(tokens):
    batch = a_batch(4, multiple=4)
    parts = [
        sharding(
            context_rank=rank, context_size=2, multiple=4, microbatch_tokens=tokens
        ).microbatch(batch, (0, 1), None)
        for rank in range(2)
    ]
    # Four chunks of one position: rank 0 holds 0 and 3, rank 1 holds 1 and 2.
    assert parts[0].position_ids_BT.flatten().tolist() == [0, 3, 0, 3]
    assert parts[1].position_ids_BT.flatten().tolist() == [1, 2, 1, 2]
    for part in parts:
        positions_T, rows_T = part.position_ids_BT.flatten(), torch.tensor([0, 0, 1, 1])
        assert part.index_T.tolist() == rows_T.tolist()
        assert torch.equal(part.input_ids_BT.flatten(), batch.input_ids_ST[rows_T, positions_T])
        assert torch.equal(part.mask_BT.flatten(), batch.mask_ST[rows_T, positions_T])
    if tokens:
        assert parts[1].bounds.tolist() == [0, 4, 8]  # over both ranks


def test_every_position_of_a_sequence_carries_its_advantage():
    part = sharding().microbatch(a_batch(), (2, 3), None)
    assert part.advantages_BT.tolist() == [[2.0] * 4, [3.0] * 4]


def test_supports_and_likely_tokens_ride_with_their_positions_under_every_sharding():
    batch = a_batch(4, multiple=4)
    # Positions 2 and 3 of the first sequence predict its response, positions 0 to 2 of the second.
    supports = [[[], [], [8, 3], [1, 9, 4]], [[3], [2, 5], [1, 2, 3, 4], []]]
    likely = [[None, None, [8, 3], [9, 1]], [[3, 1], [5, 2], [4, 3], None]]
    for rank, positions in ((0, [0, 3]), (1, [1, 2])):
        part = sharding(context_rank=rank, context_size=2, multiple=4).microbatch(
            batch, (0, 1), None
        )
        offsets = part.support.offsets_T1.tolist()
        ids = [
            part.support.ids_N[start:stop].tolist()
            for start, stop in zip(offsets, offsets[1:], strict=False)
        ]
        assert ids == [supports[row][t] for row in range(2) for t in positions]
        for index, expected in enumerate(likely[row][t] for row in range(2) for t in positions):
            if expected is not None:
                assert part.top_ids_TK[index].tolist() == expected


def test_without_a_sampling_mask_nothing_is_restricted():
    bare = [replace(s, support=None, top_ids=None, top_logp_mu=None) for s in SAMPLES]
    batch = Batch.from_samples(bare, 2, 1)
    part = sharding(minibatch_size=2).microbatch(batch, (0, 1), None)
    assert part.support is None
    assert part.top_ids_TK is None


@pytest.mark.parametrize("tokens", [0, 8])
@pytest.mark.parametrize("context_size", [1, 2])
def test_scattered_values_are_the_reverse_of_the_gathered_ones(context_size, tokens):
    batch = long_batch(multiple=4)
    total_ST = torch.zeros(batch.mask_ST.shape)
    for data_rank in range(2):
        for context_rank in range(context_size):
            share = sharding(
                data_rank=data_rank,
                data_size=2,
                context_rank=context_rank,
                context_size=context_size,
                microbatch_size=1,
                microbatch_tokens=tokens,
                multiple=4,
            )
            # Of the second minibatch alone: sequences 4 to 7.
            values = {
                s: share.grid(batch.lengths_S, s).take(batch.logp_mu_ST).flatten()
                for s in share.plan(batch.lengths_S)[1]
            }
            total_ST += share.scatter(values, batch)
    assert (batch.logp_mu_ST[4:] != 0).any(1).all()
    assert torch.equal(total_ST[4:], batch.logp_mu_ST[4:])
    assert (total_ST[:4] == 0).all()


@pytest.mark.parametrize("tokens", [0, 24])
@pytest.mark.parametrize("context_size", [1, 2])
def test_rows_of_routes_are_laid_out_as_the_tokens(tokens, context_size):
    batch = long_batch(multiple=2 * context_size)
    shape = MoEShape(layers=(0,), num_experts=2, top_k=1)
    table = RouteTable.empty(shape, batch.lengths_S.numpy())
    table.covered_T[:] = torch.arange(table.num_rows) % 5 != 1
    for rank in range(context_size):
        own = sharding(
            multiple=2 * context_size,
            microbatch_tokens=tokens,
            context_rank=rank,
            context_size=context_size,
        )
        for sequences in ((0, 3, 7), (6, 1)):
            part = own.microbatch(batch, sequences, table)
            grid = own.grid(batch.lengths_S, sequences)
            assert part.token_rows_BT.equal(grid.take(batch.token_rows(table)))
            assert (part.token_rows_BT >= 0).any()
            assert (own.microbatch(batch, sequences, None).token_rows_BT == -1).all()
