"""Faults planted between two real Megatron models are found by the tools from the outside.

Every fault goes through replay, the metrics of a step, the report's findings, the comparison of
routes and the attribution; see planted_faults.py for the engine and the faults.
"""

import pytest
from megatron_worlds import run_world
from planted_faults import FAULTY_LAYER, examine


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    (results,) = run_world(examine, 1, str(tmp_path_factory.mktemp("faults")), timeout_s=600)
    return results


def test_a_clean_pair_of_engines_stays_quiet(found):
    clean = found["clean"]
    assert clean["findings"] == [] and clean["explanations"] == {}
    # The two engines do differ: quiet does not mean blind.
    assert 0 < clean["metrics"]["routing_replay/router_kl_bound"].mean < 1e-4
    assert 0.9 < clean["metrics"]["routing_replay/exact_match"].mean < 1
    assert clean["attribution"].parts["routing"].is_clear


def test_gates_of_a_sample_of_rows_are_compared_with_these_rows_own(found):
    clean, sampled = (found[name]["metrics"] for name in ("clean", "gates of a sample"))
    bound = sampled["routing_replay/router_kl_bound"].mean
    # Another row's gates would be nats away. 1 of 7 rows has the same mean, but for chance.
    assert bound == pytest.approx(clean["routing_replay/router_kl_bound"].mean, rel=0.5)
    assert bound != clean["routing_replay/router_kl_bound"].mean
    assert sampled["routing_replay/coverage"] == 1


def test_a_router_in_lower_precision_is_named_by_its_router_kl(found):
    (finding,) = found["coarse router"]["findings"]
    assert finding.startswith(f"warning: Layer {FAULTY_LAYER} differs on")
    assert "its router itself differs (router KL, at least" in finding
    metrics = found["coarse router"]["metrics"]
    bounds = metrics["routing_replay/router_kl_bound"].layers
    others = max(kl for i, kl in bounds.items() if i != FAULTY_LAYER)
    assert bounds[FAULTY_LAYER] > 10 * others
    costs = found["coarse router"]["attribution"].layers
    assert max(costs, key=lambda i: costs[i]["leave_out"].value) == FAULTY_LAYER


@pytest.mark.parametrize("fault", ["shifted", "renumbered"])
def test_routes_that_are_not_the_rollouts_are_named_by_layer_and_cause(found, fault):
    findings = found[fault]["findings"]
    assert findings[0].startswith("error: Replay raises the KL")
    assert findings[1].startswith(f"error: Layer {FAULTY_LAYER} differs on")
    assert len(findings) == 2
    ((layer, explanation),) = found[fault]["explanations"].items()
    assert layer == FAULTY_LAYER and explanation.startswith(fault)
    text = found[fault]["attribution"].text()
    assert f"Replay makes layer {FAULTY_LAYER} worse" in text


def test_experts_loaded_in_another_order_show_as_numerics_after_the_layer(found):
    metrics = found["misloaded"]["metrics"]
    firsts = metrics["routing_replay/first_difference"].layers
    # The router is right, so routes part in the next layer, which gets another input.
    assert max(firsts, key=firsts.get) == FAULTY_LAYER + 1
    assert firsts[FAULTY_LAYER + 1] > 10 * firsts[FAULTY_LAYER]
    parts = found["misloaded"]["attribution"].parts
    assert parts["numerics"].value > 10 * abs(parts["routing"].value)
    assert found["misloaded"]["explanations"] == {}


def test_truncated_sampling_is_named_by_the_mean_ratio_and_no_layer_is_blamed(found):
    findings = found["truncated"]["findings"]
    assert len(findings) == 2 and not any("Layer" in text for text in findings)
    assert "truncated distribution (top-p" in findings[0]
    # Tokens come from the kept mass, 0.9 to 1 of it: the mean of pi / mu is that mass.
    assert 0.88 < float(findings[0].split("mu is ")[1].split()[0]) < 0.95
    assert "Most of the gap is not routing" in findings[1]


def test_truncation_that_the_log_probs_hide_is_named_by_the_excess(found):
    """SGLang reports log-probs from before top-p: no ratio and no KL shows it."""
    hidden = found["silently truncated"]
    assert hidden["findings"] == []
    assert hidden["attribution"].is_truncated and found["truncated"]["attribution"].is_truncated
    assert "mu was truncated" in hidden["attribution"].text()
    others = ("clean", "another seed", "coarse router", "shifted", "stale")
    assert not any(found[name]["attribution"].is_truncated for name in others)


def test_stale_weights_are_named_by_the_attribution(found):
    parts = found["stale"]["attribution"].parts
    assert parts["staleness"].is_clear
    assert parts["staleness"].value > 10 * parts["numerics"].value
    assert parts["staleness"].value > parts["routing"].value
    # Every layer is a little off; none is singled out.
    assert len(found["stale"]["findings"]) == 1
    assert "Most of the gap is not routing but numerics, staleness" in found["stale"]["findings"][0]
    # The same weights on both sides leave nothing for staleness.
    assert found["clean"]["attribution"].parts["staleness"].value == 0


def test_the_parts_add_up_to_the_live_kl(found):
    for result in found.values():
        attribution = result["attribution"]
        total = sum(part.value for part in attribution.parts.values())
        assert total == pytest.approx(attribution.kl["none"].value, rel=1e-12)
        # The attribution's passes and the metrics of the step are the same passes.
        live = result["metrics"]["train_infer/kl_k3_live"]
        assert attribution.kl["none"].value == pytest.approx(live, rel=1e-6)


def test_two_rollouts_agree_within_their_intervals(found):
    first = found["clean"]["attribution"].parts["routing"]
    second = found["another seed"]["attribution"].parts["routing"]
    assert first.low <= second.high and second.low <= first.high
