"""Copies between host and device that make neither wait."""

from __future__ import annotations

import numpy as np
import torch


def to_device(values: np.ndarray, device: torch.device) -> torch.Tensor:
    """Copy to the device without making the host wait."""
    tensor = torch.from_numpy(values)
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def to_host(values: torch.Tensor) -> torch.Tensor:
    """Copy to pinned host memory, enqueued: synchronise before reading."""
    if values.device.type == "cpu":
        return values
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    return host.copy_(values, non_blocking=True)


def compact_dtype(num_experts: int) -> torch.dtype:
    """Dtype of ids on the device: few kernels take uint16, and ids stay below 2**15."""
    return torch.uint8 if num_experts <= 256 else torch.int16
