"""GPU kernels in Triton, each with a torch form as its oracle.

Off by default: they have not run on a GPU yet, only in Triton's interpreter (docs/kernels.md).

The modules of this folder load Triton when they are imported, so import them inside the function
that uses them, after `require_device`.
"""

from __future__ import annotations

import importlib.util
import os

import torch

from ..errors import ConfigError

# Triton compiles for Ampere and newer; older GPUs have no bfloat16 either.
OLDEST_CAPABILITY = (8, 0)
TORCH_FIX = "Leave the setting `kernel` off: the torch form gives the same result"


def require_device(device: torch.device) -> None:
    """Raise if kernels cannot run on a device, before anything is launched.

    A CPU will do where the process was started with TRITON_INTERPRET=1, as the tests are.

    Raises:
        ConfigError: Triton is missing, or the device is neither an NVIDIA GPU of compute
            capability 8.0 and up nor a CPU with Triton's interpreter.
    """
    if importlib.util.find_spec("triton") is None:
        raise ConfigError(
            "a kernel is asked for, but Triton is not installed",
            expected="the package triton, which comes with torch for CUDA",
            fix=f"Install triton, or: {TORCH_FIX}",
        )
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return
    if device.type != "cuda":
        raise ConfigError(
            "a kernel cannot run on this device",
            expected="a CUDA device (or, for tests, a CPU with TRITON_INTERPRET=1)",
            got=device,
            fix=TORCH_FIX,
        )
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_CAPABILITY:
        raise ConfigError(
            "this GPU is too old for a kernel",
            expected=f"compute capability {_dotted(OLDEST_CAPABILITY)} or newer",
            got=f"{_dotted(capability)} ({torch.cuda.get_device_name(device)})",
            fix=TORCH_FIX,
        )


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(str(number) for number in capability)
