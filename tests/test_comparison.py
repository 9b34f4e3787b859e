"""Comparison of two tables against an oracle, and the faults that it must name."""

import json

import numpy as np
import pytest

from routing_replay.analysis.comparison import compare_tables, shared_experts, token_decoder
from routing_replay.errors import DataError, TableError
from routing_replay.routes.routes import RouterLogits, Routes
from routing_replay.routes.table import RouteTable

ROWS, LAYERS, EXPERTS, TOP_K = 150, 4, 16, 4


def random_ids(seed, num_rows=ROWS):
    scores = np.random.default_rng(seed).random((num_rows, LAYERS, EXPERTS))
    return scores.argsort(-1)[..., :TOP_K].astype(np.uint8)


def table_of(ids_TLK, lengths=(100, 50), **changes):
    settings = {"layers": (0, 1, 3, 4), "num_experts": EXPERTS, **changes}
    routes = Routes(expert_ids_TLK=ids_TLK, **settings)
    edges = np.cumsum([0, *lengths])
    return RouteTable.from_routes([routes[a:b] for a, b in zip(edges[:-1], edges[1:], strict=True)])


@pytest.fixture
def pair():
    """Two random tables that agree on about half of their rows."""
    first, second = random_ids(0), random_ids(1)
    same_TL = np.random.default_rng(2).random((ROWS, LAYERS)) < 0.8
    second[same_TL] = first[same_TL][..., ::-1]  # equal sets in another slot order
    return first, second


def test_everything_equals_the_oracle_across_blocks(monkeypatch, pair):
    monkeypatch.setattr("routing_replay.analysis.comparison.BLOCK_ROWS", 32)
    first, second = pair
    covered_T = np.random.default_rng(3).random(ROWS) < 0.9
    comparison = compare_tables(table_of(first, covered_T=covered_T), table_of(second))
    sets = [
        [(set(first[t, p].tolist()), set(second[t, p].tolist())) for p in range(LAYERS)]
        for t in range(ROWS)
        if covered_T[t]
    ]
    assert comparison.num_rows == len(sets) and comparison.num_skipped == ROWS - len(sets)
    firsts = [next((p for p, (a, b) in enumerate(row) if a != b), None) for row in sets]
    for index, layer in enumerate(comparison.layers):
        pairs = [row[index] for row in sets]
        assert layer.overlap == pytest.approx(np.mean([len(a & b) / TOP_K for a, b in pairs]))
        assert layer.exact_match == pytest.approx(np.mean([a == b for a, b in pairs]))
        assert layer.first_difference == pytest.approx(firsts.count(index) / len(sets))
    assert comparison.any_layer_differs == pytest.approx(1 - firsts.count(None) / len(sets))
    assert [layer.layer for layer in comparison.layers] == [0, 1, 3, 4]
    assert sum(bucket.num_rows for bucket in comparison.positions) == len(sets)


def test_equal_sets_in_another_order_are_equal(pair):
    first, _ = pair
    comparison = compare_tables(table_of(first), table_of(first[..., ::-1].copy()))
    assert (comparison.overlap, comparison.exact_match, comparison.any_layer_differs) == (1, 1, 0)
    assert comparison.worst == ()


def test_the_worst_tokens_are_named_with_their_place():
    first = random_ids(0)
    second = first.copy()
    second[120] = (first[120] + 1) % EXPERTS  # every layer of row 20 of sequence 1
    second[7, 2:] = (first[7, 2:] + 1) % EXPERTS  # the last two layers of row 7 of sequence 0
    second.sort(-1)
    comparison = compare_tables(table_of(first), table_of(second), num_worst=5)
    places = [(t.sequence, t.position, t.num_layers, t.first_layer) for t in comparison.worst]
    assert places == [(1, 20, 4, 0), (0, 7, 2, 3)]


def test_positions_and_origins_have_their_own_agreement():
    first = random_ids(0)
    second = first.copy()
    second[64:100, 1] = (first[64:100, 1] + 1) % EXPERTS  # late in sequence 0 only
    second.sort(-1)
    origin_T = np.where(np.arange(ROWS) % 100 < 64, 1, 2).astype(np.uint8)
    comparison = compare_tables(table_of(first, origin_T=origin_T), table_of(second))
    late = {b.name: b.any_layer_differs for b in comparison.positions}
    # Positions 64-99 exist in sequence 0 only, and every one of them differs; no other does.
    assert late.pop("64-127") == 1.0 and set(late.values()) == {0.0}
    assert {b.name: b.any_layer_differs for b in comparison.origins} == {"prefill": 0, "decode": 1}


