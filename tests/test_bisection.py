"""Factors of a gap, the noise floor and the certificate, on batches whose gaps are known."""

import pytest
import torch
from padded_batches import batch_of
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from scored_batches import (
    HEALTHY,
    LAYERS,
    PLANTED,
    SEQUENCES,
    TOKENS,
    scored,
    table_of,
    write_batch,
)

from routing_replay.analysis.arms import ScoredArms, Scores
from routing_replay.analysis.attribution import NOTABLE_EXCESS
from routing_replay.analysis.bisection import arm_of_layers, bisect, halve
from routing_replay.analysis.certificate import certify
from routing_replay.analysis.noise import noise_floor
from routing_replay.analysis.resampling import Resampling
from routing_replay.cli import main
from routing_replay.errors import ConfigError, DataError

CLEAN = {"live": 1.4 * HEALTHY, "routes": 1.2 * HEALTHY, "weights": 1.1 * HEALTHY}
CLEAN |= {"checkpoint": HEALTHY, "precision float32": 0.9 * HEALTHY, "order allgather": HEALTHY}


def planted(*arms):
    """The clean gaps, with a large one in these arms."""
    return CLEAN | dict.fromkeys(arms, PLANTED)


FAULTS = {
    "routes": planted("live"),
    "weights": planted("live", "routes"),
    "staleness": planted("live", "routes", "weights"),
    "precision float32": planted(*(name for name in CLEAN if name != "precision float32")),
    "order allgather": planted(*(name for name in CLEAN if name != "order allgather")),
    "rest": planted(*CLEAN),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_named_and_nothing_else(tmp_path, fault):
    result = bisect(scored(tmp_path, FAULTS[fault]))
    # Where a setting repairs the base, nothing is left to the rest.
    assert result.named == [fault]
    assert len(result.sentences()) == 1


def test_a_setting_is_measured_by_what_replay_leaves_and_not_by_the_live_gap(tmp_path):
    """Live 5e-3, replayed 8e-4: all of that is the precision's, though a sixth of the live gap."""
    gaps = dict.fromkeys(CLEAN, 0.04) | {"live": 0.1, "precision float32": HEALTHY}
    assert bisect(scored(tmp_path, gaps)).named == ["routes", "precision float32"]


def test_a_rest_that_a_setting_repairs_in_part_is_named_beside_it(tmp_path):
    gaps = dict.fromkeys(CLEAN, 0.08) | {"order allgather": 0.05}
    assert bisect(scored(tmp_path, gaps)).named == ["order allgather", "rest"]


def test_a_rest_beyond_numerics_is_said_to_be_none(tmp_path):
    (small,) = bisect(scored(tmp_path, dict.fromkeys(CLEAN, 0.05))).sentences()
    # Half the square of 0.3: 0.045 nats.
    (large,) = bisect(scored(tmp_path, dict.fromkeys(CLEAN, 0.3))).sentences()
    assert "precision and kernels of the engines" in small
    assert "more than numerics give: another temperature" in large


def test_chance_names_the_support_of_no_healthy_batch():
    """Tokens that were sampled from pi itself: log pi + entropy is 0 on average only."""
    generator = torch.Generator().manual_seed(0)
    resampling, excesses = Resampling(batch_of([TOKENS + 1] * SEQUENCES)), []
    for _ in range(200):
        logp_NV = (2 * torch.randn(SEQUENCES, TOKENS, 50, generator=generator)).log_softmax(-1)
        sampled_T1 = torch.multinomial(logp_NV.exp().flatten(0, 1), 1, generator=generator)
        logp_N = logp_NV.flatten(0, 1).gather(1, sampled_T1)[:, 0]
        entropy_N = -(logp_NV.exp() * logp_NV).sum(-1).flatten()
        excesses.append(resampling.estimate(logp_N + entropy_N))
    # The 95 % intervals do their part: 2.5 % of 200 lie above zero.
    assert 1 <= sum(excess.low > 0 for excess in excesses) <= 11
    assert not any(excess.exceeds(NOTABLE_EXCESS) for excess in excesses)


def test_a_truncated_support_is_named(tmp_path):
    result = bisect(scored(tmp_path, CLEAN, excess=0.08))
    assert result.named == ["support"]
    assert "top-p 1" in result.sentences()[0]


def test_nothing_is_named_on_twenty_healthy_batches(tmp_path):
    for seed in range(20):
        folder = tmp_path / str(seed)
        folder.mkdir()
        result = bisect(scored(folder, CLEAN, seed=seed), num_resamples=200)
        assert result.named == []
        assert result.sentences() == [
            "Nothing stands out: the gap is too small to gain from any of these."
        ]


def test_the_factors_of_the_ladder_and_the_rest_add_up_to_the_live_gap(tmp_path):
    arms = scored(tmp_path, {"live": 0.1, "routes": 0.08, "weights": 0.05, "checkpoint": 0.02})
    result = bisect(arms)
    assert [factor.label for factor in result.factors] == ["routes", "weights", "staleness", "rest"]
    assert sum(f.k3.value for f in result.factors) == pytest.approx(result.live.value, rel=1e-12)
    # Half the squares: 0.005, 0.0032, 0.00125, 0.0002. 768 tokens: to a tenth or so.
    values = [f.k3.value for f in result.factors]
    assert values == pytest.approx([0.0018, 0.00195, 0.00105, 0.0002], rel=0.15)


@pytest.mark.parametrize(
    ("costs", "expected"),
    [
        ({0: 0, 1: 0, 2: 9, 3: 0}, (2,)),
        ({0: 4, 1: 4, 2: 1, 3: 0}, (0, 1)),
        ({0: 1, 1: 1, 2: 1, 3: 1}, LAYERS),
        ({0: 0, 1: 0, 2: 0, 3: 0}, LAYERS),
    ],
)
def test_layers_are_searched_by_halves(costs, expected):
    known = {}
    while True:
        part, missing = halve(LAYERS, known.get)
        if missing is None:
            break
        known[missing] = sum(costs[layer] for layer in missing)
    assert part == expected
    assert len(known) <= 5  # the whole, and two halves twice


def test_the_layer_that_costs_is_in_the_sentences(tmp_path):
    arms = scored(tmp_path, FAULTS["routes"])
    generator = torch.Generator().manual_seed(5)
    noise_N = torch.randn(arms.batch.logp_mu_N.shape, generator=generator)
    for part, gap in (((0, 1, 2, 3), 0.05), ((0, 1), 0.005), ((2, 3), 0.05), ((2,), 0.05)):
        logp_N = arms.batch.logp_mu_N + gap * noise_N
        arms.add(arm_of_layers(part), Scores(logp_N=logp_N, entropy_N=-logp_N))
    still = arms["routes"]
    arms.add(arm_of_layers((3,)), still)
    assert "comes from layer 2." in bisect(arms, LAYERS).sentences()[-1]


def test_no_layer_is_blamed_where_live_routing_costs_nothing_notable(tmp_path):
    """A single token that goes another way in one layer is all that live routing costs here."""
    arms = scored(tmp_path, CLEAN)
    still_N = arms["routes"].logp_N
    moved_N = still_N.clone()
    moved_N[0] += 0.1
    for part, logp_N in (
        ((0, 1, 2, 3), moved_N),
        ((0, 1), moved_N),
        ((2, 3), still_N),
        ((0,), moved_N),
        ((1,), still_N),
    ):
        arms.add(arm_of_layers(part), Scores(logp_N=logp_N, entropy_N=-logp_N))
    assert bisect(arms, LAYERS).layers == ()


def test_arms_of_another_checkpoint_or_batch_are_refused(tmp_path):
    scored(tmp_path, CLEAN)
    with pytest.raises(ConfigError, match="scored with another checkpoint; expected b; got a"):
        ScoredArms(tmp_path, {"checkpoint": "b"})
    write_batch(tmp_path, seed=1)
    with pytest.raises(ConfigError, match="scored with another batch"):
        ScoredArms(tmp_path)
    sorted((tmp_path / "arms").iterdir())[0].write_bytes(b"x")
    with pytest.raises(DataError, match="scores of an arm cannot be read"):
        ScoredArms(tmp_path)


@pytest.mark.parametrize("key", ["version of the code", "layout"])
def test_arms_that_were_not_scored_together_are_refused(tmp_path, key):
    write_batch(tmp_path)
    scores = Scores(logp_N=torch.zeros(SEQUENCES * TOKENS), entropy_N=torch.zeros(1))
    ScoredArms(tmp_path, {key: "a"}).add("live", scores)
    ScoredArms(tmp_path, {key: "a"}).add("routes", scores)
    with pytest.raises(ConfigError, match=f"scored with another {key}; expected b; got a"):
        ScoredArms(tmp_path, {key: "b"})
    # A reader who expects nothing still compares them with each other.
    path = tmp_path / "arms" / "routes.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    metadata["fingerprint"] = metadata["fingerprint"].replace('"a"', '"c"')
    save_file(load_file(path), path, metadata)
    with pytest.raises(ConfigError, match=f"scored with another {key}; expected a; got c"):
        ScoredArms(tmp_path)


def test_an_arm_of_another_layout_belongs_to_arms_of_any(tmp_path):
    write_batch(tmp_path)
    scores = Scores(logp_N=torch.zeros(SEQUENCES * TOKENS), entropy_N=torch.zeros(1))
    ScoredArms(tmp_path, {"code": "a", "layout": "tp1"}).add("live", scores)
    ScoredArms(tmp_path, {"code": "a"}).add("layout tp2", scores)
    ScoredArms(tmp_path, {"code": "a", "layout": "tp1"}).add("routes", scores)
    assert ScoredArms(tmp_path).names == ["layout tp2", "live", "routes"]


def test_an_arm_that_a_killed_run_had_begun_to_write_is_none(tmp_path):
    scored(tmp_path, CLEAN)
    (tmp_path / "arms" / ".again_1.4711.tmp.safetensors").write_bytes(b"x")
    assert set(ScoredArms(tmp_path).names) == CLEAN.keys()


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="not one of the model that sampled the batch"):
        bisect(scored(tmp_path, {"live": 3.0, "routes": 3.0}))


