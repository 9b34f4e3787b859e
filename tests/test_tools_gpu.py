"""tools.gpu: a command that fails or hangs is recorded, and the others still run."""

import json

import pytest

from tools import gpu


def command(*arguments, **options):
    return gpu.Command(name="a command", arguments=arguments, **options)


def test_a_failed_command_is_recorded_with_its_output():
    outcome = gpu.run(command("-c", "print('why'); raise SystemExit(3)"), 1, "cpu")
    assert outcome.returncode == 3
    assert outcome.output == "why"


def test_a_hanging_command_ends_after_its_time():
    hanging = "import time; print('begun', flush=True); time.sleep(60)"
    outcome = gpu.run(command("-c", hanging, timeout_s=2), 1, "cpu")
    assert outcome.returncode is None
    assert outcome.output == "begun"
    assert outcome.seconds < 30


def test_the_cpu_takes_the_small_sizes_and_hides_the_gpu():
    program = "import os, sys; print(sys.argv[1:], os.environ.get('CUDA_VISIBLE_DEVICES'))"
    dry = gpu.run(command("-c", program, "--tokens", "9", quick=("--quick",)), 1, "cpu")
    assert dry.output == "['--quick'] "
    real = gpu.run(command("-c", program, "--tokens", "9", quick=("--quick",)), 1, "cuda")
    assert real.output.startswith("['--tokens', '9']")


def test_all_results_are_in_one_file_and_a_failure_does_not_stop_the_rest(tmp_path, monkeypatch):
    parts = {1: (command("-c", "raise SystemExit(1)"), command("-c", "print('second')"))}
    monkeypatch.setattr(gpu, "PARTS", parts)
    output = tmp_path / "gpu.json"
    assert gpu.main(["--device", "cpu", "--part", "1", "--json", str(output)]) == 1
    record = json.loads(output.read_text())
    assert [result["returncode"] for result in record["results"]] == [1, 0]
    assert record["results"][1]["output"] == "second"


def test_help_says_what_each_part_proves_and_that_no_gpu_has_seen_it(capsys):
    with pytest.raises(SystemExit):
        gpu.main(["--help"])
    text = capsys.readouterr().out
    assert "HAS NOT BEEN RUN ON A GPU" in text
    assert all(f"\n    {part}  " in text for part in gpu.PARTS)
