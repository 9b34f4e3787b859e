"""GPUs of a run: whose they are, and whether there are enough of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from routing_replay.errors import ConfigError

if TYPE_CHECKING:
    from ..settings.config import RecipeConfig


def check_devices(config: RecipeConfig) -> None:
    """Raise ConfigError if there are too few CUDA devices, or server and trainer share some.

    They may, where shared tensors go between them and the server's memory is bounded: both keep
    theirs for the whole run.
    """
    served, trained = _listed(config.rollout.rollout_gpus), _listed(config.run.trainer_gpus)
    shared = sorted(set(served) & set(trained))
    r = config.rollout
    is_bounded = any(text.startswith("--mem-fraction-static") for text in r.server_arguments)
    if shared and not (r.publish == "tensors" and is_bounded):
        raise ConfigError(
            "the server and the trainer share GPUs",
            expected="disjoint --rollout-gpus and --trainer-gpus",
            got=f"{', '.join(shared)} in both",
            fix="Divide them, or choose --publish tensors and bound the server's memory: "
            "--server-arguments=--mem-fraction-static=0.4",
        )
    if trained and len(trained) < config.run.nproc:
        raise ConfigError(
            "there are fewer GPUs than trainer processes",
            expected=f"{config.run.nproc} in --trainer-gpus, one per process",
            got=config.run.trainer_gpus,
        )
    if config.plan.plan_gpu_gb:
        _require_existing([*served, *trained], config.plan.plan_gpus_per_node)


def require_own_devices(config: RecipeConfig, num_gpus: int) -> None:
    """Refuse to launch a server on the trainer's GPUs, or more ranks than there are GPUs.

    SGLang takes most of a GPU's memory at its start, and keeps it. The tiny model leaves room: its
    presets bound the server's cache.

    Args:
        config: Of a run whose server and trainer start on this machine.
        num_gpus: That torch sees here; 0: the CPU trains.

    Raises:
        ConfigError: A server would be launched on a machine with GPUs that are not divided, or
            without any for FP8; or a GPU is missing.
    """
    if config.rollout.rollout_weights == "fp8" and not config.rollout.rollout_url and not num_gpus:
        raise ConfigError(
            "block FP8 rollouts need GPUs",
            expected="a CUDA device, or --rollout-url of servers that have one",
            got="none",
            fix="Here rollout_weights: fp8-grid gives FP8's rounding of the weights",
        )
    served, trained = _listed(config.rollout.rollout_gpus), _listed(config.run.trainer_gpus)
    is_tiny = config.model.model == "tiny"
    if num_gpus and not config.rollout.rollout_url and not (served and trained) and not is_tiny:
        raise ConfigError(
            "the launched server and the trainer would share GPUs",
            expected="--rollout-gpus and --trainer-gpus, or --rollout-url of a running server",
            got="none of them",
            fix="With 8 GPUs for example: --rollout-gpus 0,1,2,3 --trainer-gpus 4,5,6,7",
        )
    if num_gpus:
        _require_existing([*served, *trained], num_gpus)
        require_gpu_per_rank(num_gpus, config.run.nproc)


def require_gpu(config: RecipeConfig, cuda_error: str | None) -> None:
    """Refuse to train a preset for GPUs on the CPU, which Megatron would do without a word.

    Args:
        config: The trainer's configuration.
        cuda_error: From `why_no_cuda`; None where there is a GPU.

    Raises:
        ConfigError: The plan names a GPU, and torch can use none; it says why.
    """
    if config.plan.plan_gpu_gb and cuda_error is not None:
        raise ConfigError(
            "the trainer has no GPU that torch can use",
            expected=f"a GPU of {config.plan.plan_gpu_gb:g} GB (plan_gpu_gb)",
            got=cuda_error,
            fix="Install a driver that fits torch's CUDA (nvidia-smi shows both), or a torch built "
            "for the driver; --plan-gpu-gb 0 trains on the CPU",
        )


def require_gpu_per_rank(num_gpus: int, num_ranks: int) -> None:
    """Refuse ranks that would share a GPU; NCCL would end them without naming the cause.

    Args:
        num_gpus: That torch sees on this machine; 0: the CPU trains.
        num_ranks: Trainer processes of this machine.

    Raises:
        ConfigError: There are GPUs, but fewer than ranks.
    """
    if 0 < num_gpus < num_ranks:
        raise ConfigError(
            "a machine shows fewer GPUs than it has trainer processes",
            expected=f"{num_ranks} GPUs, one per process (--nproc)",
            got=f"{num_gpus}",
            fix="Look at CUDA_VISIBLE_DEVICES, --trainer-gpus and the GPUs that the job was given "
            "(nvidia-smi -L), or lower --nproc",
        )


def why_no_cuda() -> str | None:
    """Return why torch can use no GPU, in its own words; None if it can."""
    import torch

    try:
        torch.cuda.init()
    except (AssertionError, RuntimeError) as error:
        return f"{error} (torch {torch.__version__})"
    return None


def _listed(gpus: str) -> list[str]:
    return [gpu.strip() for gpu in gpus.split(",") if gpu.strip()]


def _require_existing(gpus: Sequence[str], num_gpus: int) -> None:
    # Other names than numbers are UUIDs, which only the driver knows.
    missing = [gpu for gpu in gpus if gpu.isdigit() and int(gpu) >= num_gpus]
    if missing:
        raise ConfigError(
            "a GPU is named that the machine does not have",
            expected=f"GPUs of 0..{num_gpus - 1} in --rollout-gpus and --trainer-gpus",
            got=", ".join(missing),
        )
