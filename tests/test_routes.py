"""Routes: operations keep rows with their tokens, and content that cannot be true is refused."""

import itertools

import numpy as np
import pytest

from routing_replay.errors import RoutesError
from routing_replay.routes import routes as routes_module
from routing_replay.routes.origin import Origin
from routing_replay.routes.routes import RouterLogits, Routes, concatenate, has_duplicates


def make(ids_TLK, **changes):
    settings = {"layers": range(np.shape(ids_TLK)[1]), "num_experts": 8, **changes}
    return Routes(expert_ids_TLK=np.asarray(ids_TLK, np.uint8), **settings)


@pytest.fixture
def routes():
    """Row t selects experts (t, t + 1) in layer 0 and (t + 2, t) in layer 3, mod 8."""
    ids = [[[t % 8, (t + 1) % 8], [(t + 2) % 8, t % 8]] for t in range(6)]
    return make(
        ids,
        layers=(0, 3),
        weight_version_T=np.array([1, 1, 1, 2, 2, 2]),
        origin_T=np.array([1, 1, 2, 2, 2, 2], np.uint8),
        router_logits=RouterLogits(rows_N=np.array([1, 4]), values_NLE=np.ones((2, 2, 8), "f4")),
    )


def test_a_slice_keeps_rows_and_their_logits_together(routes):
    part = routes[3:6]
    assert part.expert_ids_TLK[:, 0, 0].tolist() == [3, 4, 5]
    assert part.weight_version_T.tolist() == [2, 2, 2]
    assert part.router_logits.rows_N.tolist() == [1]  # row 4 of the whole


def test_rows_are_taken_in_any_order_with_their_columns(routes):
    taken = routes.take(np.array([4, -1, 1, 1]))
    assert taken.expert_ids_TLK[:, 0, 0].tolist() == [4, 0, 1, 1]
    assert taken.covered_T.tolist() == [True, False, True, True]
    assert taken.weight_version_T.tolist()[::2] == [2, 1]
    assert taken.origin_T.tolist() == [Origin.DECODE, Origin.ABSENT] + [Origin.PREFILL] * 2
    assert taken.router_logits.rows_N.tolist() == [0, 2, 3]


def test_rows_of_older_weights_become_uncovered(routes):
    kept = routes.without_versions_before(2)
    assert kept.covered_T.tolist() == [False] * 3 + [True] * 3
    assert kept.origin_T.tolist()[:3] == [Origin.STALE] * 3
    assert kept.router_logits.rows_N.tolist() == [4]
    assert not kept.expert_ids_TLK[:3].any()


def test_different_models_do_not_concatenate(routes):
    with pytest.raises(
        RoutesError, match=r"layers differ; expected .* layers 0,3.*got .* layers 0-1"
    ):
        concatenate([routes, make([[[0, 1], [1, 2]]])])


def test_an_id_beyond_the_experts_names_its_place():
    with pytest.raises(RoutesError, match=r"below 8; got 9 \[row 1, layer 1, slot 0\]"):
        make([[[0, 1], [2, 3]], [[0, 1], [9, 3]]])


def test_a_doubled_expert_names_its_place():
    with pytest.raises(RoutesError, match=r"twice.*got \[3, 3\] \[row 0, layer 1\]"):
        make([[[0, 1], [3, 3]]])


def test_a_layer_of_zeros_is_called_not_captured():
    with pytest.raises(RoutesError, match=r"zero in every row.*\[layer 1\]"):
        make([[[0, 1], [0, 0]], [[1, 2], [0, 0]]])


