"""recipes.minirl: what belongs to which token, and who gets which part."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from recipes.minirl.batch import Batch, Cut, Sample
from routing_replay.routes.shape import MoEShape
from routing_replay.routes.table import RouteTable

SAMPLES = [
    Sample(
        prompt_ids=(5, 6, 7),
        response_ids=(8, 9),
        logp_mu=(-0.5, -0.25),
        reward=1.0,
        support=[[8, 3], [1, 9, 4]],
        top_ids=np.array([[8, 3], [9, 1]]),
        top_logp_mu=np.array([[-0.5, -1.5], [-0.25, -2.5]]),
    ),
    Sample(
        prompt_ids=(4,),
        response_ids=(3, 2, 1),
        logp_mu=(-1.0, -2.0, -3.0),
        support=[[3], [2, 5], [1, 2, 3, 4]],
        top_ids=np.array([[3, 1], [5, 2], [4, 3]]),
        top_logp_mu=np.array([[-1.0, -4.0], [-1.0, -2.0], [-0.5, -1.0]]),
    ),
]


def a_batch(num_sequences=8, multiple=4):
    samples = [SAMPLES[i % 2] for i in range(num_sequences)]
    batch = Batch.from_samples(samples, 2, multiple)
    return replace(batch, advantages_S=torch.arange(num_sequences).float())


def a_cut(**changes):
    sizes = {"data_rank": 0, "data_size": 1, "context_rank": 0, "context_size": 1}
    sizes |= {"minibatch_size": 4, "microbatch_size": 2, "device": torch.device("cpu")}
    return Cut(**(sizes | changes))


def test_labels_mask_and_log_probs_belong_to_the_token_that_is_predicted():
    batch = Batch.from_samples(SAMPLES, 2, multiple=1)
    # 5 tokens: the forward consumes 4 of them; tokens 3 and 4 (values 8 and 9) were sampled.
    assert batch.input_ids_ST[0].tolist() == [5, 6, 7, 8]
    assert batch.labels_ST[0].tolist() == [6, 7, 8, 9]
    assert batch.mask_ST[0].tolist() == [False, False, True, True]
    assert batch.logp_mu_ST[0].tolist() == [0, 0, -0.5, -0.25]
    # 4 tokens: 3 are consumed, the fourth position is padding.
    assert batch.labels_ST[1].tolist() == [3, 2, 1, 0]
    assert batch.mask_ST[1].tolist() == [True, True, True, False]
    assert batch.lengths_S.tolist() == [5, 4]


def test_padding_makes_the_length_a_multiple_and_is_never_replayed():
    batch = a_batch(2, multiple=8)
    assert batch.input_ids_ST.shape == (2, 8)
    # Sequences of 5 and 4 tokens have 4 and 3 rows.
    shape = MoEShape(layers=(0,), num_experts=2, top_k=1)
    table = RouteTable.empty(shape, [4, 3])
    table.covered_T[:] = True
    assert batch.token_rows(table).tolist() == [
        [0, 1, 2, 3, -1, -1, -1, -1],
        [4, 5, 6, -1, -1, -1, -1, -1],
    ]
    assert (batch.token_rows(None) == -1).all()


def test_a_batch_comes_back_from_its_file_as_it_was(tmp_path):
    batch = a_batch()
    batch.save(tmp_path / "batch.safetensors")
    opened = Batch.open(tmp_path / "batch.safetensors")
    for name, value in vars(batch).items():
        assert torch.equal(getattr(opened, name), value), name
    bare = [replace(s, support=None, top_ids=None, top_logp_mu=None) for s in SAMPLES]
    Batch.from_samples(bare, 2, 1).save(tmp_path / "bare.safetensors")
    assert Batch.open(tmp_path / "bare.safetensors").support_ids_N is None


@pytest.mark.parametrize("data_size", [1, 2, 4])
def test_ranks_share_every_minibatch_without_gap_or_overlap(data_size):
    found = [a_cut(data_rank=rank, data_size=data_size).sequences(8) for rank in range(data_size)]
    for minibatch in range(2):
        numbers = sorted(n for plan in found for part in plan[minibatch] for n in part)
        assert numbers == list(range(4 * minibatch, 4 * minibatch + 4))


def test_a_microbatch_is_never_larger_than_the_share_of_its_rank():
    cut = a_cut(data_size=4, microbatch_size=128)
    assert cut.sequences(8) == [[range(0, 1)], [range(4, 5)]]


def test_context_parallel_ranks_hold_two_chunks_each_and_all_positions_together():
    batch = a_batch(4, multiple=4)
    parts = [
        a_cut(context_rank=rank, context_size=2).microbatch(
            batch, range(0, 2), batch.token_rows(None)
        )
        for rank in range(2)
    ]
    # Four chunks of one position: rank 0 holds 0 and 3, rank 1 holds 1 and 2.
    assert parts[0].position_ids_BT.tolist() == [[0, 3], [0, 3]]
    assert parts[1].position_ids_BT.tolist() == [[1, 2], [1, 2]]
    for part in parts:
        for row in range(2):
            expected = batch.input_ids_ST[row, part.position_ids_BT[row]]
            assert torch.equal(part.input_ids_BT[row], expected)
            assert torch.equal(part.mask_BT[row], batch.mask_ST[row, part.position_ids_BT[row]])


def test_every_position_of_a_sequence_carries_its_advantage():
    part = a_cut().microbatch(a_batch(), range(2, 4), a_batch().token_rows(None))
    assert part.advantages_BT.tolist() == [[2.0] * 4, [3.0] * 4]


def test_groups_and_rewards_are_those_of_the_samples():
    batch = a_batch(4)
    assert batch.rewards_S.tolist() == [1.0, 0.0, 1.0, 0.0]
    assert batch.group_S.tolist() == [0, 0, 1, 1]
    assert batch.num_prompts == 2
    assert Batch.from_samples(SAMPLES * 2, 2, 1, num_prompts=5).num_prompts == 5


def test_supports_and_likely_tokens_ride_with_their_positions_under_every_cut():
    batch = a_batch(4, multiple=4)
    # Positions 2 and 3 of the first sequence predict its response, positions 0 to 2 of the second.
    supports = [[[], [], [8, 3], [1, 9, 4]], [[3], [2, 5], [1, 2, 3, 4], []]]
    likely = [[None, None, [8, 3], [9, 1]], [[3, 1], [5, 2], [4, 3], None]]
    for rank, positions in ((0, [0, 3]), (1, [1, 2])):
        part = a_cut(context_rank=rank, context_size=2).microbatch(
            batch, range(0, 2), batch.token_rows(None)
        )
        offsets = part.support.offsets_T1.tolist()
        found = [
            part.support.ids_N[start:stop].tolist()
            for start, stop in zip(offsets, offsets[1:], strict=False)
        ]
        assert found == [supports[row][t] for row in range(2) for t in positions]
        for at, ids in enumerate(likely[row][t] for row in range(2) for t in positions):
            if ids is not None:
                assert part.top_ids_TK[at].tolist() == ids


def test_without_a_sampling_mask_nothing_is_restricted():
    bare = [replace(s, support=None, top_ids=None, top_logp_mu=None) for s in SAMPLES]
    batch = Batch.from_samples(bare, 2, 1)
    part = a_cut(minibatch_size=2).microbatch(batch, range(0, 2), batch.token_rows(None))
    assert part.support is None
    assert part.top_ids_TK is None


@pytest.mark.parametrize("context_size", [1, 2])
def test_dense_values_are_the_reverse_of_the_cut(context_size):
    batch = a_batch(8, multiple=4)
    total_ST = torch.zeros(batch.mask_ST.shape)
    for data_rank in range(2):
        for context_rank in range(context_size):
            cut = a_cut(
                data_rank=data_rank,
                data_size=2,
                context_rank=context_rank,
                context_size=context_size,
                microbatch_size=1,
            )
            # Of the second minibatch alone: sequences 4 to 7.
            parts = [[cut.part(batch.logp_mu_ST, s).flatten() for s in cut.sequences(8)[1]]]
            total_ST += cut.dense(parts, batch.mask_ST.shape, [1])
    assert torch.equal(total_ST[4:], batch.logp_mu_ST[4:])
    assert (total_ST[:4] == 0).all()
