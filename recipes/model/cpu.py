"""Run stock megatron-core on a machine without a CUDA device: `enable_cpu()`.

Megatron names CUDA devices, streams and generators in its code. Each redirection below undoes one
such assumption and says where it matters. No redirection changes a value that Megatron computes,
and none is made where `torch.cuda.is_available()`.

Importing this module has one lasting effect, and only without CUDA: it imports Megatron, with its
functions left uncompiled (`_import_megatron`). Modules of `recipes.model` therefore import it
before Megatron. Where Megatron was imported first, `enable_cpu` turns its compiled functions off.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from types import FrameType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


def _import_megatron() -> None:
    """Import Megatron without what only CUDA can use; 4 instead of 23 s of CPU time (0.19.2)."""
    with _hidden("flash_mla", "flash_attn", "flashinfer"), _uncompiled():
        importlib.import_module("megatron.core.models.gpt.gpt_layer_specs")


@contextlib.contextmanager
def _hidden(*names: str) -> Iterator[None]:
    """Make packages look missing.

    SGLang's wheel of flash_mla raises OSError without libcuda, and Megatron expects ImportError;
    the others load, slowly, kernels that cannot run.
    """
    packages = [name for name in names if name not in sys.modules]
    sys.modules.update(dict.fromkeys(packages))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in packages:
            del sys.modules[name]


@contextlib.contextmanager
def _uncompiled() -> Iterator[None]:
    """Make torch.compile return functions as they are.

    Megatron's `jit_fuser` is torch.compile as found at import. It would load the compiler, and run
    it at the first call of each function, for nothing on a CPU.
    """

    def unchanged(function: Callable[..., Any] | None = None, **options: Any) -> Callable[..., Any]:
        return unchanged if function is None else function

    compiled = torch.compile
    torch.compile = unchanged  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compiled


# Megatron's `jit_fuser` wraps functions as its modules are imported: later is too late.
_IS_COMPILED = "megatron.core.jit" in sys.modules

if not torch.cuda.is_available():
    _import_megatron()


@functools.cache
def enable_cpu() -> bool:
    """Redirect what megatron-core expects of CUDA to the CPU, for the rest of the process.

    `parallel.initialize` calls it. Where a CUDA device is available it does nothing. If Megatron
    was imported before this module, torch.compile is off in the whole process from here on.

    Returns:
        Whether the redirections are active.
    """
    if torch.cuda.is_available():
        return False
    if _IS_COMPILED:
        torch.compiler.set_stance("force_eager")
    _redirect_current_device()
    _redirect_streams_and_events()
    _redirect_generators()
    # Never exited: it holds for the rest of the process.
    contextlib.ExitStack().enter_context(_CudaNamesMeanCpu())
    _redirect_rng_helpers()
    _redirect_split_sizes_to_host()
    _redirect_uneven_collectives()
    _name_the_missing_gemm()
    return True


def _redirect_current_device() -> None:
    """Every parameter and buffer is allocated on `device=torch.cuda.current_device()`."""
    _replace_in_cuda(current_device=lambda: torch.device("cpu"))


def _redirect_streams_and_events() -> None:
    """The dispatchers, the pipeline and DDP order work on streams; here program order does."""
    stream = InertStream()
    _replace_in_cuda(
        Stream=InertStream,
        Event=InertEvent,
        current_stream=lambda device=None: stream,
        default_stream=lambda device=None: stream,
        stream=lambda stream: contextlib.nullcontext(stream),
        synchronize=lambda device=None: None,
    )


def _redirect_generators() -> None:
    """The RNG tracker seeds and reads the CUDA generator; the CPU's takes its place."""
    _replace_in_cuda(
        get_rng_state=lambda device="cuda": torch.get_rng_state(),
        set_rng_state=lambda new_state, device="cuda": torch.set_rng_state(new_state),
        manual_seed=lambda seed: torch.default_generator.manual_seed(seed),
    )


def _replace_in_cuda(**replacements: object) -> None:
    for name, replacement in replacements.items():
        setattr(torch.cuda, name, replacement)


def _redirect_rng_helpers() -> None:
    """Activation recomputation and the tracker's `fork` restore the device's RNG through these."""
    from megatron.core.tensor_parallel import random

    def get_state(
        device: str = "cuda", clone: bool = False, graph_safe: bool = False
    ) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(new_state: torch.Tensor, device: int = -1, graph_safe: bool = False) -> None:
        torch.set_rng_state(new_state)

    random._get_cuda_rng_state = get_state
    random._set_cuda_rng_state = set_state
    # `fork` warns when the CPU generator moved inside it. Here that generator is the one it forks.
    logging.getLogger(random.__name__).addFilter(
        lambda record: "CPU RNG state changed" not in record.getMessage()
    )


