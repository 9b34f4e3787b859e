"""The stored responses of a run, kept beyond the checkpoint that covers them."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path

from recipes.minirl.rollout.answers import FOLDER

# A step of a tiny run, and the checkpoint after it, take half a second.
POLL_S = 0.02


@contextlib.contextmanager
def kept_answers(run_dir: Path, kept: Path) -> Iterator[None]:
    """Within: each file of stored responses gets a second name, which no checkpoint removes.

    Args:
        run_dir: Folder of the run.
        kept: For the second names; it becomes a folder of stored responses.
    """
    has_ended = threading.Event()

    def keep() -> None:
        for path in (run_dir / FOLDER).glob("step_*/group_*.jsonl"):
            second = kept / path.relative_to(run_dir / FOLDER)
            if not path.is_symlink() and not second.exists():
                second.parent.mkdir(parents=True, exist_ok=True)
                os.link(path, second)

    def keep_all() -> None:
        while not has_ended.wait(POLL_S):
            # A checkpoint removes a step meanwhile.
            with contextlib.suppress(FileNotFoundError):
                keep()

    kept.mkdir(parents=True, exist_ok=True)
    thread = threading.Thread(target=keep_all)
    thread.start()
    try:
        yield
    finally:
        has_ended.set()
        thread.join()
