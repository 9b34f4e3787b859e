"""Lets stock megatron-core run on a machine without a CUDA device: `enable_cpu()`.

Megatron names CUDA devices, streams and generators in its code. Each redirection below undoes one
such assumption and says where it bites. Nothing here changes a value that Megatron computes, and
nothing is touched where `torch.cuda.is_available()`.

Modules of ours that import Megatron import this one first, because without a CUDA device Megatron
has to be imported with some care (`_import_megatron`). The redirections start with `enable_cpu()`.
"""

import contextlib
import functools
import importlib
import logging
import sys
from importlib.metadata import version

import torch
from torch.overrides import TorchFunctionMode


def _import_megatron():
    """Imports Megatron without what only CUDA can use; 4 instead of 23 s of CPU time (0.19.2)."""
    with _hidden("flash_mla", "flash_attn", "flashinfer"), _uncompiled():
        importlib.import_module("megatron.core.models.gpt.gpt_layer_specs")


@contextlib.contextmanager
def _hidden(*packages):
    """Makes packages look missing.

    SGLang's wheel of flash_mla raises OSError without libcuda, and Megatron expects ImportError;
    the others load, slowly, kernels that cannot run.
    """
    packages = [name for name in packages if name not in sys.modules]
    sys.modules.update(dict.fromkeys(packages))
    try:
        yield
    finally:
        for name in packages:
            del sys.modules[name]


@contextlib.contextmanager
def _uncompiled():
    """Makes torch.compile return functions as they are.

    Megatron's `jit_fuser` is torch.compile as found at import. It would load the compiler, and run
    it at the first call of each function, for nothing on a CPU.
    """

    def unchanged(function=None, **options):
        return unchanged if function is None else function

    compiled, torch.compile = torch.compile, unchanged
    try:
        yield
    finally:
        torch.compile = compiled


if not torch.cuda.is_available():
    _import_megatron()


@functools.cache
def enable_cpu() -> bool:
    """Redirects what megatron-core expects of CUDA to the CPU, once per process and for good.

    `parallel.initialize` calls it. Where a CUDA device is available it does nothing.

    Returns:
        Whether the redirections are active.
    """
    if torch.cuda.is_available():
        return False
    _redirect_current_device()
    _redirect_streams_and_events()
    _redirect_generators()
    # Never exited: it holds for the rest of the process.
    _CudaNamesMeanCpu().__enter__()
    _redirect_rng_helpers()
    _redirect_split_sizes_to_host()
    _redirect_uneven_collectives()
    _name_the_missing_gemm()
    return True


def _redirect_current_device():
    """Every parameter and buffer is allocated on `device=torch.cuda.current_device()`."""
    torch.cuda.current_device = lambda: torch.device("cpu")


def _redirect_streams_and_events():
    """The dispatchers, the pipeline and DDP order work on streams; here program order does."""
    stream = InertStream()
    torch.cuda.Stream = InertStream
    torch.cuda.Event = InertEvent
    torch.cuda.current_stream = lambda device=None: stream
    torch.cuda.default_stream = lambda device=None: stream
    torch.cuda.stream = lambda stream: contextlib.nullcontext(stream)
    torch.cuda.synchronize = lambda device=None: None


def _redirect_generators():
    """The RNG tracker seeds and reads the CUDA generator; the CPU's takes its place."""
    torch.cuda.get_rng_state = lambda device="cuda": torch.get_rng_state()
    torch.cuda.set_rng_state = lambda new_state, device="cuda": torch.set_rng_state(new_state)
    torch.cuda.manual_seed = lambda seed: torch.default_generator.manual_seed(seed)


def _redirect_rng_helpers():
    """Activation recomputation and the tracker's `fork` restore the device's RNG through these."""
    from megatron.core.tensor_parallel import random

    def get_state(device="cuda", clone=False, graph_safe=False):
        return torch.get_rng_state()

    def set_state(new_state, device=-1, graph_safe=False):
        torch.set_rng_state(new_state)

    random._get_cuda_rng_state = get_state
    random._set_cuda_rng_state = set_state
    # `fork` warns when the CPU generator moved inside it. Here that generator is the one it forks.
    logging.getLogger(random.__name__).addFilter(
        lambda record: "CPU RNG state changed" not in record.getMessage()
    )


def _redirect_split_sizes_to_host():
    """The alltoall dispatcher needs split sizes as numpy, and stock converts CUDA tensors only."""
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    def to_host(tensor, as_numpy=False, record_stream=False):
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    moe_utils.maybe_move_tensor_to_cpu = to_host
    token_dispatcher.maybe_move_tensor_to_cpu = to_host  # imported by name there


def _redirect_uneven_collectives():
    """Experts' tensor parallelism exchanges parts of unequal sizes; gloo moves only equal ones."""
    from megatron.core.tensor_parallel import mappings

    gather, reduce_scatter = (
        mappings._gather_along_first_dim,
        mappings._reduce_scatter_along_first_dim,
    )

    def gather_parts(input_, group, output_split_sizes=None, use_global_buffer=False):
        if output_split_sizes is None or group.size() == 1:
            return gather(input_, group, None, use_global_buffer)
        sizes = [int(size) for size in output_split_sizes]
        padded = input_.new_zeros(max(sizes), *input_.shape[1:])
        padded[: len(input_)] = input_
        parts = [torch.empty_like(padded) for _ in sizes]
        torch.distributed.all_gather(parts, padded, group=group)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    def reduce_scatter_parts(input_, group, input_split_sizes=None, use_global_buffer=False):
        if input_split_sizes is None or group.size() == 1:
            return reduce_scatter(input_, group, None, use_global_buffer)
        total = input_.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total, group=group)
        return total.split([int(size) for size in input_split_sizes])[group.rank()].clone()

    mappings._gather_along_first_dim = gather_parts
    mappings._reduce_scatter_along_first_dim = reduce_scatter_parts


def _name_the_missing_gemm():
    """0.16 asks `te_general_gemm is not None` of a name that only Transformer Engine defines."""
    from megatron.core.transformer.moe import moe_utils

    # Later versions define it themselves: delete this with the support of 0.16.
    if version("megatron-core").startswith("0.16."):
        moe_utils.te_general_gemm = getattr(moe_utils, "te_general_gemm", None)


class InertStream:
    """A stream of a machine that has one: the program's own order."""

    def __init__(self, *args, **kwargs):
        pass

    def wait_stream(self, stream):
        pass

    def wait_event(self, event):
        pass

    def record_event(self, event=None):
        return event if event is not None else InertEvent()

    def synchronize(self):
        pass

    def query(self):
        return True

    @staticmethod
    def priority_range():
        return 0, 0


class InertEvent:
    """An event that has always happened."""

    def __init__(self, *args, **kwargs):
        pass

    def record(self, stream=None):
        pass

    def wait(self, stream=None):
        pass

    def synchronize(self):
        pass

    def query(self):
        return True


class _CudaNamesMeanCpu(TorchFunctionMode):
    """Reads "cuda" as "cpu" in every torch call, and allocates pinned memory as plain memory."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
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


def _as_cpu(device):
    if isinstance(device, str) and device.startswith("cuda"):
        return "cpu"
    if isinstance(device, torch.device) and device.type == "cuda":
        return torch.device("cpu")
    return device


def _type_name(name, caller):
    # Megatron's optimizer sorts parameters by names such as "torch.cuda.FloatTensor"; only it
    # sees them.
    if caller.f_globals.get("__name__", "").startswith("megatron.core.optimizer"):
        return name.replace("torch.", "torch.cuda.", 1)
    return name
