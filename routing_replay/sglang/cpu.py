"""Inside a server without a CUDA device: keep SGLang's host buffers in plain memory.

A cache on the host copies with CUDA kernels; here it copies with torch.
"""

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
        _copy_caches_with_torch()
    return True


def _copy_caches_with_torch() -> None:
    from sglang.srt.mem_cache.pool_host import base, mha

    # SGLang imports the function only where there is a device.
    mha.transfer_kv_direct = _transfer_kv
    # It leaves 10 GB to others, which a small machine without a device may not have.
    base.HICACHE_HOST_MEMORY_RESERVE_BYTES = 0


def _transfer_kv(
    *,
    src_layers: list[torch.Tensor],
    dst_layers: list[torch.Tensor],
    src_indices: torch.Tensor,
    dst_indices: torch.Tensor,
    page_size: int,
) -> None:
    """Have the signature of SGLang's kernel."""
    for source, target in zip(src_layers, dst_layers, strict=True):
        target[dst_indices] = source[src_indices].to(target.device)


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
