"""The plan of a step: exact loads, packings within their budgets, placements that pay."""

import itertools

import numpy as np
import oracles
import pytest
from test_table import random_routes

import routing_replay as rr
from routing_replay.balance import Budget, CostModel, Placement, PlanLayout, PlanOptions, Prediction
from routing_replay.balance.loads import StepLoads
from routing_replay.balance.placement import swapped
from routing_replay.balance.prediction import lower_bound_L
from routing_replay.errors import ConfigError, DataError, TableError
from routing_replay.routes.routes import Routes
from routing_replay.routes.table import RouteTable

LAYOUTS = [
    PlanLayout(data=1, expert=1),
    PlanLayout(data=2, expert=2),
    PlanLayout(data=4, expert=2),  # two groups of experts
    PlanLayout(data=4, expert=4, tensor=2),  # a group is two data-parallel ranks
    PlanLayout(data=2, expert=2, tensor=2, pipeline=2, virtual_pipeline=2),
    PlanLayout(data=2, expert=2, context=2, expert_tensor=2),
]
BUDGETS = [Budget(tokens=400), Budget(sequences=4), Budget(microbatches=2)]
KINDS = ["none", "packing", "placement", "both"]


def topical_table(num_sequences=32, num_layers=3, experts=16, top_k=2, seed=0, covered=1.0):
    """Sequences of two topics, each with experts of its own: order and placement matter."""
    rng = np.random.default_rng(seed)
    sequences = []
    for _ in range(num_sequences):
        num_rows, topic = int(rng.integers(5, 100)), int(rng.integers(2))
        scores = rng.random((num_rows, num_layers, experts))
        scores[..., topic * 4 : topic * 4 + 4] += 0.7
        ids_TLK = np.argsort(-scores, axis=-1)[..., :top_k].astype(np.uint8)
        sequences.append(
            Routes(
                expert_ids_TLK=ids_TLK,
                covered_T=rng.random(num_rows) < covered,
                layers=tuple(range(num_layers)),
                num_experts=experts,
            )
        )
    table = RouteTable.from_routes(sequences)
    return table, np.diff(table.offsets_S1) + 1


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("budget", BUDGETS, ids=["tokens", "sequences", "microbatches"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_plan_holds_each_sequence_once_within_its_minibatch_and_budget(layout, budget, kind):
    table, lengths = topical_table()
    options = PlanOptions(minibatch_size=16, budget=budget, kind=kind)
    packing = rr.plan(table, lengths, layout, options).packing
    for number, ranks in enumerate(packing.bins):
        assert len(ranks) == layout.data and len({len(bins) for bins in ranks}) == 1
        assert len(ranks[0]) % layout.microbatch_multiple == 0
        members = sorted(s for bins in ranks for one in bins for s in one)
        assert members == list(range(16 * number, 16 * number + 16))
        for one in itertools.chain(*ranks):
            assert one, "a microbatch without a sequence cannot run"
            assert not budget.tokens or sum(lengths[s] - 1 for s in one) <= budget.tokens
            assert not budget.sequences or len(one) <= budget.sequences
    if budget.microbatches:
        assert len(packing.bins[0][0]) == budget.microbatches


@pytest.mark.parametrize("layout", LAYOUTS[1:4], ids=str)
def test_predicted_loads_are_those_of_a_loop_over_all_slots(layout):
    table, lengths = topical_table()
    options = PlanOptions(minibatch_size=16, budget=Budget(tokens=400))
    step = rr.plan(table, lengths, layout, options)
    counts = oracles.expert_counts(table)
    cells = [c for m in range(2) for c in step.packing.cells(m)]
    assert len(cells) == len(step.prediction.loads_CLR)
    local = 16 // layout.expert
    for cell, loads_LR in zip(cells, step.prediction.loads_CLR, strict=True):
        for layer, rank in itertools.product(range(3), range(layout.expert)):
            held = step.placement.experts_LE[layer, rank * local : (rank + 1) * local]
            assert loads_LR[layer, rank] == sum(counts[s][layer][e] for s in cell for e in held)


def test_dispatch_names_the_counts_of_each_group_and_microbatch():
    table, lengths = topical_table()
    layout = PlanLayout(data=4, expert=2)
    step = rr.plan(table, lengths, layout, PlanOptions(minibatch_size=16))
    counts = np.array(oracles.expert_counts(table))
    for group, minibatch in itertools.product(range(2), range(2)):
        ranks = step.packing.bins[minibatch][2 * group : 2 * group + 2]
        expected = [counts[[s for rank in ranks for s in rank[m]]].sum(0) for m in range(1)]
        np.testing.assert_array_equal(step.dispatch(group, [minibatch]), expected)
        sizes_MDLE = step.sizes(group, [minibatch])
        for rank, bins in enumerate(ranks):
            expected = [counts[list(one)].sum(0) for one in bins]
            np.testing.assert_array_equal(sizes_MDLE[:, rank], expected)
    whole = sum(step.dispatch(group).sum(0) for group in range(2))
    np.testing.assert_array_equal(whole, counts.sum(0))


def test_both_is_nearer_to_balance_than_each_alone_and_never_below_the_bound():
    table, lengths = topical_table(num_sequences=64)
    layout, peaks = PlanLayout(data=4, expert=4), {}
    for kind in KINDS:
        options = PlanOptions(minibatch_size=32, budget=Budget(microbatches=4), kind=kind)
        step = rr.plan(table, lengths, layout, options)
        peaks[kind] = step.prediction.peak_over_mean
        assert step.natural.peak_over_mean == peaks["none"]
        assert (step.prediction.peak_over_mean_L >= step.lower_bound_L - 1e-6).all()
    assert peaks["both"] < peaks["placement"] < peaks["none"] and peaks["packing"] < peaks["none"]
    # Experts 0..7 are hot and natural order keeps them on two of four ranks: about 2.
    assert peaks["none"] > 1.8 and peaks["both"] < 1.1


def test_the_lower_bound_knows_that_a_rank_holds_several_experts():
    # One layer, two ranks of two experts: the heaviest, 5 of 10, shares its rank with a lightest.
    ids_TLK = np.array([[[0]]] * 5 + [[[1]]] * 2 + [[[2]]] * 2 + [[[3]]], np.uint8)
    table = RouteTable.from_routes([Routes(expert_ids_TLK=ids_TLK, layers=(0,), num_experts=4)])
    loads = StepLoads.of(table, [11])
    assert lower_bound_L(loads, 2).tolist() == [(5 + 1) / 5]
    assert lower_bound_L(loads, 1).tolist() == [1]
    assert lower_bound_L(loads, 4).tolist() == [2]  # 5 of a mean of 2.5


def test_a_plan_is_the_same_for_the_same_counts():
    table, lengths = topical_table()
    options = PlanOptions(minibatch_size=16, budget=Budget(tokens=400))
    first, second = (
        rr.plan(routes, lengths, PlanLayout(data=2, expert=2), options, top_k=2)
        for routes in (table, table.expert_counts().copy())
    )
    assert first.packing == second.packing
    np.testing.assert_array_equal(first.placement.experts_LE, second.placement.experts_LE)


def best_of_all_placements(loads_E, num_ranks):
    """The least load of the busiest rank over all ways to hold the experts, by trying them."""
    local = len(loads_E) // num_ranks
    orders = itertools.permutations(range(len(loads_E)))
    return min(
        max(sum(loads_E[e] for e in order[r * local : (r + 1) * local]) for r in range(num_ranks))
        for order in orders
    )


@pytest.mark.parametrize("seed", range(6))
def test_swaps_come_close_to_the_best_of_all_placements(seed):
    loads_LME = np.random.default_rng(seed).pareto(1.5, (1, 1, 6)) * 100
    placement = swapped(loads_LME, Placement.natural(1, 6, 2))
    held = loads_LME[0, 0][placement.experts_LE[0]].reshape(2, 3).sum(1).max()
    assert held <= 1.1 * best_of_all_placements(loads_LME[0, 0], 2)


def test_two_ranks_that_are_equally_busy_do_not_end_the_search():
    # No single swap lowers the peak: the other rank stays at 10. Two swaps leave 6 everywhere.
    loads_LME = np.array([[[5.0, 5.0, 5.0, 5.0, 1.0, 1.0, 1.0, 1.0]]])
    placed = swapped(loads_LME, Placement.natural(1, 8, 4))
    assert (loads_LME[0, 0] @ placed.is_on_rank_ER(0)).tolist() == [6.0] * 4


def test_swaps_stop_where_they_no_longer_pay():
    loads_LME = np.array([[[9.0, 8.0, 1.0, 0.0]]])  # ranks 17 and 1; one swap: 9 and 9
    start = Placement.natural(1, 4, 2)
    moved = swapped(loads_LME, start, least_gain=7.5)  # saves 8
    assert moved.num_moves(start) == 2
    assert swapped(loads_LME, start, least_gain=8.5).num_moves(start) == 0


def test_a_placement_stays_until_a_better_one_pays():
    table, lengths = topical_table()
    layout = PlanLayout(data=2, expert=2)
    options = PlanOptions(kind="placement", budget=Budget(microbatches=1))
    first = rr.plan(table, lengths, layout, options)
    kept = PlanOptions(
        kind="placement", budget=Budget(microbatches=1), placement=first.placement, move_s=1.0
    )
    again = rr.plan(table, lengths, layout, kept)
    assert first.num_moves > 0 and again.num_moves == 0
    np.testing.assert_array_equal(again.placement.experts_LE, first.placement.experts_LE)


def test_uncovered_rows_count_as_their_layers_average_and_are_counted():
    table, lengths = topical_table(covered=0.5)
    loads = StepLoads.of(table, lengths)
    assert loads.num_unknown == int((~table.covered_T).sum()) > 0
    total_LE = loads.by_expert(np.arange(32))
    # Every token, known or not, takes top-2 experts.
    np.testing.assert_allclose(total_LE.sum(1), 2 * table.num_rows)
    known_LE = np.array(oracles.expert_counts(table)).sum(0)
    np.testing.assert_allclose(total_LE / total_LE.sum(), known_LE / known_LE.sum())
    (by_rank_RSL,) = loads.by_rank(Placement.natural(3, 16, 4))
    np.testing.assert_allclose(by_rank_RSL.sum((0, 1)), 2 * table.num_rows, rtol=1e-5)
    step = rr.plan(table, lengths, PlanLayout(data=1, expert=1))
    assert step.num_unknown == loads.num_unknown


def test_long_sequences_are_spread_over_the_ranks_where_attention_counts():
    routes = [random_routes(n, n, gates=False) for n in (90, 90, 3, 3)]
    table = RouteTable.from_routes(routes)
    cost = CostModel(expert_s=0.0, square_s=1.0)
    options = PlanOptions(budget=Budget(sequences=2), kind="packing", cost=cost)
    bins = rr.plan(table, [91, 91, 4, 4], PlanLayout(data=2, expert=1), options).packing.bins
    assert [len({0, 1} & set(rank[0])) for rank in bins[0]] == [1, 1]


def test_a_bound_of_the_expert_buffers_takes_more_microbatches():
    table, lengths = topical_table()
    layout = PlanLayout(data=2, expert=2)
    loose = rr.plan(table, lengths, layout, PlanOptions(budget=Budget(tokens=2000)))
    most = loose.prediction.most_expert_tokens // 3
    tight = Budget(tokens=2000, expert_tokens=most)
    step = rr.plan(table, lengths, layout, PlanOptions(budget=tight, kind="packing"))
    assert step.prediction.most_expert_tokens <= most < loose.prediction.most_expert_tokens
    assert len(step.packing.bins[0][0]) > len(loose.packing.bins[0][0])


def test_the_cost_model_finds_the_coefficients_of_steps_that_follow_it():
    features_N4 = np.random.default_rng(0).random((12, 4)) * [1e6, 1e4, 1e8, 10]
    model = CostModel(expert_s=2e-6, token_s=0.0, square_s=3e-9, microbatch_s=0.1)
    seconds = [model.seconds(row) for row in features_N4]
    fitted = CostModel.fit(features_N4, seconds)
    np.testing.assert_allclose([fitted.seconds(r) for r in features_N4], seconds, rtol=1e-6)
    assert min(fitted.expert_s, fitted.token_s, fitted.square_s, fitted.microbatch_s) >= 0
    with pytest.raises(DataError, match="the measured steps do not fit the cost model"):
        CostModel.fit(features_N4[:, :3], seconds)


def test_features_are_of_the_slowest_group_of_experts():
    table = RouteTable.from_routes([random_routes(n, n, gates=False) for n in (8, 2)])
    options = PlanOptions(kind="none", budget=Budget(microbatches=1))
    step = rr.plan(table, [9, 3], PlanLayout(data=2, expert=1), options)
    busiest = 8 * 3 * 3  # 8 tokens, 3 layers, top-3: uncovered rows count as average ones
    assert step.prediction.features.tolist() == pytest.approx([busiest, 8, 64, 1])
    assert step.seconds == step.natural_seconds == pytest.approx(busiest)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PlanLayout(data=3, expert=2), "the expert-parallel groups do not divide the data"),
        (lambda: PlanLayout(data=2, expert=3, tensor=2), "the expert-parallel groups do not divi"),
        (lambda: PlanLayout(data=0, expert=1), "the parallel size data is out of range"),
        (lambda: Budget(), "the budget bounds no microbatch"),
        (lambda: Placement.natural(1, 16, 3), "the expert-parallel ranks do not divide the exper"),
        (
            lambda: Placement(experts_LE=np.zeros((1, 4), int), num_ranks=2),
            "a placement does not hold every expert of a layer once",
        ),
        (lambda: PlanOptions(kind="all"), "unknown kind of plan"),
        (lambda: PlanOptions(horizon=0), "an option of the plan is out of range"),
    ],
)
def test_values_that_cannot_be_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize(
    ("layout", "options", "message"),
    [
        ({}, {"budget": Budget(tokens=50)}, "the token budget is below the longest sequence"),
        ({"data": 64}, {}, "the number of microbatches does not fit the minibatch"),
        ({}, {"minibatch_size": 5}, "the minibatches do not divide the step"),
        (
            {"expert": 2, "data": 2},
            {"placement": Placement.natural(3, 16, 4)},
            "the placement is of another number of ranks",
        ),
        (
            {"data": 4},
            {"budget": Budget(tokens=100), "minibatch_size": 4},
            None,  # one sequence for each rank: always fits
        ),
        (
            {"data": 2},
            {"budget": Budget(microbatches=2, tokens=120)},
            "the minibatch does not fit the layout and the budget",
        ),
    ],
)
def test_a_batch_that_does_not_fit_is_refused_with_the_reason(layout, options, message):
    table, lengths = topical_table()
    arguments = table, lengths, PlanLayout(**({"data": 1, "expert": 1} | layout))
    if message is None:
        rr.plan(*arguments, PlanOptions(**options))
        return
    with pytest.raises(ConfigError, match=message):
        rr.plan(*arguments, PlanOptions(**options))


