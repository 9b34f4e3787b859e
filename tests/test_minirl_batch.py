"""recipes.minirl.rollout.batch: what belongs to which token."""

from dataclasses import replace

import numpy as np
import torch

from recipes.minirl.rollout.batch import BATCH_FILE, Batch, Sample
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
    table = RouteTable.empty(shape, [5, 4])
    table.covered_T[:] = True
    assert batch.token_rows(table).tolist() == [
        [0, 1, 2, 3, -1, -1, -1, -1],
        [4, 5, 6, -1, -1, -1, -1, -1],
    ]


def test_a_batch_comes_back_from_its_file_as_it_was(tmp_path):
    batch = a_batch()
    batch.save(tmp_path / "batch.safetensors")
    opened = Batch.open(tmp_path / "batch.safetensors")
    for name, value in vars(batch).items():
        assert torch.equal(getattr(opened, name), value), name
    bare = [replace(s, support=None, top_ids=None, top_logp_mu=None) for s in SAMPLES]
    Batch.from_samples(bare, 2, 1).save(tmp_path / "bare.safetensors")
    assert Batch.open(tmp_path / "bare.safetensors").support_ids_N is None


def test_groups_and_rewards_are_those_of_the_samples():
    batch = a_batch(4)
    assert batch.rewards_S.tolist() == [1.0, 0.0, 1.0, 0.0]
    assert batch.group_S.tolist() == [0, 0, 1, 1]
    assert batch.num_prompts == 2
    assert Batch.from_samples(SAMPLES * 2, 2, 1, num_prompts=5).num_prompts == 5


def test_the_lag_of_a_response_counts_the_versions_since_its_weights(tmp_path):
    versions = [4, 3, -1, 5]
    samples = [
        replace(SAMPLES[n % 2], weight_version=version) for n, version in enumerate(versions)
    ]
    Batch.from_samples(samples, 2, multiple=1).save(tmp_path / BATCH_FILE)
    batch = Batch.open(tmp_path / BATCH_FILE)
    assert batch.version_S.tolist() == versions
    assert batch.lag_S(5).tolist() == [1, 2, 0, 0]
