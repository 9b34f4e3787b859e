"""What megatron.training needs on a machine without CUDA, for examples and tests.

Import it before Megatron; a job on GPUs needs nothing of it.
"""

import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # recipes/ is not installed with the package

from recipes.model.cpu import enable_cpu

enable_cpu()
# Megatron's start-up counts devices, selects one and asks for its architecture.
torch.cuda.device_count = lambda: 1
torch.cuda.set_device = lambda device: None
torch.cuda.get_device_properties = lambda *device: SimpleNamespace(
    major=9, minor=0, name="CPU", total_memory=1 << 34
)


def allow_no_cuda() -> None:
    """Let the loop start; called after the script's imports, as this module must import none."""
    from megatron.core.datasets import utils
    from megatron.training import training

    training.initialize_megatron = partial(training.initialize_megatron, allow_no_cuda=True)
    utils.compile_helpers = lambda: None  # the wheel has the compiled module, but no Makefile