def shifted(ids):
    ids[1:, 2] = ids[:-1, 2].copy()


def swapped(ids):
    ids[:, [0, 2]] = ids[:, [2, 0]].copy()


def renumbered(ids):
    ids[:, 2] = np.random.default_rng(5).permutation(EXPERTS).astype(np.uint8)[ids[:, 2]]


@pytest.mark.parametrize(
    ("fault", "layers", "clause"),
    [
        (shifted, {3}, "shifted: its rows stand 1 token(s) later in the second file"),
        (swapped, {0, 3}, "swapped: the second file holds them under layer"),
        (renumbered, {3}, "renumbered: one permutation of the experts"),
    ],
)
def test_unrelated_routes_of_a_layer_are_named_and_explained(fault, layers, clause):
    first = random_ids(0)
    second = first.copy()
    fault(second)
    comparison = compare_tables(table_of(first), table_of(second))
    # Unrelated sets share K / E of their slots on average: 4 / 16.
    assert {
        r.layer for r in comparison.layers if r.overlap == pytest.approx(0.25, abs=0.06)
    } == layers
    assert {r.layer for r in comparison.layers if r.explanation.startswith(clause)} == layers
    assert clause in comparison.text()


def test_chance_is_not_an_explanation():
    comparison = compare_tables(table_of(random_ids(0)), table_of(random_ids(1)))
    assert [layer.explanation for layer in comparison.layers] == [""] * LAYERS


def test_router_kl_is_exact_where_both_files_hold_logits():
    generator = np.random.default_rng(0)
    logits = [generator.normal(size=(3, LAYERS, EXPERTS)).astype("f4") for _ in range(2)]
    ids = random_ids(0)
    rows = [np.array([1, 5, 8]), np.array([5, 8, 9])]
    tables = [
        table_of(ids[:20], (20,), router_logits=RouterLogits(rows_N=n, values_NLE=x))
        for n, x in zip(rows, logits, strict=True)
    ]
    comparison = compare_tables(*tables)
    # Rows 5 and 8 are in both: entries 1, 2 of the first and 0, 1 of the second.
    log_mu, log_pi = (
        x - np.log(np.exp(x).sum(-1, keepdims=True))
        for x in (logits[0][1:].astype("f8"), logits[1][:2].astype("f8"))
    )
    expected = (np.exp(log_mu) * (log_mu - log_pi)).sum(-1).mean(0)
    assert [layer.router_kl for layer in comparison.layers] == pytest.approx(expected.tolist())


def test_shared_experts_counts_sets():
    ids = np.array([[0, 1, 2], [0, 1, 2]], np.uint8)
    other = np.array([[2, 0, 5], [3, 4, 5]], np.uint8)
    assert shared_experts(ids, other).tolist() == [2, 0]


def test_tables_of_other_sequences_are_refused():
    ids = random_ids(0)
    with pytest.raises(TableError, match=r"other sequences; expected 2 .* got 1 with \[150\]"):
        compare_tables(table_of(ids), table_of(ids, (150,)))


def test_tables_of_other_models_are_refused():
    ids = random_ids(0)
    with pytest.raises(TableError, match="the routes belong to another model"):
        compare_tables(table_of(ids), table_of(ids, layers=(0, 1, 2, 3)))


def test_named_tokens_are_decoded(tmp_path):
    path = tmp_path / "tokens.jsonl"
    path.write_text(json.dumps([5, 6, 7]) + "\n" + json.dumps({"tokens": [8, 9]}) + "\n")
    decode = token_decoder(path, lambda ids: f"<{ids[0]}>")
    assert (decode(0, 2), decode(1, 0), decode(1, 5)) == ("'<7>'", "'<8>'", "?")
    path.write_text("[1]\nnonsense\n")
    with pytest.raises(DataError, match="a line holds no token ids.*line 2"):
        token_decoder(path, str)
