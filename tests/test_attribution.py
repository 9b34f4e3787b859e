"""Attribution without an engine: the parts add up, intervals cover, a stopped run goes on."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from padded_batches import batch_of
from safetensors.torch import save_file

from routing_replay.analysis.attribution import Progress, attribute, plan, sequence_sums, summarize
from routing_replay.analysis.resampling import Resampling, k3
from routing_replay.errors import ConfigError, DataError
from routing_replay.routes.batch import RolloutBatch

LAYERS = (1, 2, 5)


def scored(costs, noise=0.0, num_sequences=64, seed=0):
    """A score function of a model in which every live layer costs its own KL (nats per token)."""
    generator = np.random.default_rng(seed)
    of_sequence_S = 1 + 0.5 * generator.standard_normal(num_sequences)

    def score(variant):
        live = sum(cost for layer, cost in costs.items() if layer not in variant.replayed)
        kl_S = (0.001 + live) * of_sequence_S + noise * generator.standard_normal(num_sequences)
        kl_S = kl_S - 0.0004 * variant.is_rollout_weights - 0.0002 * variant.has_gates
        zeros_S, count_S = np.zeros(num_sequences), np.full(num_sequences, 10.0)
        return torch.from_numpy(np.stack([kl_S * 10, kl_S * 10, zeros_S, count_S], 1))

    return score


def run(costs, families=("without",), has_rollout_weights=False, has_gates=False, **settings):
    progress = Progress(None, {})
    variants = plan(LAYERS, families, has_rollout_weights, has_gates)
    attribute(variants, scored(costs, **settings), progress)
    return summarize(LAYERS, progress.sums)


def test_the_main_table_takes_l_plus_three_passes():
    names = [variant.name for variant in plan(LAYERS, ("without",), has_rollout_weights=True)]
    assert names == ["none", "all", "without 1", "without 2", "without 5", "rollout"]


def test_the_parts_add_up_to_the_live_kl_exactly():
    result = run({1: 0.002, 2: 0.0, 5: 0.001}, ("without", "first"), has_rollout_weights=True)
    parts = result.parts
    total = sum(part.value for part in parts.values())
    assert total == pytest.approx(result.kl["none"].value, rel=1e-12)
    # all: 0.001, rollout: 0.0004 less; both with the sequences' mean factor.
    ratio = parts["staleness"].value / parts["routing"].value
    factor = result.kl["all"].value / 0.001
    assert ratio == pytest.approx(0.0004 / (0.003 * factor))
    steps = sum(row["step"].value for row in result.layers.values())
    assert steps == pytest.approx(parts["routing"].value, rel=1e-12)


def test_the_gates_are_a_part_of_their_own_where_they_were_captured():
    costs = {1: 0.002, 2: 0.0, 5: 0.001}
    result = run(costs, (), has_rollout_weights=True, has_gates=True)
    assert list(result.kl) == ["none", "all", "gates", "rollout"]
    parts = {name: part.value for name, part in result.parts.items()}
    assert list(parts) == ["numerics", "staleness", "gates", "routing"]
    assert sum(parts.values()) == pytest.approx(result.kl["none"].value, rel=1e-12)
    # 0.0004 of staleness, 0.0002 of gates; both with the sequences' mean factor of 1 or so.
    assert parts["staleness"] == pytest.approx(0.0004) and parts["gates"] == pytest.approx(0.0002)


def test_the_layer_that_costs_is_named_and_the_others_are_not():
    result = run({1: 0.0, 2: 0.004, 5: 0.0}, ("without", "only"))
    clear = {i for i, row in result.layers.items() if row["leave_out"].is_clear}
    assert clear == {2}
    assert result.layers[2]["alone"].value == pytest.approx(result.layers[2]["leave_out"].value)
    lines = [line for line in result.text().splitlines() if line.endswith("*")]
    assert [line.split()[0] for line in lines] == ["2", "2"]


@pytest.mark.parametrize(("cost", "harmed"), [(-0.0001, []), (-0.0008, [2])])
def test_a_layer_is_harmed_by_its_replay_only_if_that_makes_up_most_of_the_kl(cost, harmed):
    # KL(all) is 0.001. A tenth of it is what a newer policy gains by routing as it likes.
    result = run({1: 0.0, 2: cost, 5: 0.0})
    assert result.layers[2]["leave_out"].is_clear
    assert result.harmed_layers == harmed
    assert ("Replay makes layer 2 worse" in result.text()) == bool(harmed)


def test_repeated_runs_agree_within_their_intervals():
    runs = [run({1: 0.002, 2: 0, 5: 0.001}, seed=seed) for seed in range(20)]
    # Each interval holds the truth (routing = 0.003) in 95 % of the runs: 20 runs of which
    # 17 or more agree has a probability of 98 %; the seeds are fixed.
    holds = [
        result.parts["routing"].low <= 0.003 <= result.parts["routing"].high for result in runs
    ]
    assert sum(holds) >= 17


def test_a_difference_is_resampled_in_pairs():
    result = run({1: 0.0002, 2: 0, 5: 0})
    # Every KL here is its size times the same factor of a sequence, so intervals are as wide as
    # the values: 0.0002 of 0.0012. Without pairs the difference were as wide as both together.
    widths = [e.high - e.low for e in (result.parts["routing"], result.kl["none"])]
    assert widths[0] / widths[1] == pytest.approx(1 / 6)


def test_a_stopped_run_goes_on_where_it_was(tmp_path):
    path = tmp_path / "progress.json"
    calls = []
    real = scored({1: 0.001, 2: 0, 5: 0})

    def until(limit):
        def score(variant):
            if len(calls) == limit:
                raise KeyboardInterrupt
            calls.append(variant.name)
            return real(variant)

        return score

    with pytest.raises(KeyboardInterrupt):
        attribute(plan(LAYERS), until(2), Progress(path, {"batch": "a"}))
    resumed = Progress(path, {"batch": "a"})
    attribute(plan(LAYERS), until(9), resumed)
    assert calls == ["none", "all", "without 1", "without 2", "without 5"]
    whole = Progress(None, {})
    attribute(plan(LAYERS), real, whole)
    for name, sums in whole.sums.items():
        np.testing.assert_array_equal(resumed.sums[name], sums)


def test_progress_of_another_batch_is_refused(tmp_path):
    path = tmp_path / "progress.json"
    Progress(path, {"batch": "a"}).add("none", np.zeros((2, 4)))
    with pytest.raises(ConfigError, match="belongs to another batch; expected b; got a"):
        Progress(path, {"batch": "b"})
    path.write_text("{")
    with pytest.raises(DataError, match="the progress cannot be read"):
        Progress(path, {"batch": "a"})


def test_sums_follow_the_estimators_on_the_masked_tokens():
    logp_pi = torch.log(torch.tensor([[0.5, 0.2], [0.1, 0.9]]))
    logp_mu = torch.log(torch.tensor([[0.25, 0.2], [0.9, 0.9]]))
    entropy_pi = torch.tensor([[0.7, 1.7], [9.0, 0.1]])
    mask = torch.tensor([[True, True], [False, True]])
    # rho = 2 and 1 in the first sequence: k1 = -ln 2, k3 = 2 - 1 - ln 2; 1 and 0 in the second.
    # Excess: ln 0.5 + 0.7 + ln 0.2 + 1.7, and ln 0.9 + 0.1.
    expected = [
        [-np.log(2), 1 - np.log(2), np.log(0.1) + 2.4, 2],
        [0, 0, np.log(0.9) + 0.1, 1],
    ]
    batch = batch_of([3, 3], logp_mu_N=logp_mu.flatten(), mask_N=mask.flatten())
    result = sequence_sums(logp_pi.flatten(), entropy_pi.flatten(), batch)
    np.testing.assert_allclose(result, expected, atol=1e-6)


def test_sums_of_uneven_sequences_are_those_of_each_alone():
    lengths = [5, 2, 1, 9]  # one token has no position
    generator = torch.Generator().manual_seed(0)
    batch = batch_of(lengths)
    batch = replace(
        batch,
        logp_mu_N=-torch.rand(len(batch.mask_N), generator=generator),
        mask_N=torch.rand(len(batch.mask_N), generator=generator) < 0.7,
    )
    logp_pi_N = -torch.rand(len(batch.mask_N), generator=generator)
    expected, start = [], 0
    for length in lengths:
        part = slice(start, start + length - 1)
        alone = batch_of([length], logp_mu_N=batch.logp_mu_N[part], mask_N=batch.mask_N[part])
        expected.append(sequence_sums(logp_pi_N[part], -logp_pi_N[part], alone)[0])
        start += length - 1
    result_S4 = sequence_sums(logp_pi_N, -logp_pi_N, batch)
    assert torch.equal(result_S4, torch.stack(expected))
    assert (result_S4[2] == 0).all()
    means_B = Resampling(batch, num_resamples=1).means(k3(logp_pi_N, batch.logp_mu_N))
    assert means_B[0] == pytest.approx(float(result_S4[:, 1].sum() / batch.mask_N.sum()))


def test_an_unknown_family_is_refused():
    with pytest.raises(ConfigError, match="unknown family of an attribution.*got 'every'"):
        plan(LAYERS, ("every",))


def test_a_saved_batch_is_read_and_a_foreign_file_is_not(tmp_path):
    columns = {
        "input_ids_N": torch.arange(5),
        "labels_N": torch.arange(1, 6),
        "mask_N": torch.ones(5, dtype=torch.bool),
        "logp_mu_N": torch.zeros(5),
        "lengths_S": torch.tensor([4, 3]),
        "advantages_S": torch.zeros(2),
    }
    save_file(columns, tmp_path / "batch.safetensors")
    batch = RolloutBatch.open(tmp_path / "batch.safetensors")
    for name, values in columns.items():
        assert name == "advantages_S" or torch.equal(getattr(batch, name), values)
    save_file({"mask_N": columns["mask_N"]}, tmp_path / "other.safetensors")
    with pytest.raises(DataError, match="is not a rollout batch; expected the columns"):
        RolloutBatch.open(tmp_path / "other.safetensors")
    with pytest.raises(DataError, match="cannot be read"):
        RolloutBatch.open(tmp_path / "absent.safetensors")


def test_the_result_is_what_a_report_shows():
    content = json.loads(json.dumps(run({1: 0.002, 2: 0, 5: 0}).as_dict()))
    assert [part["name"] for part in content["parts"]] == ["numerics", "staleness", "routing"]
    row = content["layers"][0]
    assert row["layer"] == 1 and len(row["leave_out_interval"]) == 2
