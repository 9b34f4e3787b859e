"""The study: its cells are settings of the recipe, its results are whole, its statistics right."""

import argparse
import json
import math

import pytest

from recipes.minirl.settings.command_line import parse
from recipes.study import tables
from recipes.study.__main__ import command, main, run
from recipes.study.cells import Cell, main_cells, pilot, presets
from recipes.study.results import Result, StudyError, code_version, load, of_run

REGIME = ("1e-3", 8, "fp8-grid")
CELL = Cell(name="main-R3-minirl", flags=("--seed", "0"), seeds=(0, 1))


def result(cell, seed, reward, code="a"):
    steps = ({"step": 0.0, "eval/reward": 0.1}, {"step": 1.0, "eval/reward": reward})
    return Result(cell=cell, seed=seed, code=code, flags=(), steps=steps)


@pytest.fixture
def arguments(tmp_path):
    return argparse.Namespace(
        runs=tmp_path / "runs",
        results=tmp_path / "results",
        steps=24,
        jobs=1,
        regime=REGIME,
        cells="*",
        dry_run=False,
    )


@pytest.mark.parametrize(
    "cell", [*pilot(), *main_cells(REGIME), *presets()], ids=lambda cell: cell.name
)
def test_every_cell_is_a_setting_that_the_recipe_accepts(cell):
    config = parse([*cell.flags, "--seed", "1", "--steps", "24"])
    assert (config.run.seed, config.run.steps) == (1, 24)
    if "-none-" in cell.name:
        assert config.replay.mode == "disabled"


def test_cells_have_distinct_names_and_at_least_three_seeds_where_they_decide():
    names = [cell.name for cell in [*pilot(), *main_cells(REGIME), *presets()]]
    assert len(names) == len(set(names))
    assert all(len(cell.seeds) >= 3 for cell in [*main_cells(REGIME), *presets()])


def test_a_run_that_began_is_resumed_and_another_starts_with_its_flags(arguments):
    fresh = command(CELL, 1, arguments)
    assert fresh[-6:] == ["--seed", "0", "--seed", "1", "--steps", "24"]
    folder = arguments.runs / "main-R3-minirl-seed1"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    assert command(CELL, 1, arguments)[-3:] == ["--run-dir", str(folder), "--resume"]


def test_a_journal_is_reduced_to_the_metrics_of_the_tables(tmp_path):
    layers = {"mean": 0.25, "layers": {"0": 0.5}}
    record = {"step": 3, "eval/reward": 0.5, "routing_replay/live_mass": layers, "noise": 1.0}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    run_of = of_run(tmp_path, "cell", 2, ["--seed", "2"])
    assert run_of.steps == ({"step": 3.0, "eval/reward": 0.5, "routing_replay/live_mass": 0.25},)
    run_of.save(tmp_path)
    (tmp_path / ".other-seed0.4711.tmp.json").write_text("{")  # of a killed run
    assert load(tmp_path) == [run_of] and run_of.code == code_version()


def test_results_of_different_code_are_not_mixed(tmp_path, arguments):
    result("x", 0, 0.5, code="a").save(tmp_path)
    result("x", 1, 0.5, code="b").save(tmp_path)
    with pytest.raises(StudyError, match=r"different versions of the code.*got a \(x-seed0.json\)"):
        load(tmp_path)
    (tmp_path / "x-seed1.json").unlink()
    arguments.results = tmp_path
    with pytest.raises(StudyError, match="another version of the code; expected a"):
        run(arguments)


def test_missing_and_damaged_results_are_errors_of_users(tmp_path, capsys):
    with pytest.raises(StudyError, match="no results"):
        load(tmp_path)
    (tmp_path / "x-seed0.json").write_text("{")
    assert main(["tables", "--results", str(tmp_path)]) == 1
    assert "a result cannot be read" in capsys.readouterr().err
    assert main(["run", "--cells", "nope", "--results", str(tmp_path / "new")]) == 1
    assert "no cell has such a name" in capsys.readouterr().err


def test_the_interval_of_three_values_is_students():
    # Mean 2, standard deviation 1, 2 degrees of freedom: t = 4.3027, over the root of 3.
    interval = tables.Interval.of([1.0, 2.0, 3.0])
    assert interval.mean == 2 and interval.half_width == pytest.approx(4.30265 / math.sqrt(3))
    assert math.isnan(tables.Interval.of([1.0]).half_width)


def test_differences_are_paired_by_seed():
    # Seeds differ much, cells by 0.1 alike: paired, the difference has no spread.
    runs = [result("base", seed, 0.2 * seed) for seed in range(3)]
    runs += [result("better", seed, 0.2 * seed + 0.1) for seed in range(3)]
    table = tables.differences(runs, "base", "held-out reward, after")
    mean, half_width = table.splitlines()[-1].split("|")[2].split("(")[0].split("±")
    assert float(mean) == 0.1 and float(half_width) < 1e-9


def test_the_summary_and_the_picture_name_every_cell(tmp_path, capsys):
    for seed in range(3):
        result("one", seed, 0.3 + seed / 10).save(tmp_path)
        result("two", seed, 0.5).save(tmp_path)
    svg = tmp_path / "picture.svg"
    words = ["tables", "--results", str(tmp_path), "--baseline", "one", "--picture", str(svg)]
    assert main(words) == 0
    # 0.3, 0.4, 0.5: t interval 4.3027 * 0.1 / sqrt(3) = 0.248.
    assert "| one | 0.4 ± 0.25 (3) |" in capsys.readouterr().out
    assert svg.read_text().count("<circle") == 6 and ">two</text>" in svg.read_text()