def test_a_batch_without_arms_says_how_to_score_it(tmp_path):
    write_batch(tmp_path)
    with pytest.raises(DataError, match="no scored arms.*torchrun -m tools.score_arms"):
        bisect(ScoredArms(tmp_path))


def test_the_noise_floor_is_the_k3_between_two_recomputations(tmp_path):
    arms = scored(tmp_path, {"live": 0.01, "routes": 0.01})
    generator = torch.Generator().manual_seed(1)
    base_N = arms["routes"].logp_N
    masses = torch.zeros(4, 768, dtype=torch.float64)
    arms.add("routes", Scores(logp_N=base_N, entropy_N=-base_N, live_mass_LR=masses))
    for number in (1, 2):
        logp_N = base_N.clone()
        # Half of the tokens move, by noise of 0.02.
        logp_N[:384] += 0.02 * torch.randn(384, generator=generator)
        masses = torch.zeros(4, 768, dtype=torch.float64)
        masses[2] = number  # deviation of 0, 1, 2: 1
        arms.add(f"again {number}", Scores(logp_N=logp_N, entropy_N=-logp_N, live_mass_LR=masses))
    floor = noise_floor(arms, LAYERS)
    assert (floor.num_passes, floor.equal_share) == (3, 0.5)
    # Pairs with the base: half the square of 0.02; the pair of the two: its double. Of half of all.
    assert floor.k3.value == pytest.approx((2e-4 + 2e-4 + 4e-4) / 3 / 2, rel=0.2)
    assert floor.layers == {0: 0.0, 1: 0.0, 2: 1.0, 3: 0.0}
    assert "50.00% of the tokens" in floor.text()


