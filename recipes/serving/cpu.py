"""Let stock SGLang serve on a machine without a CUDA device.

Three obstacles are removed: the CPU engine is opt-in, the kernel package cannot be imported, and
the capture pins host memory through the CUDA runtime. `server.launch` removes the first two before
the server starts (`server_environment`, `server_arguments`); the plugin removes the third inside
the server (`routing_replay/sglang/cpu.py`). Its processes are forked, so that they share one import
of SGLang (`server_module`). With a CUDA device nothing here has any effect.

Every CPU takes SGLang's torch-native path, also those with AMX: its AMX kernels live in a build
of `sgl_kernel` that no package index carries.
"""

import os
from collections.abc import Mapping
from pathlib import Path

import torch

STUBS = Path(__file__).parent / "cpu_stubs"
# Room for 64 sequences of 1,024 tokens; an argument of the caller's comes later and wins.
MAX_TOTAL_TOKENS = 1 << 16


def server_environment(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return what a server process needs in its environment; empty with a CUDA device.

    Args:
        environment: The environment it would inherit, for its PYTHONPATH.
    """
    if torch.cuda.is_available():
        return {}
    inherited = environment.get("PYTHONPATH")
    return {
        # Without it the rotary embedding imports vllm.
        "SGLANG_USE_CPU_ENGINE": "1",
        # On the path rather than in sys.modules: the scheduler is a spawned process.
        "PYTHONPATH": f"{STUBS}{os.pathsep}{inherited}" if inherited else str(STUBS),
        # The grouped routers are torch.compile'd: a minute of compiling for nothing on a CPU.
        "TORCHDYNAMO_DISABLE": "1",
        "SGLANG_AUTO_NUMA_BIND": "0",
        # NCCL's library loads without a device and fails later; if it cannot load, gloo does.
        "SGLANG_NCCL_SO_PATH": "none",
    }


def server_module() -> str:
    """Return the module that runs a server."""
    return "sglang.launch_server" if torch.cuda.is_available() else "forked_server"


def server_arguments() -> list[str]:
    """Return the command-line arguments of a server; none with a CUDA device."""
    if torch.cuda.is_available():
        return []
    return [
        *("--device", "cpu"),
        *("--attention-backend", "torch_native"),
        *("--sampling-backend", "pytorch"),
        "--disable-cuda-graph",
        # An idle scheduler polls: it would take a core from the trainer between rollouts.
        "--sleep-on-idle",
        # SGLang would take most of the machine's memory for its cache, as it may on a GPU.
        *("--max-total-tokens", str(MAX_TOTAL_TOKENS)),
    ]