def _redirect_split_sizes_to_host() -> None:
    """The alltoall dispatcher needs split sizes as numpy, and stock converts CUDA tensors only."""
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    def to_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    moe_utils.maybe_move_tensor_to_cpu = to_host
    token_dispatcher.maybe_move_tensor_to_cpu = to_host  # imported by name there


def _redirect_uneven_collectives() -> None:
    """Tensor-parallel experts exchange parts of unequal sizes; gloo moves only equal ones."""
    from megatron.core.tensor_parallel import mappings

    gather, reduce_scatter = (
        mappings._gather_along_first_dim,
        mappings._reduce_scatter_along_first_dim,
    )

    def gather_parts(
        input_: torch.Tensor,
        group: torch.distributed.ProcessGroup,
        output_split_sizes: list[int] | None = None,
        use_global_buffer: bool = False,
    ) -> torch.Tensor:
        if output_split_sizes is None or group.size() == 1:
            return gather(input_, group, None, use_global_buffer)
        sizes = [int(size) for size in output_split_sizes]
        padded = input_.new_zeros(max(sizes), *input_.shape[1:])
        padded[: len(input_)] = input_
        parts = [torch.empty_like(padded) for _ in sizes]
        torch.distributed.all_gather(parts, padded, group=group)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    def reduce_scatter_parts(
        input_: torch.Tensor,
        group: torch.distributed.ProcessGroup,
        input_split_sizes: list[int] | None = None,
        use_global_buffer: bool = False,
    ) -> torch.Tensor:
        if input_split_sizes is None or group.size() == 1:
            return reduce_scatter(input_, group, None, use_global_buffer)
        total = input_.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total, group=group)
        return total.split([int(size) for size in input_split_sizes])[group.rank()].clone()

    mappings._gather_along_first_dim = gather_parts
    mappings._reduce_scatter_along_first_dim = reduce_scatter_parts


def _name_the_missing_gemm() -> None:
    """0.16 asks `te_general_gemm is not None` of a name that only Transformer Engine defines."""
    from megatron.core.transformer.moe import moe_utils

    # Later versions define it themselves: delete this with the support of 0.16.
    if version("megatron-core").startswith("0.16."):
        moe_utils.te_general_gemm = getattr(moe_utils, "te_general_gemm", None)


class InertStream:
    """A stream whose work runs at once, in program order."""

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def wait_stream(self, stream: InertStream) -> None:
        pass

    def wait_event(self, event: InertEvent) -> None:
        pass

    def record_event(self, event: InertEvent | None = None) -> InertEvent:
        return event if event is not None else InertEvent()

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True

    @staticmethod
    def priority_range() -> tuple[int, int]:
        return 0, 0


class InertEvent:
    """An event that is always complete."""

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def record(self, stream: InertStream | None = None) -> None:
        pass

    def wait(self, stream: InertStream | None = None) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True


class _CudaNamesMeanCpu(TorchFunctionMode):
    """Read "cuda" as "cpu" in every torch call, and allocate pinned memory as plain memory."""

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.Tensor.cuda, torch.Tensor.pin_memory):
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return _type_name(func(args[0]), sys._getframe(1))
        if func is torch.Tensor.to:
            args = tuple(_as_cpu(arg) for arg in args)
        if "device" in kwargs:
            kwargs["device"] = _as_cpu(kwargs["device"])
        # Pinning goes through the CUDA runtime (context parallelism's index tensors ask for it).
        kwargs.pop("pin_memory", None)
        return func(*args, **kwargs)


def _as_cpu(device: Any) -> Any:
    if isinstance(device, str) and device.startswith("cuda"):
        return "cpu"
    if isinstance(device, torch.device) and device.type == "cuda":
        return torch.device("cpu")
    return device


def _type_name(name: str, caller: FrameType) -> str:
    # Megatron's optimizer sorts parameters by names such as "torch.cuda.FloatTensor"; only it
    # sees them.
    if caller.f_globals.get("__name__", "").startswith("megatron.core.optimizer"):
        return name.replace("torch.", "torch.cuda.", 1)
    return name
