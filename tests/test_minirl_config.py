"""recipes.minirl: presets, YAML and flags have the same keys, and mistakes are named."""

import json

import pytest
import yaml

from recipes.minirl.data.inputs import load_inputs
from recipes.minirl.launch.devices import require_own_devices
from recipes.minirl.settings.command_line import PRESETS, make_parser, parse, preset_names
from recipes.minirl.settings.config import RecipeConfig
from recipes.minirl.settings.sections import known_settings
from routing_replay import objectives
from routing_replay.errors import CheckpointError, ConfigError

GRPO = ["--objective", "grpo", "--objective-parameters"]


def write(path, text):
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_is_a_whole_configuration_that_says_whether_it_has_been_run(name):
    argv = ["--preset", name]
    assert parse(argv).num_mini_batches >= 1
    comment = (PRESETS / f"{name}.yaml").read_text().lower()
    assert "has been run" in comment or "has not been run" in comment


def test_a_flag_wins_over_the_yaml_file_and_the_file_over_the_preset(tmp_path):
    config = write(tmp_path / "c.yaml", "steps: 7\nlearning-rate: 1e-5\n")
    assert parse(["--config", config]).run.steps == 7
    assert parse(["--config", config]).training.learning_rate == 1e-5
    assert parse(["--config", config, "--steps", "8"]).run.steps == 8
    preset = yaml.safe_load((PRESETS / "tiny_cpu.yaml").read_text())
    assert parse([]).run.steps == preset["steps"]


def test_settings_of_replay_come_from_their_own_file_with_or_without_the_prefix(tmp_path):
    config = write(tmp_path / "r.yaml", "mode: R2\nrouting_replay_capture: ids\n")
    parsed = parse(["--routing-replay-config", config])
    assert (parsed.replay.mode, parsed.telemetry.capture) == ("R2", "ids")
    argv = ["--routing-replay-config", config, "--routing-replay-mode", "disabled"]
    assert parse(argv).replay.mode == "disabled"


def test_all_keys_survive_the_way_through_the_stored_configuration():
    config = parse(["--rollout-url", "http://a", "http://b", "--objective-parameters", "cap=2"])
    stored = json.loads(json.dumps(config.to_mapping()))
    assert RecipeConfig.from_mapping(stored) == config
    assert set(stored) == set(known_settings())


