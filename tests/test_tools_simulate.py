"""The simulator: legs against closed forms by hand, its inputs' errors, its check of a run."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from routing_replay.errors import ConfigError, DataError
from tools.simulate import check
from tools.simulate.__main__ import main
from tools.simulate.designs import DESIGNS, TODAY
from tools.simulate.inputs import read_inputs
from tools.simulate.legs import Design, client_seconds, legs, limit_seconds, step_seconds

INPUTS = Path(__file__).parent.parent / "tools" / "simulate" / "inputs"

# Round numbers, so that every expectation below can be done in one's head.
MODEL = {
    "name": "round",
    "layers": 10,
    "moe_layers": 10,
    "experts": 100,
    "top_k": 10,
    "hidden": 1000,
    "vocabulary": 1000,
    "attention_heads": 1,
    "head_channels": 100,
    "parameters": 1e9,
    "active_parameters": 101e6,
}
JOB = {
    "samples": 1000,
    "prompt_tokens": 1000,
    "response_tokens": 1000,
    "longest_response_tokens": 5000,
    "capture": "ids",
    "servers": 4,
    "trainer_gpus": 8,
    "trainer_nodes": 4,
    "stores_answers": False,
}
RATES = {
    "server_tokens_per_s": 1000,
    "response_token_ms": 10,
    "trainer_tflops": 1,
    "client_request_us": 1000,
    "client_token_us": 1,
    "client_gb_per_s": 1,
    "store_gb_per_s": 0.1,
    "reward_ms": 2,
    "batch_token_us": 0.5,
    "parts_gb_per_s": 0.2,
    "verify_gb_per_s": 2,
    "token_bytes": 100,
    "json_token_bytes": 50,
    "network_gb_per_s": 1,
    "disk_write_gb_per_s": 1,
    "disk_read_gb_per_s": 2,
    "disk_total_gb_per_s": 4,
    "bucket_gb_per_s": 20,
}


def written(path, model=None, job=None, rates=None):
    content = {
        "model": MODEL | (model or {}),
        "job": JOB | (job or {}),
        "rates": {
            name: value
            if isinstance(value, dict)
            else {"value": value, "source": "measured", "how": "by hand"}
            for name, value in (RATES | (rates or {})).items()
        },
    }
    file = path / "inputs.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


@pytest.fixture
def inputs(tmp_path):
    return read_inputs(written(tmp_path))


def by_name(inputs, design):
    return {leg.name: leg for leg in legs(inputs, design)}


def test_the_legs_of_today_follow_from_the_inputs(inputs):
    found = {name: leg.seconds for name, leg in by_name(inputs, TODAY).items()}
    # 1,000 x 1,000 tokens at 4,000 tokens/s last 250 s; the longest response 50 s.
    assert found["generation"] == pytest.approx(250)
    # Requests 1 s, tokens 1 s, 2 million rows of 100 bytes in base64 0.27 s, rewards 2 s, parts of
    # 0.2 GB 1 s: hidden by 250 s.
    assert found["client beyond generation"] == 0
    assert found["batch"] == pytest.approx(1)  # 2 million tokens
    # Routes of 0.2 GB: each of 4 nodes checks its quarter, rank 0's node sends the other three.
    assert found["verification"] == pytest.approx(0.025)
    assert found["routes to the nodes"] == pytest.approx(0.15)
    # A token: 2 x 100e6 of weights and 4 x 1,000 channels x 1,000 tokens = 204e6. 2 million tokens
    # on 8 TFLOP/s take 51 s.
    assert found["old log-probs"] == pytest.approx(51)
    assert found["update"] == pytest.approx(204)
    # 2 GB: written by 4 nodes in 0.5 s, read by 4 servers together at 4 GB/s in 2 s.
    assert found["weights"] == pytest.approx(2.5)
    total = 250 + 1 + 0.025 + 0.15 + 51 + 204 + 2.5
    assert step_seconds(inputs, TODAY) == pytest.approx(total)


def test_the_clients_processor_time_bytes_and_memory_are_those_of_one_process(inputs):
    leg = by_name(inputs, TODAY)["client beyond generation"]
    assert leg.processor_s == pytest.approx(1 + 1 + 0.2 * 4 / 3 + 2 + 1)
    assert leg.network_bytes == pytest.approx(0.2e9 * 4 / 3 + 50e6)
    # Routes, and 100 bytes beside them, of 2 million tokens.
    assert leg.host_bytes == pytest.approx(2e6 * (100 + 100))
    stored = replace(inputs, job=replace(inputs.job, stores_answers=True))
    # 0.267 GB of payloads at 0.1 GB/s more.
    assert client_seconds(stored) - client_seconds(inputs) == pytest.approx(0.8 / 3 * 10)


def test_a_slow_client_is_seen_only_beyond_the_generation(tmp_path):
    # 1,000 requests of 0.3 s are 300 s of one core, of which generation hides 250 s.
    inputs = read_inputs(written(tmp_path, rates={"client_request_us": 300_000}))
    leg = by_name(inputs, TODAY)["client beyond generation"]
    assert leg.seconds == pytest.approx(300 + 1 + 0.8 / 3 + 2 + 1 - 250)


def test_gates_travel_and_are_not_kept(tmp_path):
    inputs = read_inputs(written(tmp_path, job={"capture": "gates"}))
    ids = read_inputs(written(tmp_path))
    assert inputs.model.route_bytes("gates") == 300
    gates_leg, ids_leg = (by_name(i, TODAY)["client beyond generation"] for i in (inputs, ids))
    assert gates_leg.network_bytes - ids_leg.network_bytes == pytest.approx(2e6 * 200 * 4 / 3)
    sent = by_name(inputs, TODAY)["routes to the nodes"].network_bytes
    assert sent == pytest.approx(0.15e9)


def test_ids_above_256_experts_take_two_bytes(tmp_path):
    inputs = read_inputs(written(tmp_path, model={"experts": 257}))
    assert inputs.model.route_bytes("ids") == 200


def test_the_longest_response_bounds_as_many_steps_as_run_ahead(tmp_path):
    inputs = read_inputs(written(tmp_path, job={"servers": 100}))
    two, eight = (Design(name="pool", ahead=count) for count in (2, 8))
    # 10 s of tokens, but 5,000 x 10 ms of one response.
    assert by_name(inputs, TODAY)["generation"].seconds == pytest.approx(50)
    assert by_name(inputs, TODAY)["generation"].bound == "the longest response"
    assert by_name(inputs, two)["generation"].seconds == pytest.approx(25)
    assert by_name(inputs, eight)["generation"].seconds == pytest.approx(10)


def test_padding_computes_every_sequence_as_the_longest(tmp_path):
    inputs = read_inputs(written(tmp_path, job={"is_packed": False}))
    # 1,000 x 6,000 tokens, each 2e8 + 4 x 1,000 x 3,000 operations, on 8 TFLOP/s.
    assert by_name(inputs, TODAY)["old log-probs"].seconds == pytest.approx(6e6 * 212e6 / 8e12)


def test_a_pass_without_replay_counts_by_how_often_it_is_made(tmp_path):
    inputs = read_inputs(
        written(tmp_path, job={"live_every": 10, "has_reference": True, "recompute": "none"})
    )
    found = by_name(inputs, TODAY)
    assert found["live log-probs"].seconds == pytest.approx(2 * 51 / 10)
    assert found["reference log-probs"].seconds == pytest.approx(51)
    assert found["update"].seconds == pytest.approx(3 * 51)


def test_beside_the_servers_the_clients_work_is_divided_and_each_node_gets_its_share(inputs):
    found = by_name(inputs, Design(name="beside", is_beside_servers=True))
    client = found["client beyond generation"]
    assert client.processor_s == pytest.approx((1 + 1 + 0.8 / 3 + 2 + 1) / 4)
    assert client.network_bytes == pytest.approx((0.8e9 / 3 + 50e6) / 4)
    # A quarter of 0.2 GB to each node at 1 GB/s, checked at 2 GB/s.
    assert found["routes to the nodes"].seconds == pytest.approx(0.05)
    assert found["verification"].seconds == pytest.approx(0.025)


def test_buckets_send_the_weights_once(inputs):
    weights = by_name(inputs, Design(name="buckets", has_buckets=True))["weights"]
    assert weights.seconds == pytest.approx(2 / 20)


def test_one_step_ahead_hides_the_shorter_of_sampling_and_training(inputs):
    ahead = Design(name="ahead", ahead=1)
    sampling, training, between = 250 + 1, 51 + 204, 0.025 + 0.15 + 2.5
    assert step_seconds(inputs, ahead) == pytest.approx(max(sampling, training) + between)


def test_a_checkpoint_is_a_share_of_each_step(tmp_path):
    inputs = read_inputs(written(tmp_path, job={"checkpoint_every": 10}))
    found = by_name(inputs, TODAY)["checkpoint, 1 in 10 steps"]
    # Weights 0.5 s; 12 GB of states at 4 GB/s of all nodes 3 s.
    assert found.seconds == pytest.approx(0.35)


@pytest.mark.parametrize(("nodes", "seconds"), [(1, 2 + 2), (2, 1 + 2), (4, 0.5 + 2), (8, 0.5 + 2)])
def test_weights_are_written_by_all_nodes_of_the_trainer_up_to_the_disks_rate(
    tmp_path, nodes, seconds
):
    found = by_name(read_inputs(written(tmp_path, job={"trainer_nodes": nodes})), TODAY)["weights"]
    assert found.seconds == pytest.approx(seconds)


def test_no_design_comes_below_the_limit():
    for path in INPUTS.glob("*.yaml"):
        inputs = read_inputs(path)
        limit = limit_seconds(inputs)
        assert all(step_seconds(inputs, design) >= limit for design in DESIGNS), path


def test_a_leg_is_as_firm_as_its_weakest_rate(tmp_path):
    assumed = {"value": 4, "source": "assumed", "how": "no such disk here"}
    inputs = read_inputs(written(tmp_path, rates={"disk_total_gb_per_s": assumed}))
    found = by_name(inputs, TODAY)
    assert found["weights"].source(inputs) == "assumed"
    assert found["verification"].source(inputs) == "computed"


def test_qwen3_235b_has_the_bytes_and_parameters_of_its_shapes():
    model = read_inputs(INPUTS / "qwen3_235b_256x256.yaml").model
    assert model.route_bytes("ids") == 94 * 8
    # 94 layers of 128 experts of 3 x 4,096 x 1,536; attention 2 x 4,096 x (64 + 4) x 128; router
    # 4,096 x 128; embedding and head.
    expert = 3 * 4096 * 1536
    rest = 94 * (2 * 4096 * 68 * 128 + 4096 * 128) + 2 * 151936 * 4096
    assert model.parameters == pytest.approx(94 * 128 * expert + rest, rel=0.001)
    assert model.active_parameters == pytest.approx(94 * 8 * expert + rest, rel=0.01)


@pytest.mark.parametrize(
    "section, key, value, message",
    [
        ("job", "serverz", 4, "unknown key of the inputs; expected .*; got 'serverz' .*'servers'"),
        ("job", "servers", 0, "cannot be; expected a positive whole number; got 0 .*job.servers"),
        ("job", "servers", 1.5, "cannot be; expected a positive whole number; got 1.5"),
        ("job", "capture", "idz", "unknown capture level; expected .*'idz' .*mean 'ids'"),
        ("job", "recompute", "some", "unknown recomputation"),
        ("job", "is_packed", "yes!", "expected true or false; got 'yes!'"),
        ("job", "response_tokens", 6000, "job.response_tokens is larger than job.longest_resp"),
        ("job", "trainer_nodes", 9, "job.trainer_nodes is larger than job.trainer_gpus"),
        ("model", "top_k", 101, "model.top_k is larger than model.experts; expected at most 100"),
        ("model", "parameters", "1e9", "a positive number; got '1e9' .*write 1.0e\\+9"),
        ("model", "parameters", float("nan"), "a positive number; got nan"),
        ("rates", "network_gb_per_s", 4, "not a mapping; expected the keys value, source, how"),
        (
            "rates",
            "network_gb_per_s",
            {"value": 4, "source": "guessed", "how": "?"},
            "unknown source of a rate; expected one of measured, .*rates.network_gb_per_s",
        ),
    ],
)
def test_bad_inputs_say_what_was_expected_and_where(tmp_path, section, key, value, message):
    path = written(tmp_path)
    content = yaml.safe_load(path.read_text())
    content[section][key] = value
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(ConfigError, match=re.compile(message, re.DOTALL)) as caught:
        read_inputs(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "not a mapping; expected the keys model, job, rates; got None"),
        ("model: {}\njob: {}\n", "the inputs lack keys; expected rates; got model, job"),
        ("model: [", "the simulation's inputs cannot be read"),
    ],
)
def test_files_that_hold_no_inputs_are_refused(tmp_path, text, message):
    path = tmp_path / "inputs.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_inputs(path)


def run_folder(path, steps):
    config = {
        "prompts_per_step": 100,
        "samples_per_prompt": 10,
        "max_new_tokens": 5000,
        "rollout_url": ["a", "b", "c", "d"],
        "nnodes": 4,
        "nproc": 2,
        "microbatch_tokens": 8192,
        "recompute": "full",
        "measure_live_every": 0,
        "store_answers": False,
    }
    (path / "config.json").write_text(json.dumps(config))
    records = [{"step": 0, "time_s": 1.0}, *steps]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (path / "metrics.jsonl").write_text(lines)
    return path


def record(step, rollout, old, update, weights):
    return {
        "step": step,
        "rollout/response_length": 1000,
        "time/rollout_s": rollout,
        "time/old_log-probs_s": old,
        "time/update_s": update,
        "time/weights_s": weights,
    }


def test_a_run_is_compared_clock_by_clock(tmp_path, inputs):
    folder = run_folder(
        tmp_path,
        [record(1, 250, 51, 200, 4), record(2, 260, 51, 204, 5), record(3, 999, 60, 300, 10)],
    )
    run = check.read_run(folder)
    found = {one.clock: one for one in check.compare(inputs, run, "median")}
    assert found["rollout"].predicted_s == pytest.approx(251.175)
    assert found["rollout"].measured_s == 260
    assert found["update"].ratio == pytest.approx(1)
    assert found["step"].measured_s == pytest.approx(260 + 51 + 204 + 5)
    fastest = {one.clock: one for one in check.compare(inputs, run, "fastest")}
    assert fastest["weights"].measured_s == 4


def test_a_run_one_step_ahead_is_compared_by_what_its_clocks_mean(tmp_path, inputs):
    folder = run_folder(tmp_path, [record(1, 0.175, 51, 204, 0.1) | {"time/sampling_s": 251}])
    config = json.loads((folder / "config.json").read_text()) | {"ahead": 1, "publish": "buckets"}
    (folder / "config.json").write_text(json.dumps(config))
    run = check.read_run(folder)
    found = {one.clock: one for one in check.compare(inputs, run, "median")}
    # 255 s of training hide 251 s of sampling; sending and verifying routes take 0.175 s.
    assert found["sampling"].predicted_s == pytest.approx(251)
    assert found["rollout"].predicted_s == pytest.approx(0.175)
    assert found["step"].predicted_s == pytest.approx(0.175 + 51 + 204 + 0.1)
    assert found["step"].measured_s == pytest.approx(0.175 + 51 + 204 + 0.1)
    with pytest.raises(DataError, match="fitted to runs of the default design"):
        check.fitted(inputs, run, "median", folder)
    config |= {"ahead": 2, "publish_pause": "retract"}
    (folder / "config.json").write_text(json.dumps(config))
    several = {one.clock: one for one in check.compare(inputs, check.read_run(folder), "median")}
    assert several["step"] == found["step"] and "sampling" not in several


def test_rates_fitted_to_a_run_predict_it(tmp_path, inputs):
    folder = run_folder(tmp_path, [record(1, 101.175, 102, 408, 8)])
    run = check.read_run(folder)
    rates = check.fitted(inputs, run, "median", folder)
    # Twice the seconds of the passes are half of the rate; 100 s beside the 1.175 s of the files.
    assert rates["trainer_tflops"].value == pytest.approx(0.5)
    assert rates["server_tokens_per_s"].value == pytest.approx(1e6 / 4 / 100)
    refitted = replace(inputs, rates=replace(inputs.rates, **rates))
    found = {one.clock: one.ratio for one in check.compare(refitted, run, "median")}
    assert found["rollout"] == pytest.approx(1)
    assert found["old_log-probs"] == found["update"] == pytest.approx(1)


def test_the_command_fails_when_a_leg_is_far_off(tmp_path, capsys):
    path = written(tmp_path)
    folder = run_folder(tmp_path, [record(1, 255, 51, 204, 2.5)])
    assert main([str(path), "--check", str(folder)]) == 0
    run_folder(tmp_path, [record(1, 255, 51, 100, 5)])
    assert main([str(path), "--check", str(folder)]) == 1
    assert "| update | 204 | 100 | 2.04, not within 20% |" in capsys.readouterr().out


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(DataError, match="the run's configuration cannot be read"):
        check.read_run(tmp_path)
    run_folder(tmp_path, [])
    with pytest.raises(DataError, match="no step to compare with; .*got 0 records"):
        check.read_run(tmp_path)


def test_the_command_prints_every_design_and_draws_them(tmp_path, capsys):
    path, picture = written(tmp_path), tmp_path / "designs.svg"
    assert main([str(path), "--picture", str(picture), "--rates"]) == 0
    printed = capsys.readouterr().out
    assert all(f"## {design.name}" in printed for design in DESIGNS)
    assert "| default | 508.7 | 1.00 |" in printed
    assert "| network_gb_per_s | 1 | measured | by hand |" in printed
    assert picture.read_text().count("<rect") == 1 + len(DESIGNS) + 1  # ground, designs, limit


def test_values_can_be_set_on_the_command_line(tmp_path, capsys):
    path = str(written(tmp_path))
    assert main([path, "--set", "job.servers=8", "--set", "rates.trainer_tflops=2"]) == 0
    assert "8 servers" in capsys.readouterr().out
    assert main([path, "--set", "servers=8"]) == 2
    assert "a change of the inputs has another form" in capsys.readouterr().err
    assert main([path, "--set", "job.servrs=8"]) == 2
    assert "Did you mean 'servers'?" in capsys.readouterr().err
