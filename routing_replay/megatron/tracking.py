"""Which pass a router call belongs to: by identity, never by order.

In a forward it is the pass of the chunk that runs. Inside autograd a router call is a
recomputation, and its pass is the one whose output received the gradient: that gradient arrives
before anything else of the chunk's backward. So no schedule can put two passes out of step.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from .passes import ForwardPass


class PassTracker:
    """Hooks on the model chunks, and the passes that they see begin and end.

    Args:
        begin: Called with a chunk's index before its forward: its pass, or None outside scopes.
    """

    def __init__(self, begin: Callable[[int], ForwardPass | None]):
        self._begin = begin
        self._forward: ForwardPass | None = None  # the pass whose chunk is running
        self._backward: ForwardPass | None = None  # the pass whose backward is running
        self._backward_task = -1  # autograd's number of that backward
        self._hooks: list[RemovableHandle] = []

    def watch(self, model_chunks: Sequence[torch.nn.Module]) -> None:
        for chunk, model in enumerate(model_chunks):
            self._hooks.append(model.register_forward_pre_hook(self._before_chunk(chunk)))
            self._hooks.append(model.register_forward_hook(self._after_chunk))

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def leave_forward(self) -> None:
        """The announced microbatch is over, with an exception or without."""
        self._forward = None

    def forget(self) -> None:
        """The scope is over."""
        self._forward = self._backward = None

    def find(self) -> tuple[ForwardPass | None, bool]:
        """Return the pass of the running router call, and whether it is a recomputation."""
        task = torch._C._current_graph_task_id()
        if task == -1:
            return self._forward, False
        current = self._backward
        if current is not None and current.is_closed:
            self._backward = None
            if task != self._backward_task:
                return None, True  # left behind by a late backward that failed
        return current, True

    def _before_chunk(self, chunk: int) -> Callable[[torch.nn.Module, Any], None]:
        def hook(module: torch.nn.Module, arguments: Any) -> None:
            self._forward = self._begin(chunk)

        return hook

    def _after_chunk(self, module: torch.nn.Module, arguments: Any, output: Any) -> None:
        done, self._forward = self._forward, None
        if done is None:
            return
        done.end_forward()
        tensors = [t for t in _tensors(output) if t.requires_grad]
        for tensor in tensors:
            # A hook's return value would replace the gradient: this one returns None.
            tensor.register_hook(lambda gradient: self._begin_backward(done))
        if not tensors:
            done.release()

    def _begin_backward(self, begun: ForwardPass) -> None:
        begun.begin_backward()
        self._backward, self._backward_task = begun, torch._C._current_graph_task_id()
        done = functools.partial(self._end_backward, begun)
        torch.autograd.Variable._execution_engine.queue_callback(done)

    def _end_backward(self, ended: ForwardPass) -> None:
        ended.release()
        if self._backward is ended:
            self._backward = None


def _tensors(output: Any) -> Iterator[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        yield output
    elif isinstance(output, dict):
        yield from _tensors(list(output.values()))
    elif isinstance(output, list | tuple):
        for item in output:
            yield from _tensors(item)