def test_the_help_text_explains_every_key():
    text = make_parser().format_help()
    for name in known_settings():
        assert "--" + name.replace("_", "-") in text


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--stesp", "3"], "unknown flag '--stesp'. Did you mean '--steps'?"),
        (["--preset", "tiny_gpu"], "unknown preset 'tiny_gpu'. Did you mean 'tiny_cpu'?"),
        (["--minibatch-size", "100"], "expected a divisor of 512; got 100"),
        (["--nproc", "3", "--tensor-parallel", "2"], "expected a multiple of 2; got 3"),
        (["--objective-parameters", "eps=3"], "got 'eps'. Did you mean 'eps_low'?"),
        (["--objective-parameters", "cap"], "has no value; expected name=value; got 'cap'"),
        (["--resume"], "expected --run-dir DIR --resume, without --preset"),
        (["--temperature", "0"], "'temperature' is out of range; expected above 0"),
        (["--prompts", "x.jsonl"], "only one of prompts and heldout_prompts is set"),
        (["--objective", "minrl"], "got 'minrl'. Did you mean 'minirl'?"),
        (["--objective", "gsop"], "got 'gsop'. Did you mean 'gspo'?"),
        (
            ["--objective-parameters", "advantage=gae"],
            "'advantage' is not one of its values; expected group-mean, ",
        ),
        (
            ["--objective", "dppo_topk", "--topk-logprobs", "0"],
            "'topk_logprobs' is out of range",
        ),
        (["--top-p", "0.9"], "mask only for requests with a finite top_k; expected --top-k N"),
        (["--max-uncovered", "2"], "'max_uncovered' is out of range; expected 0..1; got 2.0"),
        (["--top-p", "0"], "'top_p' is out of range; expected above 0, at most 1; got 0.0"),
        (["--top-k", "1"], "'top_k' is out of range; expected 0 (all), or 2 and more; got 1"),
        (["--dynamic-sampling", "-1"], "'dynamic_sampling' is out of range; expected >= 0; got -1"),
        (
            ["--overlong-cache", "6"],
            "of range; expected 0..5, the longest response; got 6",
        ),
        (
            ["--smoothing-wrong", "-0.1"],
            "out of range; expected >= 0; got -0.1",
        ),
        (
            ["--reward-kl-coefficient", "-1"],
            "'reward_kl_coefficient' is out of range",
        ),
        (["--internal-layer", "1"], "objective 'minirl' with these parameters compares more than"),
        (
            ["--internal-layer", "1", "--objective", "grpo", "--recompute", "full"],
            "pipeline_parallel 1, and recompute none or moe; got 1 and full",
        ),
        (
            ["--internal-layer", "1", *GRPO, "kl_coefficient=0.1"],
            "expected grpo, dapo, gspo and the like, without correction and KL",
        ),
        (["--internal-layer", "1", *GRPO, "veto_below=1e-4"], "without correction and KL"),
        (["--num-servers", "2"], "one server on this machine; expected --num-servers 1, or --ray"),
        (
            ["--num-servers", "2", "--ray", "auto", "--rollout-url", "http://a:1"],
            "got --num-servers 2 beside 1 of --rollout-url",
        ),
        (
            ["--ray", "auto", "--trainer-gpus", "0"],
            "Ray chooses the devices and ports of a run; expected none of --rollout-gpus, ",
        ),
        (["--publish-bucket-mb", "0"], "'publish_bucket_mb' is out of range; expected above 0"),
        (["--publish", "buckets", "--weights", "bridge"], "gathers whole tensors on one rank only"),
        (
            ["--publish", "buckets", "--nnodes", "2", "--rollout-url", "http://127.0.0.1:30000"],
            "cannot send weights to a server without an address",
        ),
        (
            ["--publish", "tensors", "--nnodes", "2", "--rollout-url", "http://10.0.0.1:30000"],
            "need the trainer and the servers on one machine; expected nnodes 1",
        ),
        (
            ["--publish", "tensors", "--weights", "bridge"],
            "expected weights: own beside publish: tensors",
        ),
    ],
)
def test_a_wrong_command_line_is_answered_with_what_to_do(argv, message):
    with pytest.raises(ConfigError) as caught:
        parse(argv)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["--rollout-gpus", "0,1", "--trainer-gpus", "1,2"],
            "the server and the trainer share GPUs; expected disjoint --rollout-gpus and "
            "--trainer-gpus; got 1 in both",
        ),
        (
            ["--nproc", "4", "--trainer-gpus", "4,5,6"],
            "fewer GPUs than trainer processes; expected 4 in --trainer-gpus",
        ),
        (["--nnodes", "2", "--tensor-parallel", "4"], "must divide nnodes * nproc; expected a mul"),
    ],
)
def test_ranks_and_devices_that_do_not_fit_are_refused(argv, message):
    with pytest.raises(ConfigError) as caught:
        parse(argv)
    assert message in str(caught.value)


def test_a_server_of_bounded_memory_that_reads_shared_tensors_may_have_the_trainers_gpus():
    same = ["--rollout-gpus", "0,1", "--trainer-gpus", "0,1", "--nproc", "2"]
    bounded = ["--server-arguments=--mem-fraction-static=0.4"]
    parse([*same, "--publish", "tensors", *bounded])
    for argv in (bounded, ["--publish", "tensors"], ["--publish", "buckets", *bounded]):
        with pytest.raises(ConfigError, match="share GPUs.*--publish tensors and bound"):
            parse([*same, *argv])


def test_a_server_is_not_launched_on_the_gpus_of_the_trainer():
    model = ["--model", "large", "--prompts", "a.jsonl", "--heldout-prompts", "b.jsonl"]
    divided = ["--rollout-gpus", "0,1", "--trainer-gpus", "2,3"]
    for argv in ([*model, *divided], [*model, "--rollout-url", "http://a"], ["--model", "tiny"]):
        require_own_devices(parse(argv), num_gpus=8)
    require_own_devices(parse(model), num_gpus=0)
    for argv in ([], ["--rollout-gpus", "0"], ["--trainer-gpus", "1"]):
        with pytest.raises(ConfigError, match="would share GPUs.*--trainer-gpus 4,5,6,7"):
            require_own_devices(parse([*model, *argv]), num_gpus=8)


