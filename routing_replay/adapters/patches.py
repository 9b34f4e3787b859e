"""Run a function when a module has been imported, and replace functions only as they are known."""

from __future__ import annotations

import functools
import importlib.abc
import importlib.util
import inspect
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from ..errors import PreflightError

# Attribute of our functions: the stock one. A framework that reloads finds them in place.
REPLACED = "routing_replay_replaced"


def after_import(name: str, patch: Callable[[ModuleType], None]) -> None:
    """Call `patch(module)` once the module is imported: now, if it is imported already.

    Args:
        name: Full name of the module. Its parents are not imported by this call.
        patch: Receives the module after its body has run, and before its importer sees it.
    """
    module = sys.modules.get(name)
    if module is not None and not getattr(module.__spec__, "_initializing", False):
        patch(module)
        return
    sys.meta_path.insert(0, _AfterImport(name, patch))


def rebind(
    module: Any,
    name: str,
    replacement: Callable[[Callable[..., Any]], Callable[..., Any]],
    parameters: tuple[str, ...] = (),
) -> None:
    """Replace a function of an imported module or class, once.

    Args:
        module: Whose attribute it is.
        name: Of the attribute: the name by which the framework calls it.
        replacement: Receives the stock function and returns ours, which calls it.
        parameters: Names that ours reads or passes on.

    Raises:
        PreflightError: There is no such function, or it does not take the parameters.
    """
    where = f"{module.__name__}.{name}"
    stock = getattr(module, name, None)
    if stock is None:
        raise PreflightError(
            "a function that routing replay wraps does not exist",
            expected=where,
            got=f"no {name} in {module.__name__}",
            fix="Use a tested version (docs/adopt)",
        )
    if hasattr(stock, REPLACED):
        return
    require_parameters(stock, parameters, where)
    ours = functools.wraps(stock)(replacement(stock))
    setattr(ours, REPLACED, stock)
    setattr(module, name, ours)


def require_parameters(function: Callable[..., Any], names: tuple[str, ...], where: str) -> None:
    """Raise PreflightError unless a function takes these parameters by name.

    Args:
        function: What is about to be wrapped.
        names: Parameters that the wrapper reads.
        where: What the message calls the function.
    """
    signature = inspect.signature(function)
    if not set(names) <= set(signature.parameters):
        raise PreflightError(
            f"{where} has another signature than the one that routing replay wraps",
            expected=f"the parameters {', '.join(names)}",
            got=str(signature),
            fix="Use a tested version (docs/adopt), or pass the routes in your own forward_step",
        )


class _AfterImport(importlib.abc.MetaPathFinder):
    """Finds one module as the other finders do, and patches it after its import."""

    def __init__(self, name: str, patch: Callable[[ModuleType], None]):
        self._name = name
        self._patch = patch

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != self._name:
            return None
        sys.meta_path.remove(self)  # once; importlib's own search must not meet us again
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _PatchingLoader(spec.loader, self._patch)
        return spec


class _PatchingLoader(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader, patch: Callable[[ModuleType], None]):
        self._loader = loader
        self._patch = patch

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        self._patch(module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)  # what tools ask of a loader: source, data, paths
