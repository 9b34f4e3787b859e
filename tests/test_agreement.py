"""Agreement of replayed and live routers, against an oracle that sees every number."""

import math
import os

import oracles
import pytest
import torch
import torch.multiprocessing as mp
from torch_ranks import start_ranks

from recipes.serving.ports import HeldPort
from routing_replay.errors import ConfigError
from routing_replay.metrics.agreement import (
    LayerAgreement,
    RouterView,
    exact_match,
    log_router_probs,
    margin,
    overlap,
    replay_bias,
    router_kl,
    router_kl_bound,
    router_probs,
)
from routing_replay.metrics.sinks import scalars
from routing_replay.metrics.typed import LayerMean, LayerValues, all_reduce, to_floats

TOKENS, EXPERTS, TOP_K = 64, 16, 4


@pytest.fixture
def logits():
    """Engine and live logits that differ by noise: about a third of the sets change."""
    generator = torch.Generator().manual_seed(0)
    engine_TE = torch.randn(TOKENS, EXPERTS, generator=generator, dtype=torch.float64)
    noise_TE = torch.randn(TOKENS, EXPERTS, generator=generator, dtype=torch.float64)
    return engine_TE, engine_TE + 0.1 * noise_TE


def view_of(engine_TE, live_TE, **changes):
    probs_TE = live_TE.softmax(-1)
    settings = {
        "replayed_ids_TK": engine_TE.topk(min(TOP_K, engine_TE.shape[-1])).indices,
        "live_ids_TK": live_TE.topk(min(TOP_K, live_TE.shape[-1])).indices,
        "values_TE": live_TE,
        "probs_TE": probs_TE,
        "valid_T": torch.ones(len(engine_TE), dtype=torch.bool),
        "token_rows_T": torch.arange(len(engine_TE)),
    }
    return RouterView(**{**settings, **changes})


def test_overlap_and_exact_match_ignore_the_order_of_slots():
    ids = torch.tensor([[3, 1, 2], [3, 1, 2], [3, 1, 2]])
    other = torch.tensor([[2, 3, 1], [2, 3, 0], [4, 5, 6]])
    assert overlap(ids, other).tolist() == pytest.approx([1, 2 / 3, 0])
    assert exact_match(ids, other).tolist() == [True, False, False]


def test_every_statistic_equals_the_oracle(logits):
    engine_TE, live_TE = logits
    agreement = LayerAgreement([0, 2])
    agreement.observe(2, view_of(engine_TE, live_TE))
    expected = [
        oracles.agreement(oracles.top_k(mu, TOP_K), pi, oracles.softmax(pi))
        for mu, pi in zip(engine_TE.tolist(), live_TE.tolist(), strict=True)
    ]
    metrics = to_floats(agreement.metrics())
    for name in expected[0]:
        mean = sum(token[name] for token in expected) / TOKENS
        # probabilities and margins pass through float32: 2^-24 relative, a few operations
        values = metrics[f"routing_replay/{name}"]
        assert values.layers[2] == pytest.approx(mean, rel=1e-6, abs=1e-7)
        assert values.mean == values.layers[2]
        assert math.isnan(values.layers[0])


@pytest.mark.parametrize("score_function", ["softmax", "sigmoid", "sqrtsoftplus"])
def test_exact_router_kl_equals_the_oracle(logits, score_function):
    engine_TE, live_TE = logits
    kl_T = router_kl(*(log_router_probs(x, score_function) for x in logits))
    expected = [
        oracles.kl(*(oracles.router_distribution(x, score_function) for x in pair))
        for pair in zip(engine_TE.tolist(), live_TE.tolist(), strict=True)
    ]
    assert kl_T.tolist() == pytest.approx(expected, rel=1e-10)


