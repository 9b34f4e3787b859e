"""recipes.minirl.tiny_model: the checkpoint that runs with the same settings share."""

from recipes.minirl import tiny_model
from recipes.minirl.command_line import parse


def test_two_runs_that_make_the_same_model_at_once_share_one(tmp_path, monkeypatch):
    flags = ("--cache-dir", str(tmp_path), "--warmup-target", "0")
    config = parse([*flags, "--tiny-layers", "1", "--tiny-experts", "4", "--tiny-top-k", "2"])
    make_model, others = tiny_model.make_model, []

    def while_another_run_finishes(config):
        monkeypatch.setattr(tiny_model, "make_model", make_model)
        monkeypatch.setattr(tiny_model.os, "getpid", lambda: 0)  # the other run's
        others.append(tiny_model.prepare(config))
        return make_model(config)

    monkeypatch.setattr(tiny_model, "make_model", while_another_run_finishes)
    folder = tiny_model.prepare(config)
    assert others == [folder]
    assert (folder / "model.safetensors").is_file()
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]  # nothing half made is left
