"""Files that are complete or absent, never half written."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_write(path: str | os.PathLike[str], is_durable: bool = True) -> Iterator[Path]:
    """Give a temporary path beside `path`; on success sync it and rename it to `path`.

    Use it with any writer: `with atomic_write(path) as partial: partial.write_text(...)`. After an
    exception the temporary file is gone and an earlier file of this name is unchanged.

    Args:
        path: The file's final name; its folder must exist.
        is_durable: Survive a crash of the machine. False saves the wait for the disk.

    Raises:
        OSError: The disk is full or not writable.
    """
    path = Path(path)
    # The process id keeps the ranks of a node apart. The suffix stays, because some writers
    # choose the format by it.
    partial = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield partial
        if is_durable:
            with open(partial, "rb") as file:
                os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
