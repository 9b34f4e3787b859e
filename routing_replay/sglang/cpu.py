"""Inside a server without a CUDA device: keep SGLang's host buffers in plain memory."""

from __future__ import annotations

from collections.abc import Callable
from importlib import metadata
from typing import Any

import torch

from . import versions


def enable_cpu() -> bool:
    """Make host buffers plain memory where there is no device to pin them for.

    Returns:
        Whether the redirection is active.
    """
    if torch.cuda.is_available():
        return False
    # An unknown, newer SGLang is taken for the newest known one.
    if versions.parse(metadata.version("sglang")) < (0, 5, 20):
        _allocate_without_pinning()
    else:
        from sglang.srt.mem_cache.pool_host import common

        common.ALLOC_MEMORY_FUNCS["cpu"] = _plain_host_memory
    return True


def _plain_host_memory(
    dims: Any, *, dtype: torch.dtype, device: str, pin_memory: bool, allocator: Any, **options: Any
) -> torch.Tensor:
    """Have the signature of SGLang's allocators."""
    return torch.zeros(dims, dtype=dtype)


def _allocate_without_pinning() -> None:
    """Before 0.5.20 the host buffer is pinned by `torch.zeros`, in 0.5.12 indices by `tensor`."""
    for name in ("zeros", "tensor"):
        setattr(torch, name, _unpinned(getattr(torch, name)))


def _unpinned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def allocate_unpinned(
        *arguments: Any, pin_memory: bool = False, **options: Any
    ) -> torch.Tensor:
        return allocate(*arguments, **options)

    return allocate_unpinned