def test_uncovered_rows_may_hold_anything():
    routes = make([[[0, 0]], [[9, 9]], [[1, 2]]], covered_T=np.array([False, False, True]))
    assert routes.covered_T.sum() == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts": 0}, "number of experts"),
        ({"num_experts": 300}, "300 experts have another type; expected uint16"),
        ({"layers": (1, 0)}, "ascending global layer indices"),
        ({"layers": (0, 1, 2)}, r"the axes \[T, L = 3, K\]"),
        ({"covered_T": np.ones(3, bool)}, r"covered_T.*bool \(1,\)"),
        ({"gate_probs_TLK": np.ones((1, 2, 2), "f4")}, "expected float16"),
        ({"gate_probs_TLK": np.full((1, 2, 2), np.nan, "f2")}, r"finite values in 0..1"),
        (
            {"router_logits": RouterLogits(rows_N=np.array([5]), values_NLE=np.ones((1, 2, 8)))},
            "ascending covered rows below 1",
        ),
    ],
)
def test_columns_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(RoutesError, match=message):
        make([[[0, 1], [2, 3]]], **changes)


@pytest.mark.parametrize("num_slots", [1, 2, 3, 8, 10])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_duplicates_are_found_like_a_set_finds_them(monkeypatch, num_slots, dtype):
    # Chunks far smaller than the rows, and a last one that is not full.
    monkeypatch.setattr(routes_module, "CHUNK_ROWS", 64)
    largest = np.iinfo(dtype).max
    ids = (
        np.random.default_rng(0).integers(largest - 30, largest, (101, 5, num_slots)).astype(dtype)
    )
    expected = [[len(set(ids_K)) < num_slots for ids_K in ids_LK] for ids_LK in ids.tolist()]
    assert has_duplicates(ids).tolist() == expected
    # Of 30 ids, ten are distinct in 17 % of the rows and two in 97 %: both answers occur.
    assert num_slots == 1 or 0 < np.mean(expected) < 1


def test_a_doubled_expert_is_found_in_any_two_slots_of_any_row(monkeypatch):
    monkeypatch.setattr(routes_module, "CHUNK_ROWS", 4)
    for row in range(10):
        for first, second in itertools.combinations(range(8), 2):
            ids = np.tile(np.arange(8, dtype=np.uint8), (10, 1))
            ids[row, second] = ids[row, first]
            assert np.flatnonzero(has_duplicates(ids)).tolist() == [row]


def test_every_half_is_a_probability_or_refused():
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    wide = halves.astype(np.float64)
    is_good = (wide >= 0) & (wide <= 1)
    good_TLK = np.stack([halves[is_good], halves[is_good]], -1)[:, None]
    make([[[0, 1]]] * len(good_TLK), gate_probs_TLK=good_TLK)
    bad = halves[~is_good]
    # Each refusal is seen alone: every 13th, and those next to 0 and 1, infinities and nan.
    edges = [np.nextafter(np.float16(x), np.float16(to)) for x, to in ((0, -1), (1, 2))]
    for half in [*bad[::13], *edges, np.inf, -np.inf, np.nan]:
        with pytest.raises(
            RoutesError, match="gate probabilities are out of range; expected finite"
        ):
            make([[[0, 1]]], gate_probs_TLK=np.array([[[0.5, half]]], np.float16))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (np.ones((1, 1, 2), np.float16), "another shape or type; expected float32.*got float16"),
        (np.ones((1, 1, 3), np.float32), "a weight for each slot of the ids; got.*1, 1, 3"),
        (np.array([[[0.5, -0.5]]], np.float32), "finite value >= 0; got -0.5.*layer 0, slot 1"),
        (np.array([[[np.nan, 0.5]]], np.float32), "got nan"),
    ],
)
def test_weights_that_no_router_makes_are_refused(weights, message):
    with pytest.raises(RoutesError, match=message):
        make([[[0, 1]]], combine_weights_TLK=weights)


def test_weights_are_sliced_joined_and_uncovered_with_their_rows():
    weights = np.arange(6, dtype=np.float32).reshape(3, 1, 2)
    routes = make([[[0, 1]], [[2, 3]], [[1, 0]]], combine_weights_TLK=weights)
    joined = routes_module.concatenate([routes[:2], routes[1:]])
    np.testing.assert_array_equal(joined.combine_weights_TLK[:, 0, 0], [0, 2, 2, 4])
    kept = joined.uncover(np.array([True, False, False, False]))
    np.testing.assert_array_equal(kept.combine_weights_TLK[:, 0, 1], [0, 3, 3, 5])
