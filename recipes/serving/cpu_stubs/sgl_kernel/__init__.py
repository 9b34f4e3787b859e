"""Stands in for SGLang's CUDA kernels on a machine without a CUDA device.

SGLang imports names from `sgl_kernel` at module level even where its torch-native path never calls
them; the real package cannot load without libcuda. It registers no `torch.ops.sgl_kernel`, so
SGLang also finds no AMX kernels and takes the same torch-native path on every CPU.
"""

from collections.abc import Callable
from typing import NoReturn

# A package without a path attribute would hide "no such submodule" behind another error.
__version__ = "0.0.0"


def __getattr__(name: str) -> Callable[..., NoReturn]:
    if name.startswith("__"):
        raise AttributeError(name)

    def unavailable(*arguments: object, **named: object) -> NoReturn:
        raise NotImplementedError(
            f"sgl_kernel.{name} needs a CUDA device; this server runs without one"
        )

    unavailable.__name__ = name
    return unavailable