def test_the_values_of_the_seam_give_the_distribution_of_the_logits(logits):
    _, live_TE = logits
    bias_E = torch.linspace(-1, 1, EXPERTS)
    expected_TE = log_router_probs(live_TE, "sigmoid").exp().float()
    biased_TE = live_TE.float().sigmoid() + bias_E
    torch.testing.assert_close(router_probs(biased_TE, "scores", bias_E), expected_TE)
    torch.testing.assert_close(router_probs(live_TE, "logits"), live_TE.float().softmax(-1))


def test_the_gate_bound_equals_the_bucket_kl_and_stays_below_the_exact_kl(logits):
    engine_TE, live_TE = logits
    ids_TK = engine_TE.topk(TOP_K).indices
    mu_TE, pi_TE = engine_TE.softmax(-1), live_TE.softmax(-1)
    bound_T = router_kl_bound(mu_TE.gather(1, ids_TK), pi_TE.gather(1, ids_TK))
    exact_T = router_kl(mu_TE.log(), pi_TE.log())
    for t in range(TOKENS):
        bucket = oracles.bucket_kl(mu_TE[t].tolist(), pi_TE[t].tolist(), ids_TK[t].tolist())
        # The rest's mass may move by kept * 2^-11, about 3e-4, towards pi's; the derivative of
        # its term is log(rest of mu / rest of pi), below 0.3 here.
        assert bound_T[t].item() == pytest.approx(bucket, abs=1e-4)
        assert bucket <= exact_T[t].item()
    assert bound_T.mean() > 0.5 * exact_T.mean()


def test_rounding_the_gates_to_float16_does_not_invent_a_kl():
    # Four experts with all but 1e-5 of the mass: 1 - sum(float16 gates) is rounding error alone
    # (up to 2^-12 = 2.4e-4 of either sign), and would read as a KL of that order.
    logits_TE = torch.cat([torch.rand(256, 4) * 2 + 14, torch.zeros(256, 12)], -1).double()
    probs_TE = logits_TE.softmax(-1)
    ids_TK = torch.arange(4).expand(256, 4)
    live_TK = probs_TE.gather(1, ids_TK)
    naive_T = (1 - live_TK.half().double().sum(-1)).abs()
    assert naive_T.max() > 5e-5
    assert router_kl_bound(live_TK.half(), live_TK).max() < 1.3e-7  # GATE_ROUNDING ** 2 / 2


def test_margin_is_the_distance_to_the_best_expert_left_out():
    values = torch.tensor([[4.0, 1.0, 3.0, 2.5]])
    # Selected {0, 2}: weakest 3.0, best left out 2.5.
    assert margin(values, torch.tensor([[2, 0]])).tolist() == [0.5]


def test_replay_bias_is_zero_for_equal_sets_and_the_lost_mass_otherwise():
    probs = torch.tensor([[0.5, 0.3, 0.2], [0.5, 0.3, 0.2]])
    live = torch.tensor([[0, 1], [0, 1]])
    replayed = torch.tensor([[1, 0], [2, 0]])
    # Second token: 0.8 live, 0.7 replayed.
    assert replay_bias(probs, replayed, live).tolist() == pytest.approx([0, math.log(0.8 / 0.7)])


def test_rows_that_do_not_count_may_hold_nan(logits):
    engine_TE, live_TE = logits
    valid_T = torch.arange(TOKENS) % 3 > 0
    broken_TE = torch.where(valid_T[:, None], live_TE, torch.nan)
    kept, whole = LayerAgreement([0], num_rows=TOKENS), LayerAgreement([0], num_rows=TOKENS)
    whole.observe(0, view_of(engine_TE, broken_TE, valid_T=valid_T))
    kept.observe(
        0, view_of(engine_TE[valid_T], live_TE[valid_T], token_rows_T=valid_T.nonzero()[:, 0])
    )
    assert scalars(to_floats(whole.reduced())) == pytest.approx(scalars(to_floats(kept.reduced())))


def test_exact_kl_is_averaged_over_the_sampled_tokens_only():
    agreement = LayerAgreement([5], has_logits=True)
    agreement.observe_kl(5, torch.tensor([1.0, torch.nan, 3.0]), torch.tensor([True, False, True]))
    assert to_floats(agreement.metrics())["routing_replay/router_kl"].layers[5] == 2.0