def test_one_pass_has_no_noise_floor(tmp_path):
    with pytest.raises(DataError, match="needs recomputations.*--again 4"):
        noise_floor(scored(tmp_path, CLEAN))


def test_a_certificate_tells_a_no_op_from_a_change(tmp_path):
    arms, table = scored(tmp_path, {"live": 0.01, "routes": 0.01}), table_of(0)
    certificate = certify(arms, table, table_of(0))
    assert certificate.is_no_op and not certificate.is_exact
    assert (certificate.num_rows, certificate.num_unchanged) == (768 * 4, 768)
    assert "certificate: replay was a no-op" in certificate.text()
    changed = certify(arms, table, table_of(0, num_changed=5))
    assert (changed.num_differing_rows, changed.is_no_op) == (5, False)
    # Without the live routes nobody knows.
    assert not certify(arms, table, None).is_no_op
    exact = scored(tmp_path, {"live": 0.0, "routes": 0.0})
    assert certify(exact, table, table_of(0)).is_exact


def test_both_verbs_print_text_and_json_and_draw(tmp_path, capsys):
    arms = scored(tmp_path, FAULTS["routes"])
    arms.add("again 1", arms["checkpoint"])
    picture = tmp_path / "factors.svg"
    assert main(["bisect", str(tmp_path), "--picture", str(picture)]) == 1
    output = capsys.readouterr().out
    assert "Train with R3" in output and "certificate: replay changed something" in output
    assert picture.read_text().count("<rect") == 2 + len(CLEAN) - 1
    assert main(["noise", str(tmp_path), "--json"]) == 0
    assert '"equal_share": 1.0' in capsys.readouterr().out
