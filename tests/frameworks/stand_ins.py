"""Stand-ins for what a machine without CUDA lacks, so that the frameworks' own code runs.

`prepare()` once per process, before a framework is imported. What it replaces:

    transformer_engine, transformer_engine_torch   importable, and does nothing: the models of the
                                                   tests use Megatron's local layers
    torch.cuda                                     `recipes.model.cpu.enable_cpu`, and one device to
                                                   be counted, selected and asked for its memory
    megatron.bridge.peft.utils                     two functions for LoRA that only a newer
                                                   Megatron-Bridge has, and SkyRL imports
"""

from __future__ import annotations

import functools
import importlib
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any

import torch

TRANSFORMER_ENGINE = ("transformer_engine", "transformer_engine_torch")


@functools.cache
def prepare(*packages: str) -> None:
    """Make this process look as the frameworks expect.

    Args:
        packages: Further packages to stand in for.
    """
    from recipes.model.cpu import enable_cpu

    enable_cpu()
    torch.cuda.device_count = lambda: 1
    torch.cuda.set_device = lambda device: None
    torch.cuda.get_device_name = lambda *device: "CPU"
    torch.cuda.mem_get_info = lambda *device: (1 << 34, 1 << 34)
    torch.cuda.get_device_properties = lambda *device: SimpleNamespace(
        major=9, minor=0, name="CPU", total_memory=1 << 34
    )
    # Megatron must have seen that Transformer Engine is missing before it can be imported.
    importlib.import_module("megatron.core.transformer.moe.experts")
    sys.meta_path.insert(0, _Finder((*TRANSFORMER_ENGINE, *packages)))


class _Name(type):
    """A class for any name, whose attributes are such classes: to import, subclass and compare."""

    def __getattr__(cls, name: str) -> Any:
        return _stand_in(name)

    def __call__(cls, *args: Any, **named: Any) -> Any:
        if len(args) == 1 and isinstance(args[0], FunctionType) and not named:
            return args[0]  # as a decorator
        return super().__call__()


def _stand_in(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return _Name(name, (), {})


class _Finder(MetaPathFinder, Loader):
    """Finds every module of some packages, each with any attribute."""

    def __init__(self, packages: tuple[str, ...]):
        self._packages = packages

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if name.partition(".")[0] in self._packages:
            return ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return ModuleType(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        module.__version__ = "2.6.0"  # type: ignore[attr-defined]
        module.__getattr__ = functools.cache(_stand_in)  # type: ignore[method-assign]


def name_what_skyrl_expects_of_a_newer_bridge() -> None:
    """SkyRL 0.4.0 imports two functions for LoRA that Megatron-Bridge 0.6.2 does not have."""
    from megatron.bridge.peft import utils

    for name in (
        "enable_expert_parallel_grad_sync_in_finalize",
        "finalize_model_grads_with_expert_adapter_sync",
    ):
        if not hasattr(utils, name):
            setattr(utils, name, lambda *arguments: None)
