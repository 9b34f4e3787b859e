"""Choosing an objective, and what is said about it."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from routing_replay import objectives
from routing_replay.errors import ConfigError

ROOT = Path(__file__).parents[1]


def test_an_unknown_name_names_the_nearest():
    with pytest.raises(ConfigError, match="unknown objective.*got 'minrl'. Did you mean 'minirl'"):
        objectives.get("minrl")
    parameter = "parameter of objective 'grpo'.*got 'eps_hi'. Did you mean 'eps_high'"
    with pytest.raises(ConfigError, match=parameter):
        objectives.get("grpo", eps_hi=0.3)
    with pytest.raises(ConfigError, match="got 'dr_gspoo'. Did you mean 'dr_gspo'"):
        objectives.parameters_of("dr_gspoo")


def test_a_name_that_resembles_none_gets_all_names_and_no_suggestion():
    with pytest.raises(ConfigError) as caught:
        objectives.get("nope")
    assert "Did you mean" not in str(caught.value)
    assert all(name in str(caught.value) for name in objectives.names())


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("minirl_decoupled", {"weight": "decoupled"}),
        ("minirl_length_norm", {"aggregation": "seq-mean-token-mean"}),
        ("minirl_no_is", {"weight": "r"}),
        ("minirl_no_clip", {"masked": False}),
        ("dr_grpo", {"aggregation": "seq-mean-token-sum-norm", "advantage": "group-mean"}),
        ("dapo", {"aggregation": "token-mean", "eps_high": 0.28}),
        ("gspo_token", {"per_token": True}),
        ("dr_gspo", {"aggregation": "seq-mean-token-sum", "advantage": "group-mean"}),
    ],
)
def test_a_preset_is_its_method_with_other_parameters_which_can_be_replaced(name, changed):
    preset = next(preset for preset in objectives.presets() if preset.name == name)
    assert objectives.get(name).name == name
    assert objectives.get(name).parameters == objectives.get(preset.method, **changed).parameters
    replaced = objectives.get(name, kl_coefficient=0.5).parameters
    assert replaced == objectives.get(preset.method, **changed, kl_coefficient=0.5).parameters


def test_every_name_is_a_loss_or_a_preset_of_one():
    presets = [preset.name for preset in objectives.presets()]
    assert objectives.names() == [*objectives.methods(), *presets]
    assert (len(objectives.methods()), len(presets)) == (20, 8)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"cap": "1e-4"}, r"'cap' is of the wrong kind.*Write numbers with a dot"),
        ({"cap": True}, "'cap' is of the wrong kind"),
        ({"cap": None}, "'cap' is of the wrong kind; expected float"),
        ({"masked": 1}, "'masked' is of the wrong kind; expected bool"),
        ({"cov_low": float("inf")}, "'cov_low' is out of range; expected a finite number"),
        ({"cap": 0.0}, "'cap' is out of range; expected > 0; got 0.0"),
        ({"cap": float("nan")}, "'cap' is out of range"),
        ({"eps_low": -0.1}, "'eps_low' is out of range; expected >= 0"),
        ({"aggregation": "mean"}, "'aggregation' is not one of its values; expected token-mean"),
        ({"horizon": 1.5}, "'horizon' is of the wrong kind; expected int | None"),
        ({"kl_estimator": "k4"}, "'kl_estimator' is not one of its values"),
    ],
)
def test_values_that_cannot_be_are_refused(parameters, message):
    name = "clip_cov" if "cov_low" in parameters else "minirl"
    with pytest.raises(ConfigError, match=message):
        objectives.get(name, **parameters)


def test_parameters_can_be_shown_as_flags():
    for name in objectives.names():
        kind = objectives.parameters_of(name)
        assert dataclasses.is_dataclass(kind)
        for field in dataclasses.fields(kind):
            assert field.metadata["help"]
        if name in objectives.methods():
            assert objectives.get(name).parameters == kind()


def test_the_published_defaults():
    def of(name, *fields):
        p = objectives.get(name).parameters
        return tuple(getattr(p, field) for field in fields)

    assert of("minirl", "eps_low", "eps_high", "cap", "aggregation", "advantage") == (
        0.2,
        0.27,
        5.0,
        "seq-mean-token-sum",
        "group-mean",
    )
    assert of("gspo", "eps_low", "eps_high") == (3e-4, 4e-4)
    assert of("dapo", "eps_low", "eps_high", "aggregation") == (0.2, 0.28, "token-mean")
    assert of("sapo", "tau_positive", "tau_negative") == (1.0, 1.05)
    assert of("drpo", "delta", "horizon") == (12.5, 8192)
    assert of("icepop", "m_low", "m_high") == (0.5, 5.0)


def test_every_parameter_of_a_method_says_where_its_default_is_from():
    shared = {f.name for f in dataclasses.fields(objectives.Parameters)}
    for entry in objectives.table():
        for parameter in entry["parameters"]:
            unlimited = parameter["default"] is None
            assert parameter["name"] in shared or parameter["source"] or unlimited, entry["name"]


def test_the_table_says_everything_about_every_method():
    for entry in objectives.table():
        for section in ("summary", "equation", "reference", "use", "pitfalls"):
            assert len(entry[section]) > 10, (entry["name"], section)
    assert [entry["name"] for entry in objectives.table()] == objectives.methods()


def test_the_documentation_is_current():
    done = subprocess.run(
        [sys.executable, "tools/generate_objectives_doc.py", "--check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
