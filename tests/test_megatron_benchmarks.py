"""tools/bench: every benchmark that needs no SGLang server runs, and the harness is fair."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tools.bench.paired import ratios, spread, take_turns

ROOT = Path(__file__).parent.parent


# Kernels are not timed without a GPU: their results are checked.
SHORT = ["batch", "counts", "gates_kernel", "payload", "plan", "plan_solver"]
# Six seconds and more.
NAMES = ["attention", "client", "logprobs", "metrics", "plan_step", "publish", "replay"]
NAMES += ["router_kernel", "step", "step_memory", "tables"]
LONG = [pytest.param(name, marks=pytest.mark.slow) for name in NAMES]


@pytest.mark.parametrize("name", SHORT + LONG)
def test_a_benchmark_runs_and_writes_its_figures(tmp_path, name):
    output = tmp_path / "figures.json"
    command = [sys.executable, "-m", f"tools.bench.{name}", "--quick", "--json", str(output)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert result.returncode == 0, result.stderr
    record = json.loads(output.read_text())
    assert record["benchmark"] == name
    assert record["machine"]["torch"]
    assert record["figures"]


def test_variants_take_turns_and_the_order_alternates():
    order = []

    def variant(name, seconds):
        def run():
            order.append(name)
            return seconds

        return run

    times = take_turns({"a": variant("a", 1.0), "b": variant("b", 2.0)}, rounds=2)
    assert order == ["b", "a", "a", "b", "b", "a"]  # the first round warms up
    assert times == {"a": [1.0, 1.0], "b": [2.0, 2.0]}


def test_ratios_are_taken_within_a_round():
    # The machine slows down tenfold; the ratio of a round does not notice.
    found = ratios({"a": [1.0, 10.0, 100.0], "b": [2.0, 20.0, 200.0]}, "a")
    assert (found["b"].low, found["b"].median, found["b"].high) == (2.0, 2.0, 2.0)


def test_a_spread_holds_the_median_and_the_quartiles():
    found = spread([5.0, 1.0, 2.0, 4.0, 3.0])
    assert (found.low, found.median, found.high) == (2.0, 3.0, 4.0)
    assert str(found) == "3.000 [2.000, 4.000]"
