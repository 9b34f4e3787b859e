"""recipes.serving.children: what was started ends, however its owner ends."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).parent.parent
OWNER = """\
import sys, time
from pathlib import Path
from recipes.serving.children import Child
child = Child([sys.executable, "-c", "import os, time; print(os.getpid(), flush=True); "
    "time.sleep(600)"], Path(sys.argv[1]), logs_output=True)
time.sleep(600)"""
WAIT_S = 30.0


def test_a_command_ends_when_the_whole_process_group_of_its_owner_is_killed(tmp_path):
    log = tmp_path / "log"
    command = [sys.executable, "-c", OWNER, str(log)]
    owner = subprocess.Popen(command, cwd=ROOT, process_group=0)
    deadline = time.monotonic() + WAIT_S
    try:
        while not (log.exists() and log.read_text().endswith("\n")):
            assert owner.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        os.killpg(owner.pid, signal.SIGKILL)
        owner.wait()
    started = int(log.read_text())
    while psutil.pid_exists(started):
        assert time.monotonic() < deadline, "the command outlives its owner"
        time.sleep(0.05)
