"""`routing_replay.attach` loads Megatron-Core, and nothing before it does."""

import subprocess
import sys


def test_attach_loads_megatron_only_when_it_is_touched():
    code = (
        "import sys, routing_replay as rr; before = 'megatron' in sys.modules; rr.attach;"
        "print(before, 'megatron' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]
