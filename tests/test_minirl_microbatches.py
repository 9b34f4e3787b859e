"""recipes.minirl.policy.microbatches: who computes which tokens, padded and packed."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from padded_batches import padded
from test_minirl_batch import SAMPLES, a_batch

from recipes.minirl.policy.microbatches import Sharding, balanced_packs
from recipes.minirl.policy.scoring import Scorer
from recipes.minirl.rollout.batch import Batch, Sample
from routing_replay import objectives
from routing_replay.objectives import Denominators
from routing_replay.objectives.logprobs import Support
from routing_replay.routes.shape import MoEShape
from routing_replay.routes.table import RouteTable

# 9 to 1 positions: the lengths in tokens are one more.
LENGTHS_S = torch.arange(10, 2, -1)


def sharding(**changes):
    return Sharding(**{"minibatch_size": 4, "microbatch_size": 2} | changes)


def long_batch():
    """Eight sequences of 8 to 1 responses, whose tokens and log-probs are all different."""
    samples = [
        Sample(
            prompt_ids=(100 + i,),
            response_ids=tuple(range(10 * i, 10 * i + 8 - i)),
            logp_mu=tuple(-1 - i - t / 10 for t in range(8 - i)),
            support=[range(10 * i + t, 10 * i + 2 * t + 1) for t in range(8 - i)],
            top_ids=np.arange(2 * (8 - i)).reshape(-1, 2) + i,
            top_logp_mu=-np.arange(2.0 * (8 - i)).reshape(-1, 2) - i,
        )
        for i in range(8)
    ]
    batch = Batch.from_samples(samples, 2)
    return replace(batch, advantages_S=torch.arange(8.0) - 3)


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
    batch = long_batch()
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
    batch = long_batch()
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
    batch = a_batch(4)
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
        for values_BT, values_N in (
            (part.input_ids_BT, batch.input_ids_N),
            (part.mask_BT, batch.mask_N),
        ):
            expected_T = padded(batch, values_N, 4)[rows_T, positions_T]
            assert torch.equal(values_BT.flatten(), expected_T)
    if tokens:
        assert parts[1].bounds.tolist() == [0, 4, 8]  # over both ranks


def test_every_position_of_a_sequence_carries_its_advantage():
    part = sharding().microbatch(a_batch(), (2, 3), None)
    assert part.advantages_BT.tolist() == [[2.0] * 4, [3.0] * 4]


def test_supports_and_likely_tokens_ride_with_their_positions_under_every_sharding():
    batch = a_batch(4)
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
    batch = Batch.from_samples(bare, 2)
    part = sharding(minibatch_size=2).microbatch(batch, (0, 1), None)
    assert part.support is None
    assert part.top_ids_TK is None


@pytest.mark.parametrize("tokens", [0, 8])
@pytest.mark.parametrize("context_size", [1, 2])
def test_scattered_values_are_the_reverse_of_the_gathered_ones(context_size, tokens):
    batch = long_batch()
    total_N = torch.zeros(len(batch.mask_N))
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
                s: share.grid(batch.lengths_S, s).take(batch.logp_mu_N).flatten()
                for s in share.plan(batch.lengths_S)[1]
            }
            total_N += share.scatter(values, batch)
    first, second = batch.positions(0, 4), batch.positions(4, 8)
    assert (batch.logp_mu_N[second] != 0).all()
    assert torch.equal(total_N[second], batch.logp_mu_N[second])
    assert (total_N[first] == 0).all()


@pytest.mark.parametrize("tokens", [0, 24])
@pytest.mark.parametrize("context_size", [1, 2])
def test_rows_of_routes_are_laid_out_as_the_tokens(tokens, context_size):
    batch = long_batch()
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
            grid, rows_N = own.grid(batch.lengths_S, sequences), batch.token_rows(table)
            # 0 is a row, so that padding is told apart.
            assert part.token_rows_BT.equal(grid.take(rows_N + 1) - 1)
            assert (part.token_rows_BT >= 0).any()
            assert (own.microbatch(batch, sequences, None).token_rows_BT == -1).all()


LAYOUTS = pytest.mark.parametrize(
    ("tokens", "context_size"), [(0, 1), (0, 2), (32, 1), (32, 2)], ids=str
)


def shares(tokens, context_size):
    """The context-parallel ranks' ways to lay out a microbatch."""
    return [
        sharding(
            multiple=2 * context_size,
            microbatch_tokens=tokens,
            context_rank=rank,
            context_size=context_size,
        )
        for rank in range(context_size)
    ]


