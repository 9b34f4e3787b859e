"""The examples of Megatron run as they stand, and replay what their batches promise."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "megatron_replay.py"


def test_the_megatron_example_replays_every_row_of_its_batches(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", str(EXAMPLE)]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=240
    )
    assert done.returncode == 0, done.stderr
    steps = re.findall(r"step \d: loss (\S+), coverage (\S+), overlap (\S+)", done.stdout)
    assert len(steps) == 3
    for loss, coverage, overlap in steps:
        assert abs(float(loss)) < 100 and coverage == "1.00"
        # Two experts of eight at random overlap by a quarter on average.
        assert 0.15 < float(overlap) < 0.35
    # 8 sequences in 4 microbatches of 2 x 16 tokens; a row for each token but the last.
    lengths = re.search(r"^LENGTHS = \[(.*)\]", EXAMPLE.read_text(), re.MULTILINE)
    rows = sum(int(length) - 1 for length in lengths[1].split(","))
    table = [line.split() for line in done.stdout.splitlines() if re.match(r" *\d+ +\d+ ", line)]
    assert table == [
        [str(layer), "4", "128", str(rows), str(rows), str(128 - rows), "4"] for layer in range(4)
    ]


@pytest.mark.slow
def test_the_megatron_lm_example_replays_the_samples_that_it_trains_on(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", str(ROOT / "examples" / "megatron_lm.py")]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=600
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "routing_replay: the first pass replayed" in done.stdout
    assert done.stdout.count("lm loss:") == 3
