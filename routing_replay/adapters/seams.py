"""What an adapter relies on, in types, and its comparison with the sources that are installed.

Sources are read as text: no framework is imported, so nothing of its GPU libraries is needed.
"""

from __future__ import annotations

import ast
import importlib.machinery
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Seam:
    """A name of a framework that an adapter replaces, calls, or is called by.

    Args:
        module: The module that binds the name.
        name: A function, a `Class.method`, or a name that the module imports.
        parameters: What the function must take by name; none if only the name counts.
    """

    module: str
    name: str
    parameters: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(frozen=True, kw_only=True)
class Switch:
    """A setting of a job that an adapter needs, or that contradicts it.

    Args:
        setting: A flag (`--name`), a dotted key, or an environment variable (capitals).
        value: The value that is needed or wrong; "" stands for any, and for a flag without one.
        is_needed: False: wrong with this value.
        mode: R2 or R3: of jobs in this mode only; "" for all.
        cause: What happens otherwise.
    """

    setting: str
    value: str = ""
    is_needed: bool = True
    mode: str = ""
    cause: str

    def __str__(self) -> str:
        joint = " " if self.setting.startswith("--") else "="
        return self.setting + (joint + self.value if self.value else "")


@dataclass(frozen=True, kw_only=True)
class Framework:
    """What an adapter was written against.

    Args:
        package: The top-level package.
        distribution: Its name on the package index; "" if it has none.
        tested: Version, or commit and date, that the tests ran on.
        seams: Names that must be there.
        switches: Settings of a job.
    """

    package: str
    distribution: str = ""
    tested: str
    seams: tuple[Seam, ...]
    switches: tuple[Switch, ...] = ()


def seams(names: Mapping[str, Sequence[str]]) -> tuple[Seam, ...]:
    """Return seams from their texts.

    Args:
        names: By module: `name`, or `name(parameter, ...)` where the parameters count.
    """
    return tuple(_seam(module, text) for module, texts in names.items() for text in texts)


def _seam(module: str, text: str) -> Seam:
    name, _, rest = text.partition("(")
    parameters = tuple(word.strip() for word in rest.rstrip(")").split(",") if word.strip())
    return Seam(module=module, name=name, parameters=parameters)


def compare(entry: Framework, path: Sequence[str] | None = None) -> Iterator[str]:
    """Yield one line for each seam that a framework's sources do not have.

    Args:
        entry: What is relied on.
        path: Folders to look in; `sys.path` if None.
    """
    for seam in entry.seams:
        source = _find(seam.module, path)
        if source is None:
            yield f"{seam.module} does not exist"
            continue
        found = _definition(ast.parse(source.read_text(encoding="utf-8")), seam.name)
        if found is None:
            yield f"{seam} does not exist"
        elif seam.parameters and not _fits(found, seam.parameters):
            yield f"{seam}{_text(found)} does not take ({', '.join(seam.parameters)})"


def is_installed(entry: Framework, path: Sequence[str] | None = None) -> bool:
    """Return whether the framework's package is on the path."""
    return importlib.machinery.PathFinder.find_spec(entry.package, _folders(path)) is not None


def _folders(path: Sequence[str] | None) -> list[str]:
    return list(sys.path if path is None else path)


def _find(module: str, path: Sequence[str] | None) -> Path | None:
    """The source of a module, by its name alone: finding it by import would run its parents."""
    top, *rest = module.split(".")
    spec = importlib.machinery.PathFinder.find_spec(top, _folders(path))
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    for folder in folders:
        base = Path(os.path.join(folder, *rest))
        for file in (base.with_suffix(".py"), base / "__init__.py"):
            if file.is_file():
                return file
    return None


def _definition(tree: ast.Module | ast.ClassDef, name: str) -> ast.AST | None:
    """The last binding of a name in a module or class."""
    head, _, rest = name.partition(".")
    found: ast.AST | None = None
    for node in _statements(tree.body):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names = [node.name]
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.asname or alias.name for alias in node.names]
        elif isinstance(node, ast.Assign):
            names = [target.id for target in node.targets if isinstance(target, ast.Name)]
        else:
            continue
        if head in names:
            found = node
    if rest:
        return _definition(found, rest) if isinstance(found, ast.ClassDef) else None
    return found


def _statements(body: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements of a body and of the `if` and `try` blocks in it."""
    for node in body:
        yield node
        for part in ("body", "orelse", "finalbody"):
            if isinstance(node, ast.If | ast.Try | ast.With):
                yield from _statements(getattr(node, part, []))


def _fits(node: ast.AST, parameters: tuple[str, ...]) -> bool:
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return False
    arguments = (*node.args.args, *node.args.kwonlyargs)
    return set(parameters) <= {argument.arg for argument in arguments}


def _text(node: ast.AST) -> str:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return f"({ast.unparse(node.args)})"
    return " (no function)"
