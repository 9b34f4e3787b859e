"""recipes.minirl's launcher and the trainer's start: what is checked before an engine runs."""

import json
import re
from pathlib import Path

import pytest
import torch

from recipes.minirl import __main__ as launcher
from recipes.minirl.launch import commands
from recipes.minirl.launch.devices import (
    require_gpu,
    require_gpu_per_rank,
    require_own_devices,
    why_no_cuda,
)
from recipes.minirl.launch.processes import server_options
from recipes.minirl.settings.checks import require_ready
from recipes.minirl.settings.command_line import parse, parse_command
from routing_replay.errors import ConfigError


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A run that `--prepare-only` has made: its folder, its configuration, what was printed."""
    folder = tmp_path_factory.mktemp("prepared")
    (folder / "config.json").write_text('{"model_type": "qwen3_moe"}')
    prompts = folder / "prompts.jsonl"
    prompts.write_text('{"prompt": "1+1=", "answer": "2"}\n')
    flags = ["--model", str(folder), "--prompts", str(prompts), "--heldout-prompts", str(prompts)]
    flags += ["--run-dir", str(folder / "run"), "--nnodes", "2", "--routing-replay-mode", "auto"]
    command = parse_command([*flags, "--prepare-only"])
    assert command.action == "prepare"
    return launcher.prepare(command.config)


def test_a_prepared_run_has_a_resolved_mode(prepared):
    _, run_dir = prepared
    # 64 prompts * 8 samples / 128 = 4 mini-batches: R3.
    assert json.loads((run_dir / "config.json").read_text())["routing_replay_mode"] == "R3"


def test_the_printed_commands_start_server_and_both_nodes(prepared):
    output = commands.text(*prepared)
    assert "env ROUTING_REPLAY_CAPTURE=gates" in output
    assert "--enable-return-routed-experts" in output
    for node in range(2):
        command = f"-m recipes.minirl.node {prepared[1]} --node-rank {node} --master-addr NODE0"
        assert command in output


def test_a_server_has_a_tokenizer_where_a_text_ends_the_calls_of_a_tool(prepared):
    """SGLang refuses stop strings without one."""
    assert "--skip-tokenizer-init" in commands.server_command(prepared[0])
    config = parse(["--preset", "tiny_agent"])
    assert commands.request_arguments(config) == []


def test_servers_of_several_rollouts_take_the_earliest_step_first():
    config = parse(["--ahead", "2", "--publish-pause", "retract"])
    arguments = ["--enable-priority-scheduling", "--disable-priority-preemption"]
    assert commands.request_arguments(config)[1:] == arguments
    assert server_options(config, None).arguments[3:5] == tuple(arguments)
    assert commands.request_arguments(parse(["--ahead", "1"])) == ["--skip-tokenizer-init"]


def test_prepare_only_writes_one_slurm_job_and_names_it(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"model_type": "qwen3_moe"}')
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "1+1=", "answer": "2"}\n')
    flags = ["--model", str(tmp_path), "--prompts", str(prompts), "--heldout-prompts", str(prompts)]
    run_dir = tmp_path / "run"
    assert launcher.main([*flags, "--run-dir", str(run_dir), "--prepare-only"]) == 0
    assert f"sbatch {run_dir}/job.sbatch" in capsys.readouterr().out
    assert f"recipes.minirl.train {run_dir} " in (run_dir / "job.sbatch").read_text()
    assert (run_dir / "logs").is_dir()


def test_the_launcher_does_not_start_one_node_of_two():
    with pytest.raises(ConfigError, match="this machine only.*got 2.*--prepare-only"):
        launcher.run(parse(["--nnodes", "2"]))


@pytest.mark.parametrize(
    ("argv", "world_size", "message"),
    [
        (
            ["--routing-replay-mode", "auto"],
            1,
            "not resolved; expected disabled, R2 or R3",
        ),
        (["--nnodes", "2", "--nproc", "2"], 2, "nnodes \\* nproc = 2 \\* 2; got 2 from torchrun"),
    ],
)
def test_a_trainer_refuses_a_configuration_that_nobody_has_prepared(argv, world_size, message):
    with pytest.raises(ConfigError, match=message + r".*\[run/config\.json\].*--prepare-only"):
        require_ready(parse(argv), world_size, Path("run/config.json"))


def test_a_preset_for_gpus_does_not_train_on_a_cpu_in_silence():
    too_old = "The NVIDIA driver on your system is too old (found version 11040)"
    for_gpus = parse(["--plan-gpu-gb", "80"])
    with pytest.raises(ConfigError, match=r"no GPU.*of 80 GB.*too old.*Install a driver"):
        require_gpu(for_gpus, too_old)
    require_gpu(for_gpus, None)
    require_gpu(parse([]), too_old)  # the CPU's own preset


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what torch says without a GPU")
def test_the_reason_for_no_gpu_is_torchs_own():
    assert re.search(r"(CUDA|NVIDIA).*\(torch \d", why_no_cuda() or "")


def test_block_fp8_rollouts_are_not_launched_on_a_cpu():
    config = parse(["--rollout-weights", "fp8"])
    with pytest.raises(ConfigError, match="block FP8 rollouts need GPUs.*fp8-grid"):
        require_own_devices(config, num_gpus=0)


def test_fewer_visible_gpus_than_ranks_are_refused_before_nccl_starts():
    message = r"fewer GPUs than.*expected 4 GPUs.*got 2.*CUDA_VISIBLE_DEVICES.*lower --nproc"
    with pytest.raises(ConfigError, match=message):
        require_gpu_per_rank(2, 4)
    for num_gpus in (0, 4, 8):  # the CPU, enough, more
        require_gpu_per_rank(num_gpus, 4)
    tiny = parse(["--nproc", "2"])
    with pytest.raises(ConfigError, match="a machine shows fewer GPUs"):
        require_own_devices(tiny, num_gpus=1)


def test_a_gpu_that_the_machine_does_not_have_is_named():
    divided = ["--rollout-gpus", "0,1,2,3", "--trainer-gpus", "4,5,6,7"]
    message = r"a GPU is named that the machine does not have; expected GPUs of 0\.\.5.*got 6, 7"
    with pytest.raises(ConfigError, match=message):
        require_own_devices(parse(divided), num_gpus=6)
    require_own_devices(parse(divided), num_gpus=8)
    # A plan knows the machine from plan_gpus_per_node.
    with pytest.raises(ConfigError, match=r"expected GPUs of 0\.\.3.*got 4, 5, 6, 7"):
        parse([*divided, "--plan-gpu-gb", "80", "--plan-gpus-per-node", "4"])


def test_megatron_bridge_does_not_convert_experts_that_have_moved():
    with pytest.raises(ConfigError, match="Bridge's converter.*got weights: bridge, plan: both"):
        parse(["--weights", "bridge", "--plan", "both"])


def test_a_resolved_configuration_with_its_ranks_is_accepted():
    require_ready(parse(["--nnodes", "2", "--nproc", "2"]), 4, Path("run/config.json"))


def test_the_result_of_a_run_sampled_ahead_is_of_one_version_lag(tmp_path):
    records = [
        {"step": 1, "train_infer/kl_k3": 1.0, "train_infer/kl_k3_live": 1.0},
        *(
            {
                "step": step,
                "rollout/version_lag": 1.0,
                "train_infer/kl_k3_lag_1": 2e-3,
                "train_infer/kl_k3_live_lag_1": 6e-3,
            }
            for step in (2, 3)
        ),
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    assert launcher.result_line(tmp_path, 120.0) == (
        "Result: 3 steps in 2.0 min; k3 KL 6.00e-03 live, 2.00e-03 as trained "
        "(3.0x; median of the steps 3.0x) at version lag 1"
    )