def test_an_unknown_key_in_a_file_is_named_with_the_file(tmp_path):
    config = write(tmp_path / "c.yaml", "learning_rat: 1\n")
    with pytest.raises(ConfigError, match=r"'learning_rat' \[.*c\.yaml\]\. Did you mean 'learn"):
        parse(["--config", config])


def test_a_value_of_the_wrong_kind_is_refused(tmp_path):
    config = write(tmp_path / "c.yaml", "steps: many\n")
    with pytest.raises(ConfigError, match="'steps' has the wrong type; expected int; got 'many'"):
        parse(["--config", config])


def test_n_is_the_global_batch_by_the_mini_batch_and_decides_the_mode_auto():
    argv = ["--prompts-per-step", "8", "--samples-per-prompt", "4", "--routing-replay-mode", "auto"]
    for minibatch_size, mode in ((32, "disabled"), (16, "R2"), (8, "R3")):
        config = parse([*argv, "--minibatch-size", str(minibatch_size), "--microbatch-size", "8"])
        # 8 * 4 = 32 responses per step
        assert config.num_mini_batches == 32 // minibatch_size
        assert config.replay.resolve(config.num_mini_batches).mode == mode


AHEAD = ["--ahead", "1"]


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["--objective", "minirl_decoupled"],
        ["--objective", "icepop"],
        ["--objective", "m2po"],
        ["--objective", "dapo", "--objective-parameters", "correction=tis-token"],
    ],
)
def test_objectives_that_look_at_mu_may_be_sampled_ahead(argv):
    assert parse(argv).rollout.ahead == 0
    assert parse([*AHEAD, *argv]).rollout.ahead == 1


@pytest.mark.parametrize("pause", ["retract", "in_place"])
def test_rollouts_of_several_steps_may_run_where_new_weights_stop_them(pause):
    config = parse(["--ahead", "3", "--publish-pause", pause])
    # Nothing is older, so all routes are replayed unless a smaller lag is asked for.
    assert config.max_version_lag == 3
    assert config.replay.resolve(1, version_lag=config.rollout.ahead).mode == "R3"
    lagging = parse(["--ahead", "3", "--publish-pause", pause, "--max-version-lag", "2"])
    assert lagging.max_version_lag == 2


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--ahead", "-1"], "'ahead' is out of range; expected >= 0; got -1"),
        (
            ["--ahead", "2"],
            "several steps do not end between two steps; expected --publish-pause retract.*"
            "got --publish-pause wait, --ahead 2",
        ),
        (
            ["--ahead", "2", "--publish-pause", "retract", "--dynamic-sampling", "1"],
            "tells only at a step's end which prompts.*--ahead of at most 1",
        ),
        (
            [*AHEAD, "--objective", "dapo"],
            r"'dapo' with these parameters does not look at mu.*correction=tis-token, or --ahead 0",
        ),
        ([*AHEAD, "--objective", "minirl_no_is"], "does not look at mu"),
        ([*AHEAD, "--max-version-lag", "-2"], "'max_version_lag' is out of range"),
        (
            [*AHEAD, "--max-version-lag", "0", "--plan", "packing", "--expert-parallel", "2"]
            + ["--nproc", "2"],
            "planned by routes that are not replayed; expected --max-version-lag of at least 1",
        ),
    ],
)
def test_what_cannot_be_sampled_ahead_is_refused(argv, message):
    with pytest.raises(ConfigError, match=message):
        parse(argv)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"model_type": "llama"}', "or glm4_moe or qwen3_moe; got 'llama'"),
        ("{", "config.json cannot be read"),
    ],
)
def test_a_checkpoint_that_cannot_be_trained_is_refused_before_a_server_starts(
    tmp_path, content, message
):
    (tmp_path / "config.json").write_text(content)
    (tmp_path / "a.jsonl").write_text('{"prompt": "1", "answer": "1", "verifier": "exact"}\n')
    path = str(tmp_path / "a.jsonl")
    config = parse(["--model", str(tmp_path), "--prompts", path, "--heldout-prompts", path])
    with pytest.raises(CheckpointError, match=message):
        load_inputs(config)


