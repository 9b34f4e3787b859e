"""Inside a server without a CUDA device: keep SGLang's host buffers in plain memory."""

import torch

from . import versions


def enable_cpu() -> bool:
    """Inside a server: host buffers become plain memory, there is no device to pin them for.

    Returns:
        Whether the redirection is active.
    """
    if torch.cuda.is_available():
        return False
    if versions.installed() < (0, 5, 20):
        _allocate_without_pinning()
    else:
        from sglang.srt.mem_cache.pool_host import common

        common.ALLOC_MEMORY_FUNCS["cpu"] = _plain_host_memory
    return True


def _plain_host_memory(dims, *, dtype, device, pin_memory, allocator, **others):
    """Same signature as SGLang's allocators."""
    return torch.zeros(dims, dtype=dtype)


def _allocate_without_pinning():
    """Before 0.5.20 the host buffer is pinned by `torch.zeros`, in 0.5.12 indices by `tensor`."""
    for name in ("zeros", "tensor"):
        setattr(torch, name, _unpinned(getattr(torch, name)))


def _unpinned(allocate):
    return lambda *arguments, pin_memory=False, **others: allocate(*arguments, **others)