def test_routes_of_other_sequences_are_refused():
    table, lengths = topical_table()
    layout = PlanLayout(data=1, expert=1)
    with pytest.raises(TableError, match="the lengths are not those of the counted sequences"):
        rr.plan(table, lengths[:-1], layout)
    with pytest.raises(TableError, match="a sequence has more routes than tokens that are fed"):
        rr.plan(table, lengths - 1, layout)
    with pytest.raises(TableError, match="counts alone do not say their top-k"):
        rr.plan(table.expert_counts(), lengths, layout)


def test_ranks_that_share_sequences_by_position_say_that_counts_are_estimates():
    assert PlanLayout(data=2, expert=2).has_whole_sequences
    layout = PlanLayout(data=2, expert=2, tensor=4)
    assert not layout.has_whole_sequences
    table, lengths = topical_table()
    with pytest.raises(ConfigError, match="their exact counts are not known"):
        rr.plan(table, lengths, layout).dispatch(0)


def test_without_a_covered_row_all_experts_count_alike():
    table, lengths = topical_table(covered=0.0)
    step = rr.plan(table, lengths, PlanLayout(data=2, expert=2))
    assert step.num_unknown == (lengths - 1).sum() and step.num_moves == 0
    np.testing.assert_allclose(step.natural.peak_over_mean_L, 1, rtol=1e-5)


