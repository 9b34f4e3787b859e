"""Settings: flags, YAML and Python agree, and a wrong name says which was meant."""

import argparse

import pytest

from routing_replay.config import ReplayConfig, add_arguments, choose_mode
from routing_replay.errors import ConfigError


def parse(*flags):
    return ReplayConfig.from_arguments(add_arguments(argparse.ArgumentParser()).parse_args(flags))


def test_a_flag_wins_over_the_file_and_the_file_over_the_default(tmp_path):
    path = tmp_path / "replay.yaml"
    path.write_text("routing_replay_mode: R2\nagreement-every: 7\n")
    config = parse("--routing-replay-config", str(path), "--routing-replay-mode", "R3")
    assert (config.mode, config.agreement_every, config.agreement_tokens) == ("R3", 7, 512)


def test_no_flag_gives_the_defaults():
    assert parse() == ReplayConfig()


def test_an_unknown_key_names_the_nearest(tmp_path):
    path = tmp_path / "replay.yaml"
    path.write_text("agreement_evry: 3\n")
    with pytest.raises(ConfigError, match="Did you mean 'agreement_every'"):
        ReplayConfig.from_yaml(path)


@pytest.mark.parametrize("content", ["- a\n", "a: [\n"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path, content):
    path = tmp_path / "replay.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match="replay.yaml"):
        ReplayConfig.from_yaml(path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "r3"}, "unknown mode.*Did you mean 'R3'"),
        ({"agreement_every": -1}, "an integer >= 0; got -1"),
        ({"agreement_tokens": True}, "an integer >= 0; got True"),
    ],
)
def test_values_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        ReplayConfig(**settings)


@pytest.mark.parametrize(
    ("num", "mode"), [(1, "disabled"), (2, "R2"), (3, "R2"), (4, "R3"), (8, "R3")]
)
def test_auto_follows_the_papers_findings(num, mode):
    assert ReplayConfig(mode="auto").resolve(num).mode == mode
    assert ReplayConfig(mode="R2").resolve(num).mode == "R2"


@pytest.mark.parametrize("num", [1, 2, 3, 4])
def test_auto_replays_the_rollouts_routes_where_its_weights_are_older(num):
    # Between mu and pi_old R2 changes nothing, however many mini-batches follow.
    assert ReplayConfig(mode="auto").resolve(num, version_lag=1).mode == "R3"
    assert ReplayConfig(mode="R2").resolve(num, version_lag=1).mode == "R2"


def test_fewer_than_one_mini_batch_is_refused():
    with pytest.raises(ConfigError, match="mini-batches"):
        choose_mode(0)
