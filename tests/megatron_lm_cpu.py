"""What megatron.training needs on a machine without CUDA, beyond `enable_cpu`; import it first."""

from functools import partial
from types import SimpleNamespace

import torch

from recipes.model.cpu import enable_cpu

enable_cpu()
# Megatron's start-up counts devices, selects one and asks for its architecture.
torch.cuda.device_count = lambda: 1
torch.cuda.set_device = lambda device: None
torch.cuda.get_device_properties = lambda *device: SimpleNamespace(
    major=9, minor=0, name="CPU", total_memory=1 << 34
)


def allow_no_cuda() -> None:
    """Let the loop start; called by the script after its imports, not to import Megatron here."""
    from megatron.core.datasets import utils
    from megatron.training import training

    training.initialize_megatron = partial(training.initialize_megatron, allow_no_cuda=True)
    utils.compile_helpers = lambda: None  # the wheel has the compiled module, but no Makefile