def test_dense_layers_have_no_row_in_a_plan():
    ids_TLK = np.arange(2, dtype=np.uint8)[None, None].repeat(6, 0).repeat(2, 1)
    routes = [Routes(expert_ids_TLK=ids_TLK, layers=(1, 3), num_experts=4) for _ in range(4)]
    lengths = [7] * 4
    step = rr.plan(RouteTable.from_routes(routes), lengths, PlanLayout(data=2, expert=2))
    # Experts 0 and 1 get every token; apart they are balanced.
    assert step.natural.peak_over_mean_L.tolist() == [2, 2]
    assert step.prediction.peak_over_mean_L.tolist() == [1, 1]
    assert step.placement.experts_LE.shape == (2, 4)


def test_ranks_that_share_an_expert_all_get_its_tokens():
    # A group of 2 x 2 ranks trains the sequences of two data-parallel ranks, each cut in two.
    table, lengths = topical_table()
    layout = PlanLayout(data=2, expert=2, context=2, expert_tensor=2)
    step = rr.plan(table, lengths, layout, PlanOptions(budget=Budget(microbatches=2)))
    assert layout.num_groups == 1
    np.testing.assert_array_equal(step.dispatch(0).sum(0), table.expert_counts().sum(0))


def test_a_prediction_of_one_rank_is_balanced():
    table, lengths = topical_table()
    step = rr.plan(table, lengths, PlanLayout(data=2, expert=1))
    assert isinstance(step.prediction, Prediction) and step.num_moves == 0
    np.testing.assert_allclose(step.prediction.peak_over_mean_L, 1)
