"""Real Megatron on several CPU processes: `run_world` starts gloo ranks and returns their results.

A rank is forked from a process that has imported Megatron. Its process groups still cost seconds,
so one world should serve many configurations:

    def check(rank, folder):                      # at the top level of a test module
        for layout in (ParallelLayout(tensor=2), ParallelLayout(expert=2)):
            with megatron(layout):
                ...
        return values                             # pickled; one per rank comes back

    results = run_world(check, 2, folder)
"""

import contextlib
import importlib
import io
import logging
import os
import sys
import time
import traceback
from multiprocessing.connection import wait
from pathlib import Path

import torch

# The last two are for CUDA: bitwise comparisons need cuBLAS without workspaces that race, and
# compiled functions would round otherwise in forward and recomputation.
RANK_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "TORCHDYNAMO_DISABLE": "1",
}
TESTS = str(Path(__file__).parent)
# What nearly every rank imports, for 5 s; the process from which ranks are forked does it once.
PRELOADED = [
    "pytest",
    "transformers.models.auto",
    "recipes.minirl.policy.policy",
    "recipes.model.weights",
]


class RankError(AssertionError):
    """A rank of a spawned world failed; the message is that rank's traceback."""


def run_world(function, nproc: int, *args, timeout_s: float = 300) -> list:
    """Run `function(rank, *args)` on `nproc` processes that form one gloo world.

    Args:
        function: A function at the top level of a module in `tests/`, or "module:function" (only
            the ranks import that module then; it is passed by name in either case).
        nproc: Number of ranks.
        *args: Pickled to every rank.
        timeout_s: After this long the ranks are killed and TimeoutError is raised.

    Returns:
        The ranks' return values, by rank.

    Raises:
        RankError: The first failed rank's traceback; the other ranks are ended.
    """
    context = _process_context()
    if isinstance(function, str):
        where = tuple(function.split(":"))
    else:
        where = (function.__module__, function.__qualname__)
    # Held here, on a port that the system picks as it binds: a free port that is looked up first
    # may be gone before a rank binds it.
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    packed = _packed(args)
    ranks, pipes = [], []
    for rank in range(nproc):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(
            target=_run_rank,
            args=(theirs, where, rank, nproc, store.port, packed, os.environ | RANK_ENVIRONMENT),
            daemon=True,
        )
        with _environment(**RANK_ENVIRONMENT):
            process.start()
        theirs.close()
        ranks.append(process)
        pipes.append(ours)
    try:
        return _collect(pipes, timeout_s)
    finally:
        for process in ranks:
            process.join(timeout=5)
            if process.is_alive():
                process.kill()
                process.join()


def run_kernel_world(function, nproc: int, *args) -> list:
    """Run `run_world` with Triton's interpreter where there is no GPU, which takes its time."""
    interpreter = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    with _environment(**interpreter):
        return run_world(function, nproc, *args, timeout_s=900)


def selected(request, parameter: str) -> list:
    """The values of a parameter over a file's tests that run: one spawned world need do no more.

    Args:
        request: pytest's, of a fixture of the file.
        parameter: Of `pytest.mark.parametrize`.
    """
    items = [item for item in request.session.items if item.path == request.path]
    callspecs = [getattr(item, "callspec", None) for item in items]
    values = [c.params[parameter] for c in callspecs if c and parameter in c.params]
    return list(dict.fromkeys(values))


@contextlib.contextmanager
def megatron(layout, seed=1):
    """Megatron initialized for `layout` inside the `with`; the world itself stays."""
    from recipes.model import parallel

    parallel.initialize(layout, seed)
    try:
        yield
    finally:
        parallel.destroy(keep_world=True)


def _process_context():
    """Return how ranks are started: forked, where what was imported before the fork still holds.

    CUDA does not survive a fork. Triton decides at its import whether it interprets its kernels.
    """
    if torch.cuda.is_available() or "TRITON_INTERPRET" in os.environ:
        return torch.multiprocessing.get_context("spawn")
    context = torch.multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def _packed(value) -> bytes:
    """Pickle with the tensors' bytes.

    multiprocessing's pickle would share tensors' memory, which dies with the process that made
    them; plain pickle would import Megatron in the parent, for a storage class that it replaces.
    """
    packed = io.BytesIO()
    torch.save(value, packed)
    return packed.getvalue()


def _unpacked(packed: bytes):
    return torch.load(io.BytesIO(packed), weights_only=False)


def _collect(pipes, timeout_s):
    """One result per rank, in rank order; the first failure to arrive ends the wait."""
    results, waiting = {}, {pipe: rank for rank, pipe in enumerate(pipes)}
    deadline = time.monotonic() + timeout_s
    while waiting:
        ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise TimeoutError(f"ranks {sorted(waiting.values())} gave no result in {timeout_s} s")
        for pipe in ready:
            rank = waiting.pop(pipe)
            try:
                failed, value = _unpacked(pipe.recv_bytes())
            except EOFError:
                failed, value = True, "the process ended without a result (killed?)"
            if failed:
                raise RankError(f"rank {rank} of {len(pipes)} failed:\n{value}")
            results[rank] = value
    return [results[rank] for rank in range(len(pipes))]


def _run_rank(pipe, where, rank, nproc, port, packed, environment):
    os.environ.clear()  # a forked rank has that of the process it comes from
    os.environ.update(environment)
    try:
        value = _call(where, rank, nproc, port, _unpacked(packed))
        message = False, value
    except BaseException:
        message = True, traceback.format_exc()
    pipe.send_bytes(_packed(message))
    pipe.close()
    # A failed rank leaves its peers inside collectives; a rank that is done waits for none of them.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _call(where, rank, nproc, port, args):
    from recipes.model.cpu import enable_cpu

    torch.set_num_threads(1)
    logging.getLogger("megatron.core").setLevel(logging.ERROR)  # a deprecation note for every model
    enable_cpu()
    store = torch.distributed.TCPStore("127.0.0.1", port, is_master=False)
    torch.distributed.init_process_group(
        _use_device(rank, nproc), store=store, rank=rank, world_size=nproc
    )
    if TESTS not in sys.path:
        sys.path.insert(0, TESTS)
    module, name = where
    value = getattr(importlib.import_module(module), name)(rank, *args)
    torch.distributed.barrier()  # who leaves closes connections that a slower rank still reads
    return value


def _use_device(rank, nproc):
    """The backend; on CUDA every rank gets a device of its own and deterministic kernels."""
    if not torch.cuda.is_available():
        return "gloo"
    devices = torch.cuda.device_count()
    assert nproc <= devices, f"NCCL needs a GPU for each rank: expected {nproc}, got {devices}"
    torch.cuda.set_device(rank)
    # Stock Megatron adds with atomics otherwise, and two stock passes differ.
    torch.use_deterministic_algorithms(True)
    return "nccl"


@contextlib.contextmanager
def _environment(**values):
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value
