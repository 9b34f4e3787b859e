"""examples/two_engines.py runs as it stands: replay brings the engines closer."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_replayed_kl_is_below_the_live_one():
    command = [sys.executable, "examples/two_engines.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    kl = re.findall(r"(live|replayed) rout\w+: +(\S+) nats per token", done.stdout)
    live, replayed = (float(value) for _, value in kl)
    # Measured: 8e-4 live, 4e-5 replayed. Sampling has no fixed seed, so the factor varies.
    assert 0 < replayed < live