def as_text(value):
    return "null" if value is None else str(value)


@pytest.mark.parametrize("name", objectives.names())
def test_every_parameter_of_every_objective_can_be_a_flag_and_a_yaml_key(name, tmp_path):
    """Its default, written out, is its default; YAML nests the parameters as a mapping."""
    default = objectives.get(name).parameters
    values = {f: getattr(default, f) for f in vars(default)}
    pairs = [f"{field}={as_text(value)}" for field, value in values.items()]
    argv = ["--objective", name, "--objective-parameters", *pairs]
    assert parse(argv).make_objective().parameters == default
    text = yaml.safe_dump({"objective": name, "objective_parameters": values})
    config = write(tmp_path / "c.yaml", text)
    assert parse(["--config", config]).make_objective().parameters == default


def test_parameters_given_as_flags_and_in_yaml_arrive(tmp_path):
    flags = ["cap=2", "eps_high=1e-1", "veto_below=1.0e-4", "aggregation=token-mean", "horizon=9"]
    p = parse(["--objective-parameters", *flags]).make_objective().parameters
    assert (p.cap, p.eps_high, p.veto_below, p.aggregation, p.horizon) == (
        2,
        0.1,
        1e-4,
        "token-mean",
        9,
    )
    text = "objective: dapo\nobjective_parameters: {eps_high: 0.3, correction: tis-token}\n"
    objective = parse(["--config", write(tmp_path / "c.yaml", text)]).make_objective()
    assert (objective.name, objective.parameters.eps_high) == ("dapo", 0.3)
    assert objective.parameters.correction == "tis-token"


def test_objective_help_is_the_table_of_all_objectives(capsys):
    with pytest.raises(SystemExit) as caught:
        parse(["--objective", "help"])
    assert caught.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    for entry in objectives.table():
        at = lines.index(f"{entry['name']}: {entry['summary']}")
        assert lines[at + 1].strip() == f"equation: {entry['equation']}"


@pytest.mark.parametrize(
    ("argv", "has_mask", "needs_reference", "num_top_logprobs"),
    [
        ([], False, False, 0),
        (["--top-k", "50"], True, False, 0),
        (["--top-p", "0.9", "--top-k", "50"], True, False, 0),
        (["--top-p", "0.9", "--no-keep-sampling-mask"], False, False, 0),
        (["--objective-parameters", "kl_coefficient=0.1"], False, True, 0),
        (["--objective-parameters", "kl_coefficient=0.1", "kl_reference=mu"], False, False, 0),
        (["--reward-kl-coefficient", "0.1"], False, True, 0),
        (["--objective", "dppo_topk"], False, False, 20),
    ],
)
def test_what_a_run_needs_follows_from_its_settings(
    argv, has_mask, needs_reference, num_top_logprobs
):
    config = parse(argv)
    assert config.has_sampling_mask is has_mask
    assert config.needs_reference is needs_reference
    assert config.num_top_logprobs == num_top_logprobs


def test_interleaved_stages_need_whole_rounds_of_microbatches():
    flags = ["--nproc", "2", "--pipeline-parallel", "2", "--virtual-pipeline", "2"]
    assert parse([*flags, "--microbatch-size", "64"]).training.virtual_pipeline == 2
    with pytest.raises(ConfigError, match="multiple of pipeline_parallel 2.*got 1 microbatches"):
        parse([*flags, "--microbatch-size", "128"])


def test_replayed_weights_must_be_captured():
    weights = {"routing_replay_weights": "frozen"}
    with pytest.raises(ConfigError, match="not asked for the weights.*got gates"):
        RecipeConfig.from_mapping(weights)
    captured = weights | {"routing_replay_capture": "weights"}
    assert RecipeConfig.from_mapping(captured).rollout_capture == "weights"
    RecipeConfig.from_mapping(weights | {"routing_replay_mode": "disabled"})
