"""examples/sglang_capture.py runs as it stands, against a server of its own and a given one."""

import subprocess
import sys
from pathlib import Path

import pytest
from sglang_servers import RunningServer

ROOT = Path(__file__).parent.parent


def run_example(*arguments: str) -> list[str]:
    command = [sys.executable, "examples/sglang_capture.py", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


def assert_routes(lines: list[str], num_layers: int, top_k: int) -> None:
    """8 rows: 5 prompt tokens and 3 of the 4 sampled ones."""
    tokens = [line for line in lines if line.startswith("token ")]
    assert [line.endswith("prefill)") for line in tokens] == [True] * 5 + [False] * 3
    layers = [line for line in lines if line.startswith("  layer ")]
    assert len(layers) == 8 * num_layers
    for line in layers:
        ids = line.split("experts [")[1].split("]")[0].split(", ")
        assert len(set(ids)) == top_k


@pytest.mark.parametrize("capture", ["ids", "gates"])
def test_the_example_prints_the_routes_of_a_running_server(server: RunningServer, capture: str):
    lines = run_example("--url", server.server.url, "--capture", capture)
    assert lines[0].startswith("probe: answers")
    assert_routes(lines, num_layers=3, top_k=4)
    assert ("gates [" in "".join(lines)) == (capture == "gates")


@pytest.mark.slow
def test_the_example_launches_a_server_where_none_is_given():
    lines = run_example()
    assert lines[0] == "launching SGLang ..."
    assert_routes(lines, num_layers=4, top_k=4)