def naive(share, batch, sequences):
    """A microbatch of rectangles [S, 16]: every cell by its sequence and its position."""
    part = share.microbatch(batch, sequences, None)
    rows_BT = torch.tensor(sequences)[part.index_T].view(part.position_ids_BT.shape)
    cells = rows_BT, part.position_ids_BT

    def of(values_N):
        return padded(batch, values_N, 16)[cells]

    starts_T, counts_T = (
        of(values_N).flatten()
        for values_N in (batch.support_offsets_N1[:-1], batch.support_offsets_N1.diff())
    )
    supports = [
        batch.support_ids_C[start : start + count].long()
        for start, count in zip(starts_T.tolist(), counts_T.tolist(), strict=True)
    ]
    return replace(
        part,
        input_ids_BT=of(batch.input_ids_N),
        labels_BT=of(batch.labels_N),
        mask_BT=of(batch.mask_N),
        host_mask_BT=of(batch.mask_N),
        logp_mu_BT=of(batch.logp_mu_N),
        advantages_BT=batch.advantages_S[rows_BT],
        support=Support(
            ids_N=torch.cat(supports),
            offsets_T1=torch.tensor([0, *counts_T.tolist()]).cumsum(0),
        ),
        top_ids_TK=of(batch.top_ids_NK).flatten(0, 1).long(),
        top_logp_mu_TK=of(batch.top_logp_mu_NK).flatten(0, 1),
    )


@LAYOUTS
def test_a_microbatch_is_bitwise_that_of_padded_columns(tokens, context_size):
    batch = long_batch()
    for share in shares(tokens, context_size):
        for sequences in ((0, 3, 7), (6, 1), (5,)):
            part, expected = (
                share.microbatch(batch, sequences, None),
                naive(share, batch, sequences),
            )
            for name, values in vars(expected).items():
                if isinstance(values, torch.Tensor):
                    assert torch.equal(getattr(part, name), values), name
            assert torch.equal(part.support.ids_N, expected.support.ids_N)
            assert torch.equal(part.support.offsets_T1, expected.support.offsets_T1)
        # 8, 5 and 1 positions: under every layout some cells are padding.
        assert not share.microbatch(batch, (0, 3, 7), None).mask_BT.all()


@LAYOUTS
@pytest.mark.parametrize("name", ["minirl", "kl_cov", "dppo_topk"])
def test_losses_and_gradients_are_bitwise_those_of_padded_columns(tokens, context_size, name):
    batch, sequences = long_batch(), (1, 4, 6)
    scorer, objective = Scorer(temperature=0.7), objectives.get(name)
    denominators = Denominators(num_sequences=3, num_tokens=12, max_length=8)
    generator = torch.Generator().manual_seed(0)
    old_N = batch.logp_mu_N + 0.1 * torch.randn(len(batch.mask_N), generator=generator)
    penalised_N = torch.rand(len(batch.mask_N), generator=generator) < 0.5
    for share in shares(tokens, context_size):
        part, expected = share.microbatch(batch, sequences, None), naive(share, batch, sequences)
        grid = share.grid(batch.lengths_S, sequences)
        rows_BT = torch.tensor(sequences)[grid.index_BT]
        constants = {"logp_old_T": old_N}
        if name == "kl_cov":
            constants["penalised_T"] = penalised_N
        flat = {n: grid.take(v).flatten() for n, v in constants.items()}
        rectangles = {
            n: padded(batch, v, 16)[rows_BT, grid.position_BT].flatten()
            for n, v in constants.items()
        }
        logits_BTV = torch.randn(*part.input_ids_BT.shape, 120, generator=generator)
        results = []
        for m in (replace(part, fixed=flat), replace(expected, fixed=rectangles)):
            leaf = logits_BTV.clone().requires_grad_()
            # Leaves are not overwritten: the scorer reuses the logits that it is given.
            inputs = scorer.loss_inputs(m, leaf.clone(), denominators)
            outputs = objective(inputs)
            outputs.loss.backward()
            results.append((inputs.logp_theta_T, outputs.loss, leaf.grad))
        assert results[0][2].abs().sum() > 0
        for ours, theirs in zip(*results, strict=True):
            assert torch.equal(ours, theirs)
