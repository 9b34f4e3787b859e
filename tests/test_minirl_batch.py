"""recipes.minirl.rollout.batch: what belongs to which token."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from recipes.minirl.rollout.batch import BATCH_FILE, Batch, Sample
from routing_replay.errors import DataError
from routing_replay.routes.batch import RolloutBatch
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


def a_batch(num_sequences=8):
    samples = [SAMPLES[i % 2] for i in range(num_sequences)]
    batch = Batch.from_samples(samples, 2)
    return replace(batch, advantages_S=torch.arange(num_sequences).float())


def test_labels_mask_and_log_probs_belong_to_the_token_that_is_predicted():
    batch = Batch.from_samples(SAMPLES, 2)
    # 5 tokens: the forward consumes 4 of them; tokens 3 and 4 (values 8 and 9) were sampled.
    # 4 tokens: 3 are consumed, and predict the response.
    assert batch.input_ids_N.tolist() == [5, 6, 7, 8] + [4, 3, 2]
    assert batch.labels_N.tolist() == [6, 7, 8, 9] + [3, 2, 1]
    assert batch.mask_N.tolist() == [False, False, True, True] + [True, True, True]
    assert batch.logp_mu_N.tolist() == [0, 0, -0.5, -0.25] + [-1, -2, -3]
    assert batch.lengths_S.tolist() == [5, 4]
    assert batch.bounds_S1.tolist() == [0, 4, 7]
    assert batch.sequence_N.tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert batch.num_sampled_S.tolist() == [2, 3]
    # The support and the likely tokens of the same positions.
    assert batch.support_ids_C.tolist() == [8, 3, 1, 9, 4, 3, 2, 5, 1, 2, 3, 4]
    assert batch.support_offsets_N1.tolist() == [0, 0, 0, 2, 5, 6, 8, 12]
    assert batch.top_ids_NK.tolist() == [[0, 0], [0, 0], [8, 3], [9, 1], [3, 1], [5, 2], [4, 3]]


def test_each_position_has_the_row_of_its_token_and_an_uncovered_one_none():
    # Sequences of 5 and 4 tokens have 4 and 3 rows; the last tokens have neither row nor position.
    shape = MoEShape(layers=(0,), num_experts=2, top_k=1)
    table = RouteTable.empty(shape, [5, 4])
    table.covered_T[:] = [True, True, False, True, True, True, True]
    assert a_batch(2).token_rows(table).tolist() == [0, 1, -1, 3, 4, 5, 6]


def test_a_long_sequence_does_not_lengthen_the_others(tmp_path):
    long = replace(SAMPLES[0], response_ids=(9,) * 1000, logp_mu=(-1.0,) * 1000)
    samples = [replace(s, support=None, top_ids=None) for s in [long] + [SAMPLES[1]] * 63]
    batch = Batch.from_samples(samples, 1)
    batch.save(tmp_path / BATCH_FILE)
    # 1,002 positions and 63 times 3, of 8 + 8 + 1 + 4 + 4 bytes; 64 times 1,002 would take 1.3 MB.
    assert len(batch.mask_N) == 1002 + 63 * 3
    assert (tmp_path / BATCH_FILE).stat().st_size < 1191 * 25 + 5000


def test_a_batch_comes_back_from_its_file_as_it_was(tmp_path):
    batch = a_batch()
    batch.save(tmp_path / "batch.safetensors")
    opened = Batch.open(tmp_path / "batch.safetensors")
    for name, value in vars(batch).items():
        assert torch.equal(getattr(opened, name), value), name
    bare = [replace(s, support=None, top_ids=None, top_logp_mu=None) for s in SAMPLES]
    Batch.from_samples(bare, 2).save(tmp_path / "bare.safetensors")
    assert Batch.open(tmp_path / "bare.safetensors").support_ids_C is None


def test_a_padded_batch_of_an_older_version_is_refused_by_every_reader(tmp_path):
    old = {f"{name}_ST": torch.zeros(2, 4) for name in ("input_ids", "labels", "mask", "logp_mu")}
    save_file(old | {"lengths_S": torch.tensor([5, 4])}, tmp_path / BATCH_FILE)
    for kind in (Batch, RolloutBatch):
        with pytest.raises(DataError, match=r"is padded, as older versions.*Take a batch that"):
            kind.open(tmp_path / BATCH_FILE)
    (tmp_path / BATCH_FILE).write_bytes(b"x")
    with pytest.raises(DataError, match="the batch cannot be read"):
        Batch.open(tmp_path / BATCH_FILE)


def test_a_batch_with_columns_of_another_version_is_refused(tmp_path):
    a_batch(2).save(tmp_path / BATCH_FILE)
    columns = load_file(tmp_path / BATCH_FILE)
    save_file(columns | {"version_S": torch.zeros(2)}, tmp_path / BATCH_FILE)
    with pytest.raises(DataError, match="the batch cannot be read; got .*'version_S'"):
        Batch.open(tmp_path / BATCH_FILE)


def test_columns_that_do_not_fit_the_lengths_are_refused():
    batch = a_batch(2)
    with pytest.raises(DataError, match=r"do not fit its lengths; expected 7 positions.*\(6,\)"):
        replace(batch, labels_N=batch.labels_N[:-1])
    with pytest.raises(DataError, match="do not fit its lengths; expected 6 positions"):
        replace(batch, lengths_S=batch.lengths_S - torch.tensor([1, 0]))


def test_groups_and_rewards_are_those_of_the_samples():
    batch = a_batch(4)
    assert batch.rewards_S.tolist() == [1.0, 0.0, 1.0, 0.0]
    assert batch.group_S.tolist() == [0, 0, 1, 1]
    assert batch.num_prompts == 2
    assert Batch.from_samples(SAMPLES * 2, 2, num_prompts=5).num_prompts == 5


def test_the_lag_of_a_token_counts_the_versions_since_its_weights(tmp_path):
    versions = [[4, 5], [3], None, [5, 5]]
    samples = []
    for n, of_sample in enumerate(versions):
        columns = None if of_sample is None else np.resize(of_sample, len(SAMPLES[n % 2].logp_mu))
        samples.append(replace(SAMPLES[n % 2], versions=columns))
    Batch.from_samples(samples, 2).save(tmp_path / BATCH_FILE)
    batch = Batch.open(tmp_path / BATCH_FILE)
    expected = [
        -1 if s.versions is None else v
        for s in samples
        for v in (s.versions if s.versions is not None else s.logp_mu)
    ]
    assert batch.version_N[batch.mask_N].tolist() == expected
    assert set(batch.version_N[~batch.mask_N].tolist()) <= {-1}
    lags = [0 if version < 0 else 5 - version for version in expected]
    assert batch.lag_N(5)[batch.mask_N].tolist() == lags
    assert [sample.weight_version for sample in samples] == [4, 3, -1, 5]
