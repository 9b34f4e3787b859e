"""Run a check of a Triton kernel: on the GPU if there is one, else in Triton's interpreter.

Whether Triton compiles or interprets is decided when Triton is first imported, and other tests of
the same process may have imported it. So the interpreter has a process of its own, started once.
"""

import concurrent.futures
import functools
import multiprocessing
import os

import torch


def run_check(check, *arguments):
    """Return `check(device, *arguments)`; check is a function at the top level of a module."""
    if torch.cuda.is_available():
        return check("cuda", *arguments)
    return _interpreter().submit(check, "cpu", *arguments).result(timeout=300)


@functools.cache
def _interpreter():
    context = multiprocessing.get_context("spawn")
    return concurrent.futures.ProcessPoolExecutor(1, context, initializer=_interpret)


def _interpret():
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)
