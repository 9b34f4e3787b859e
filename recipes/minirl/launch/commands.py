"""The commands of a run: its servers, and its trainer on one node or on several."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from routing_replay.capture import CaptureSettings

from ..data.inputs import server_folder
from ..settings.config import RecipeConfig


def text(config: RecipeConfig, run_dir: Path) -> str:
    """Return what to start where, for a run whose folder all nodes see."""
    urls = config.rollout.rollout_url or ("http://SERVER:30000",)
    commands = {"Server, on GPUs of its own": shlex.join(server_command(config))}
    for node in range(config.run.nnodes):
        commands[f"Node {node}"] = shlex.join(node_command(config, run_dir, urls, node))
    commands["Report"] = f"routing-replay report {run_dir} -o {run_dir}/report.html"
    return "".join(f"\n{title}:\n  {command}\n" for title, command in commands.items())


def server_command(config: RecipeConfig) -> list[str]:
    """Return the command of a server that the run can use, without addresses and parallelism."""
    capture = CaptureSettings(level=config.rollout_capture).to_environment()
    command = ["env", *(f"{name}={value}" for name, value in capture.items())]
    command += [config.rollout.rollout_python or "python", "-m", "sglang.launch_server"]
    command += ["--model-path", str(server_folder(config)), "--host", "0.0.0.0"]
    command += ["--port", "30000", "--dtype", config.rollout.rollout_dtype]
    if config.rollout_capture != "off":
        command.append("--enable-return-routed-experts")
    return [*command, *request_arguments(config), *config.rollout.server_arguments]


def request_arguments(config: RecipeConfig) -> list[str]:
    """Return the server's arguments that follow from a run's requests.

    Token ids go in and out: there is nothing to detokenize, unless a tool's call ends with a text.
    Where rollouts of several steps run at once, requests have priorities: SGLang puts retracted
    ones at the end of its queue, and the oldest step would wait for the newest.
    """
    arguments = ["--skip-tokenizer-init"] if config.rollout.tool == "none" else []
    if config.has_priorities:
        arguments += ["--enable-priority-scheduling", "--disable-priority-preemption"]
    return arguments


def node_command(
    config: RecipeConfig, run_dir: Path, urls: Sequence[str], node: int, address: str = "NODE0"
) -> list[str]:
    """Return the command of one node of the trainer."""
    if config.run.nnodes == 1:
        return ["python", "-m", "torch.distributed.run", *trainer_arguments(config, run_dir, urls)]
    command = ["python", "-m", "recipes.minirl.node", str(run_dir), "--node-rank", str(node)]
    return [*command, "--master-addr", address, "--master-port", "29500", "--rollout-url", *urls]


def trainer_arguments(config: RecipeConfig, run_dir: Path, urls: Sequence[str]) -> list[str]:
    """Return torchrun's arguments that are alike on all nodes."""
    ranks = ["--nproc-per-node", str(config.run.nproc)]
    return [*ranks, "-m", "recipes.minirl.train", str(run_dir), "--rollout-url", *urls]


def visible_devices(gpus: str) -> dict[str, str]:
    """Return the environment that restricts a process to some CUDA devices; empty: all of them."""
    return {"CUDA_VISIBLE_DEVICES": gpus} if gpus else {}


def thread_environment(
    config: RecipeConfig, num_processes: int, num_cores: int | None = None
) -> dict[str, str]:
    """Return the environment that shares the cores, of this machine or so many, among processes."""
    num_cores = num_cores or os.cpu_count() or 1
    threads = config.run.cpu_threads or max(1, num_cores // num_processes)
    return {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
