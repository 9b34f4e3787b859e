"""The recipe's groups: routes become parts when a group has ended, and leave its samples."""

from dataclasses import replace

import numpy as np
import pytest
from test_table import EXPERTS, LAYERS, TOP_K, random_routes

from recipes.minirl.rollout import groups
from recipes.minirl.rollout.batch import Sample
from recipes.minirl.rollout.groups import (
    INDEX_FILE,
    GroupWriter,
    oldest_version,
    pieces,
    replayed_routes,
    rows_with_gates,
)
from recipes.minirl.settings.command_line import parse
from routing_replay.config import ReplayConfig
from routing_replay.errors import RoutesError
from routing_replay.routes.origin import require_covered
from routing_replay.routes.part_index import PartIndex
from routing_replay.routes.parts import PartedTable
from routing_replay.routes.routes import Routes
from routing_replay.routes.shape import MoEShape
from routing_replay.routes.table import RouteTable

SHAPE = MoEShape(layers=LAYERS, num_experts=EXPERTS, top_k=TOP_K)


def sample_of(seed, prompt=3, response=4, **fields):
    return Sample(
        prompt_ids=(5,) * prompt,
        response_ids=(8,) * response,
        logp_mu=(-0.5,) * response,
        routes=random_routes(prompt + response - 1, seed),
        **fields,
    )


def writer_of(folder, **fields):
    settings = {
        "folder": folder,
        "shape": SHAPE,
        "stages": ((1, 2), (4,)),
        "oldest_version": None,
        "num_calls": 2,
        "replay": ReplayConfig(agreement_tokens=1),
        "is_planned": False,
    }
    return GroupWriter(**(settings | fields))


def test_the_parts_of_a_step_are_its_routes_whatever_ended_first(tmp_path):
    sampled = [[sample_of(seed + 10 * g) for seed in range(2)] for g in range(3)]
    writer = writer_of(tmp_path)
    ended = {number: writer.write(number, sampled[number]) for number in (2, 0, 1)}
    # A group that dynamic sampling replaced is in no index.
    chosen = [ended[0], ended[2]]
    uncovered = writer.save_index(tmp_path, chosen, 1.0)
    samples = sampled[0] + sampled[2]
    whole = RouteTable.from_routes([sample.routes for sample in samples])
    parts = PartedTable.open(tmp_path / INDEX_FILE)
    rows_T = np.flatnonzero(whole.covered_T)
    np.testing.assert_array_equal(parts.gather(LAYERS, rows_T), whole.gather(LAYERS, rows_T))
    assert uncovered == {"absent": (~whole.covered_T).mean()}
    assert all(sample.routes is None for group in chosen for sample in group.samples)
    kept = [replace(sample, routes=None) for sample in samples]
    assert [sample for group in chosen for sample in group.samples] == kept


def test_long_responses_have_parts_of_their_own_and_short_ones_share_one(tmp_path, monkeypatch):
    assert pieces([3, 9, 1, 1, 2, 5], 4) == [slice(0, 2), slice(2, 5), slice(5, 6)]
    assert pieces([9, 9], 4) == [slice(0, 1), slice(1, 2)]
    assert pieces([1], 4) == [slice(0, 1)]
    monkeypatch.setattr(groups, "PART_ROWS", 6)
    writer = writer_of(tmp_path)
    samples = [sample_of(0), sample_of(1, 1, 2), sample_of(2, 2, 5)]
    group = writer.write(0, samples)
    assert [part.rows_S.tolist() for part in group.parts] == [[6], [2, 6]]
    writer.save_index(tmp_path, [group], 1.0)
    whole = RouteTable.from_routes([sample.routes for sample in samples])
    rows_T = np.flatnonzero(whole.covered_T)
    parts = PartedTable.open(tmp_path / INDEX_FILE)
    np.testing.assert_array_equal(parts.gather(LAYERS, rows_T), whole.gather(LAYERS, rows_T))
    assert PartIndex.open(tmp_path / INDEX_FILE).files([0], [4]) == [group.parts[0].files()[1]]


def test_a_step_with_too_many_uncovered_rows_stops_with_their_causes(tmp_path):
    writer = writer_of(tmp_path)
    group = writer.write(0, [sample_of(0)])
    with pytest.raises(RoutesError, match=r"too many rows are not covered[\s\S]*absent 2"):
        writer.save_index(tmp_path, [group], 0.1)


def test_only_a_planned_step_carries_the_counts_of_its_experts(tmp_path):
    samples = [sample_of(0), sample_of(1)]
    for is_planned in (False, True):
        (parts,) = writer_of(tmp_path, is_planned=is_planned).write(0, samples).parts
        counts_SLE = parts.counts_SLE
        assert (counts_SLE is not None) == is_planned
    expected = RouteTable.from_routes([sample.routes for sample in samples]).counts_SLE
    np.testing.assert_array_equal(counts_SLE, expected)


def test_gates_are_kept_of_a_sample_of_the_response_tokens():
    # Rows 0..3 and 4..6 of two responses; the tokens of rows 2, 3, 4, 5 and 6 were sampled for.
    samples = [sample_of(0, 3, 2), sample_of(1, 1, 3)]

    def kept(num_calls, **settings):
        keeps = rows_with_gates(samples, num_calls, ReplayConfig(**settings))
        return np.flatnonzero(np.concatenate(keeps)).tolist()

    assert kept(1, agreement_tokens=0) == [2, 3, 4, 5, 6]
    assert kept(1, agreement_tokens=512) == [2, 3, 4, 5, 6]
    # 5 response tokens, of which 2 calls compare one each: every second is enough.
    assert kept(2, agreement_tokens=1) == [2, 4, 6]
    assert kept(1, agreement_tokens=1) == [2]
    assert kept(1, agreement_every=0) == []
    # What a tool returned was not sampled.
    samples[0] = sample_of(0, 3, 2, is_sampled=(True, False))
    assert kept(1, agreement_tokens=0) == [2, 4, 5, 6]


def test_routes_of_weights_beyond_the_largest_lag_are_live_by_intention():
    routes = Routes(
        expert_ids_TLK=np.tile(np.arange(TOP_K, dtype=np.uint8), (4, len(LAYERS), 1)),
        layers=LAYERS,
        num_experts=EXPERTS,
        weight_version_T=np.array([4, 5, 6, 6]),
    )
    sample = replace(sample_of(0, 2, 3), routes=routes)
    for flags, covered in (
        (["--ahead", "1"], [False, True, True, True]),
        (["--ahead", "1", "--max-version-lag", "0"], [False, False, True, True]),
        (["--ahead", "2", "--publish-pause", "retract"], [True] * 4),
        ([], [True] * 4),
    ):
        # Step 7 is trained from version 6.
        config = parse(["--routing-replay-capture", "ids", *flags])
        (kept,) = replayed_routes([sample], oldest_version(config, 7))
        assert kept.covered_T.tolist() == covered
        assert require_covered([kept], 0.0, "a step").get("stale", 0) == 1 - np.mean(covered)
