"""What the examples of frameworks need on a machine without CUDA; a job on GPUs leaves it out.

Import it before a framework. The stand-ins for CUDA's libraries and the tiny models are those of
the tests, and Python is that of `make test-frameworks`.
"""

import os
import sys
from pathlib import Path

FOLDERS = ("tests/frameworks", "tests", ".")
sys.path[:0] = [str(Path(__file__).parents[1] / folder) for folder in FOLDERS]
os.environ |= {
    "VERL_PLATFORM": "cpu",
    "TORCHDYNAMO_DISABLE": "1",
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
}
# A job of one process, which no launcher started.
ALONE = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
for name, value in ALONE.items():
    os.environ.setdefault(name, value)
