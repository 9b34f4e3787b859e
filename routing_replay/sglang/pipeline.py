"""Pipeline-parallel servers: each stage sees its own layers, and the rows join on their way.

A stage hands hidden states to the next one, and the last stage sends what it sampled round the
ring; the rows travel with both. A stage's buffer is zero where its layers are not, so that rows
are joined by addition.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from .capturer import Capturer

# The names of the rows among SGLang's tensors, and the attribute of its note on a microbatch.
PREFIX, ATTRIBUTE = "routing_replay_", "routing_replay_rows"
IDS = PREFIX + "ids"


def launch(
    stock: Callable[..., Any], capturer: Capturer, scheduler: Any, arguments: tuple[Any, ...]
) -> Any:
    """Run a microbatch of one stage; its rows leave with the hidden states.

    Args:
        stock: SGLang's method.
        capturer: Of this stage.
        scheduler: Whose method it is.
        arguments: Number of the microbatch, batch, tensors of the stage before, notes on the
            microbatches, queue.
    """
    number, _, proxy, notes = arguments[:4]
    capturer.incoming = {} if proxy is None else taken(proxy.tensors)
    capturer.last_output = None
    result, event = stock(scheduler, *arguments)
    setattr(notes[number], ATTRIBUTE, capturer.last_output)
    if result.pp_hidden_states_proxy_tensors is not None:
        result.pp_hidden_states_proxy_tensors.tensors.update(leaving(capturer))
    return result, event


def taken(tensors: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Remove the rows from a stage's tensors and return them."""
    return {name: tensors.pop(name) for name in list(tensors) if name.startswith(PREFIX)}


def leaving(capturer: Capturer) -> dict[str, torch.Tensor]:
    """Return a stage's rows with those of the stages before it, as tensors that NCCL sends."""
    output, earlier = capturer.last_output, capturer.incoming
    if output is None:
        return {}
    # NCCL has no integers of two bytes.
    own = {IDS: output.topk.contiguous().view(torch.uint8)}
    own |= {PREFIX + name: values.contiguous() for name, values in output.values.items()}
    return {name: own[name] + earlier[name] if earlier else own[name] for name in own}


def arrive(capturer: Capturer, note: Any, tensors: dict[str, Any], result: Any) -> None:
    """Give a microbatch's result the rows of all stages.

    Args:
        capturer: Of this stage.
        note: SGLang's note on the microbatch.
        tensors: What the last stage sent round; they go on to the next stage.
        result: To which the rows belong.
    """
    output, ids_TLK = getattr(note, ATTRIBUTE, None), tensors.get(IDS)
    if output is None or ids_TLK is None:
        return
    output.topk = ids_TLK.view(output.topk.dtype)
    output.values = {name: tensors[PREFIX + name] for name in output.values}
    output.copy_now()
    # Layers of other stages: a routed one has an expert above 0 in some row.
    capturer.layers.update(output.topk.ne(0).any(-1).any(0).nonzero().flatten().tolist())
    result.routed_experts_output = output