def test_first_differing_layer_is_found_across_layers_and_microbatches():
    agreement = LayerAgreement([1, 4, 6], num_rows=5)
    same, other = [[0, 1], [0, 1]], [[0, 1], [0, 2]]  # the second token differs
    values = torch.tensor([[3.0, 2.0, 1.0]]).expand(2, 3)
    for layer, rows, replayed in [
        (1, [0, 1], same),
        (4, [0, 1], other),
        (6, [0, 1], other),
        (1, [3, 2], other),  # rows 3 and 2: row 2 differs in layer 1
        (4, [3, 2], same),
        (6, [3, 2], [[1, 2], [0, 1]]),  # and row 3 in layer 6
    ]:
        view = view_of(
            values,
            values,
            replayed_ids_TK=torch.tensor(replayed),
            live_ids_TK=torch.tensor(same),
            token_rows_T=torch.tensor(rows),
        )
        agreement.observe(layer, view)
    values = to_floats(agreement.reduced())
    # Row 0 never differs, row 1 first in layer 4, row 2 in 1, row 3 in 6; row 4 was not observed.
    assert values["routing_replay/any_layer_differs"] == 3 / 4
    assert values["routing_replay/first_differing_layer"] == pytest.approx((4 + 1 + 6) / 3)
    assert values["routing_replay/first_difference"].layers[4] == 1 / 4


def test_too_many_layers_for_one_byte_are_refused():
    with pytest.raises(ConfigError, match="expected at most 254; got 300"):
        LayerAgreement(range(300))


def test_unknown_forms_and_score_functions_are_refused():
    with pytest.raises(ConfigError, match="expected logits, probs or scores; got 'tanh'"):
        router_probs(torch.zeros(1, 2), "tanh")
    with pytest.raises(ConfigError, match="softmax, sigmoid or sqrtsoftplus; got 'tanh'"):
        log_router_probs(torch.zeros(1, 2), "tanh")


def _stage(rank, port, queue):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    generator = torch.Generator().manual_seed(0)
    views = [view_of(*torch.randn(2, TOKENS, EXPERTS, generator=generator)) for _ in range(2)]
    staged = LayerAgreement([0, 1], num_rows=TOKENS)
    staged.observe(rank, views[rank])  # pipeline stage r owns layer r
    whole = LayerAgreement([0, 1], num_rows=TOKENS)
    for layer, view in enumerate(views):
        whole.observe(layer, view)
    results = scalars(to_floats(staged.reduced())), scalars(to_floats(whole.reduced()))
    # Rank 0 names layer 3 alone, rank 1 layers 3 and 5: sums (1, 0) + (3, 4), counts (1, 0) +
    # (1, 2).
    layers, total_L = ((3,), [1.0]) if rank == 0 else ((3, 5), [3.0, 4.0])
    count_L = torch.tensor([1.0, 2.0][: len(layers)], dtype=torch.float64)
    own = LayerMean(
        layers=layers, total_L=torch.tensor(total_L, dtype=torch.float64), count_L=count_L
    )
    nothing = LayerMean(layers=(), total_L=count_L[:0], count_L=count_L[:0])
    union = to_floats(all_reduce({"own": own, "nothing": nothing}))
    queue.put((*results, union))
    torch.distributed.destroy_process_group()


def test_pipeline_stages_together_report_what_one_process_would():
    queue = mp.get_context("spawn").SimpleQueue()
    with HeldPort() as port:
        context = start_ranks(_stage, (port, queue), 2, join=False)
        results = [queue.get() for _ in range(2)]
        while not context.join():
            pass
    for staged, whole, union in results:
        assert union["own"] == LayerValues(mean=8 / 4, layers={3: 2.0, 5: 2.0})
        assert union["nothing"].layers == {}
        assert staged == pytest.approx(whole)
        assert staged["routing_replay/any_layer_differs"] > 0.5
    assert results[0][:2] == results[1][:2]
