"""What Megatron does to the tokens after the trainer's slicing: sequence-major order, SP split.

`token_rows` ride with `input_ids`, so packing, padding, context parallelism and dynamic batches are
the trainer's and need nothing here.
"""

from __future__ import annotations

import numpy as np
import torch

from ..errors import ReplayError


def as_rows(token_rows: torch.Tensor | np.ndarray, num_rows: int) -> np.ndarray:
    """Return validated `token_rows` as int64 [b, s].

    Args:
        token_rows: int64, the local shape of `input_ids`: [b, s], or [T] for one packed sequence.
            On the CPU: the table lies in host memory, and reading rows back would stall the device.
        num_rows: Rows of the table.

    Raises:
        ReplayError: Another type, device or shape, or rows outside -1..num_rows-1.
    """
    token_rows = _on_host("token_rows", token_rows)
    if not isinstance(token_rows, np.ndarray) or token_rows.dtype != np.int64:
        raise ReplayError(
            "token_rows are of the wrong type",
            expected="an int64 tensor",
            got=getattr(token_rows, "dtype", type(token_rows).__name__),
        )
    if token_rows.ndim == 1:
        token_rows = token_rows[None]
    if token_rows.ndim != 2:
        raise ReplayError(
            "token_rows have the wrong shape",
            expected="[b, s], as input_ids, or [T]",
            got=list(token_rows.shape),
        )
    if token_rows.size and not (token_rows.min() >= -1 and token_rows.max() < num_rows):
        raise ReplayError(
            "token_rows are out of range",
            expected=f"-1 (live) or a row in 0..{num_rows - 1}",
            got=f"{token_rows.min()}..{token_rows.max()}",
            fix="Take rows from the table that is replayed: table.rows(sequence, num_tokens)",
        )
    return token_rows


def as_mask(mask: torch.Tensor | np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Return a validated mask of a microbatch as bool [b, s].

    Args:
        mask: bool on the CPU: tokens that the metrics look at.
        shape: Of `token_rows`.

    Raises:
        ReplayError: Another type, device or number of tokens.
    """
    mask = _on_host("the mask", mask)
    if not isinstance(mask, np.ndarray) or mask.dtype != np.bool_:
        raise ReplayError(
            "the mask is of the wrong type",
            expected="a bool tensor",
            got=getattr(mask, "dtype", type(mask).__name__),
        )
    if mask.size != np.prod(shape):
        raise ReplayError(
            "the mask has the wrong shape",
            expected=f"{list(shape)}, as token_rows",
            got=list(mask.shape),
        )
    return mask.reshape(shape)


def _on_host(name: str, values: torch.Tensor | np.ndarray) -> np.ndarray:
    if not isinstance(values, torch.Tensor):
        return values
    if values.device.type != "cpu":
        raise ReplayError(
            f"{name} {'are' if name.endswith('s') else 'is'} on the wrong device",
            expected="the CPU",
            got=values.device,
            fix="Slice it like input_ids, but leave it on the CPU: reading it back would wait",
        )
    return values.numpy()


def router_order(values_BS: np.ndarray, tp_size: int, tp_rank: int) -> np.ndarray:
    """Return values per token [b, s] in the order in which this rank's routers see the tokens.

    Megatron's hidden states are [s, b, h], flattened; under sequence parallelism each
    tensor-parallel rank holds a contiguous part of the s axis.

    Args:
        values_BS: One value per local token.
        tp_size: Ranks that share the sequence; 1 without sequence parallelism.
        tp_rank: This rank among them.

    Raises:
        ReplayError: The sequence does not divide by the ranks that share it.
    """
    length = values_BS.shape[1]
    if length % tp_size:
        raise ReplayError(
            "the sequence does not divide by the tensor-parallel ranks that share it",
            expected=f"a multiple of {tp_size} tokens",
            got=length,
            fix="Pad input_ids and token_rows (with -1) alike",
        )
    part = length // tp_size
    values_SB = values_BS[:, tp_rank * part : (tp_rank + 1) * part].T
    return np.ascontiguousarray(values_SB).reshape(-1)
