"""The examples that need no engine, run as they stand."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_routes_and_tables_runs_as_it_stands(tmp_path):
    path = tmp_path / "routes.safetensors"
    command = [sys.executable, ROOT / "examples/routes_and_tables.py", path]
    # As a stranger runs it: from another folder, with the package installed or on the path.
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, cwd=tmp_path, env=environment
    )
    # Sequences of 7 and 4 tokens own the rows 0..5 and 6..8; row 8 was lost.
    assert "tensor([ 0,  1,  2,  3,  4,  5, -1, -1,  6,  7, -1, -1])" in done.stdout
    # Two ranks, four chunks per segment: rank 0 holds the first and the last.
    assert "rank 0 of 2: [0, 1, -1, -1, 6, -1]" in done.stdout
    assert "rows        9, covered 88.89 %" in done.stdout
    assert "expected at most 5 rows for 6 tokens; got 6" in done.stdout
    assert path.exists() and done.stderr == ""
