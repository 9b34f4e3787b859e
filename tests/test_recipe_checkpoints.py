"""recipes.minirl.checkpoints: what an interruption leaves behind never looks like a checkpoint."""

import shutil

import pytest

from recipes.minirl import checkpoints


class Killed(BaseException):
    """Stands for the process that dies here."""


def folders(tmp_path):
    return sorted(path.name for path in (tmp_path / "checkpoints").iterdir())


def make(tmp_path, *steps):
    for step in steps:
        folder = checkpoints.folder_of(tmp_path, step)
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_text("weights")


def test_a_run_killed_while_it_removes_a_checkpoint_keeps_the_others_and_clears_up_later(
    tmp_path, monkeypatch
):
    make(tmp_path, 1, 2)

    def die(*_, **__):
        raise Killed

    with monkeypatch.context() as patched, pytest.raises(Killed):
        # The first call clears what an earlier removal left, the second is the removal.
        calls = iter([lambda *_, **__: None, die])
        patched.setattr(shutil, "rmtree", lambda *a, **k: next(calls)(*a, **k))
        checkpoints._remove(checkpoints.folder_of(tmp_path, 1))
    assert folders(tmp_path) == [".step_000001.removed", "step_000002"]
    assert checkpoints.newest(tmp_path) == checkpoints.folder_of(tmp_path, 2)

    make(tmp_path, 3)
    checkpoints._remove(checkpoints.folder_of(tmp_path, 2))
    assert folders(tmp_path) == ["step_000003"]
