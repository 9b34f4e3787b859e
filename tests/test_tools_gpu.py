"""tools.gpu: a command that fails or hangs is recorded, and the others run; the page of it all."""

import json

import pytest

from tools import gpu, gpu_page


def command(*arguments, **options):
    return gpu.Command(name="a command", arguments=arguments, **options)


def test_a_failed_command_is_recorded_with_its_output():
    outcome = gpu.run(command("-c", "print('why'); raise SystemExit(3)"), 1, True)
    assert outcome.returncode == 3
    assert outcome.output == "why"


def test_a_hanging_command_ends_after_its_time():
    hanging = "import time; print('begun', flush=True); time.sleep(60)"
    outcome = gpu.run(command("-c", hanging, timeout_s=2), 1, False)
    assert outcome.returncode is None
    assert outcome.output == "begun"
    assert outcome.seconds < 30


def test_a_dry_run_takes_the_small_sizes_and_hides_the_gpu():
    program = "import os, sys; print(sys.argv[1:], os.environ.get('CUDA_VISIBLE_DEVICES'))"
    dry = gpu.run(command("-c", program, "--tokens", "9", quick=("--quick",)), 1, True)
    assert dry.output == "['--quick'] "
    assert dry.command.endswith("--quick")
    real = gpu.run(command("-c", program, "--tokens", "9", quick=("--quick",)), 1, False)
    assert real.output.startswith("['--tokens', '9']")


def test_all_results_are_in_one_file_and_a_failure_does_not_stop_the_rest(tmp_path, monkeypatch):
    parts = {1: (command("-c", "raise SystemExit(1)"), command("-c", "print('second')"))}
    monkeypatch.setattr(gpu, "PARTS", parts)
    output = tmp_path / "gpu.json"
    assert gpu.main(["--dry-run", "--part", "1", "--json", str(output)]) == 1
    record = json.loads(output.read_text())
    assert [result["returncode"] for result in record["results"]] == [1, 0]
    assert record["results"][1]["output"] == "second"


def test_help_says_what_each_part_proves_and_that_no_gpu_has_seen_it(capsys):
    with pytest.raises(SystemExit):
        gpu.main(["--help"])
    text = capsys.readouterr().out
    assert "HAS NOT BEEN RUN ON A GPU" in text
    assert all(f"\n    {part}  " in text for part in gpu.PARTS)


def test_every_command_names_a_file_and_its_arguments():
    for command in (command for commands in gpu.PARTS.values() for command in commands):
        module = command.arguments[1].replace("tools.bench.", "tools/bench/") + ".py"
        name = command.arguments[7] if command.arguments[1] == "pytest" else module
        assert (gpu.ROOT / name).exists(), command.name


def record(**changes):
    figures = {
        "machine": {"device": "H200", "torch": "2.11", "python": "3.12"},
        "figures": {
            "copy_gb_per_s": 4300.5,
            "rows": [{"tokens": 16, "way": "kernel", "us": {"median": 2.5, "low": 2.0, "high": 3}}],
        },
    }
    result = {"name": "router", "part": 4, "command": "python -m router", "seconds": 3.4}
    result |= {"returncode": 0, "output": "", "figures": figures}
    return {"is_dry": False, "date": "2026-12-01", "results": [result | changes]}


def test_the_page_has_every_figure_with_its_spread_command_and_machine(tmp_path):
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps(record()))
    gpu_page.main([str(path), "--output", str(tmp_path / "page.md")])
    page = (tmp_path / "page.md").read_text()
    assert "| 4 | router: `python -m router` | well | 3 |" in page
    assert "H200, torch 2.11, Python 3.12." in page
    assert "| rows / 16, kernel |  | 2.5 [2, 3] |" in page
    assert "|  | 4300.5 |  |" in page
    assert "DRY RUN" not in page and "did not run" in page


def test_the_page_says_what_failed_and_that_a_dry_run_means_nothing():
    page = gpu_page.page([record(returncode=1, figures=None, output="why") | {"is_dry": True}])
    assert "**failed (1)**" in page and "why" in page
    assert "DRY RUN on a CPU: no figure on this page means anything." in page
