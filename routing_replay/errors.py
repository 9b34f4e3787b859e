"""The errors that a user of routing_replay can cause, as one small family."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any


class RoutingReplayError(Exception):
    """Base of all errors that a user can cause; our own bugs are assertions.

    The message is always built the same way: what is wrong, what was expected, what came instead,
    where, and what to do.

    Args:
        what: One clause that names the problem.
        expected: What would have been right.
        got: What came instead.
        where: Layer, microbatch, rank, file and line, or URL.
        fix: The next step for the user.
    """

    def __init__(
        self,
        what: str,
        *,
        expected: object = None,
        got: object = None,
        where: object = None,
        fix: str | None = None,
    ) -> None:
        parts = [what]
        if expected is not None:
            parts.append(f"expected {expected}")
        if got is not None:
            parts.append(f"got {got}")
        message = "; ".join(parts)
        if where is not None:
            message += f" [{where}]"
        if fix is not None:
            message += f". {fix}"
        super().__init__(message)
        self.what, self.expected, self.got, self.where, self.fix = what, expected, got, where, fix

    def __reduce__(self) -> tuple[Any, ...]:
        # Errors cross process borders; default pickling would pass the message as `what`.
        fields = {"expected": self.expected, "got": self.got, "where": self.where, "fix": self.fix}
        return _rebuild, (type(self), self.what, fields)


def _rebuild(
    kind: type[RoutingReplayError], what: str, fields: dict[str, Any]
) -> RoutingReplayError:
    return kind(what, **fields)


class ConfigError(RoutingReplayError):
    """A flag, YAML key or combination of settings that cannot work."""


class RoutesError(RoutingReplayError):
    """Routes whose content cannot be true: shapes, expert ids, duplicates, counts."""


class PayloadError(RoutingReplayError):
    """Bytes from a server that are not the routes that were asked for."""


class TableError(RoutingReplayError):
    """A routes file that is damaged, foreign, or of another model."""


class PreflightError(RoutingReplayError):
    """A model or job configuration under which replay would be wrong."""


class ReplayError(RoutingReplayError):
    """A replay that did not keep its promise: wrong rows, an open scope, an incomplete receipt."""


class ObjectiveError(RoutingReplayError):
    """Inputs that an objective cannot score."""


class ServerError(RoutingReplayError):
    """A rollout server that died, refused, hung, or returned no routes."""


class DataError(RoutingReplayError):
    """A prompt file or a reference answer that cannot be used."""


class CheckpointError(RoutingReplayError):
    """A checkpoint that is incomplete, of another architecture, or cannot be written."""


def unknown_name(kind: str, name: object, known: Iterable[object]) -> ConfigError:
    """Return the error for a name that does not exist; it suggests the nearest known name.

    Args:
        kind: What the name is of, such as "objective".
        name: The unknown name.
        known: All names that exist.
    """
    names = [str(k) for k in known]
    # Without case, so that "r3" finds "R3", which resembles it in no other letter.
    by_folded = {n.casefold(): n for n in names}
    nearest = difflib.get_close_matches(str(name).casefold(), by_folded, n=1)
    fix = f"Did you mean {by_folded[nearest[0]]!r}?" if nearest else None
    return ConfigError(
        f"unknown {kind}", expected=f"one of {', '.join(names)}", got=repr(name), fix=fix
    )


@contextmanager
def reading(
    path: str | os.PathLike[str],
    what: str,
    error_class: type[RoutingReplayError],
    *,
    also: tuple[type[Exception], ...] = (),
    fix: str | None = None,
) -> Iterator[None]:
    """Turn a failure to read or decode a file into `error_class`.

    Args:
        path: The file; it becomes the error's `where`.
        what: What the file is, such as "the routes file".
        error_class: What to raise for OSError and ValueError (which bad JSON and bad UTF-8 are).
        also: A decoder's own exceptions, such as `yaml.YAMLError`.
        fix: The next step for the user.
    """
    kinds: tuple[type[Exception], ...] = (OSError, ValueError, *also)
    try:
        yield
    except kinds as error:
        raise error_class(f"{what} cannot be read", got=error, where=path, fix=fix) from error


@contextmanager
def writing(
    path: str | os.PathLike[str],
    what: str,
    error_class: type[RoutingReplayError],
    *,
    fix: str | None = None,
) -> Iterator[None]:
    """Turn a failure to write a file into `error_class`; the arguments are those of `reading`."""
    try:
        yield
    except OSError as error:
        got = error.strerror or error
        raise error_class(f"{what} cannot be written", got=got, where=path, fix=fix) from error
