"""Ranks of the frameworks' tests are forked from a process that has imported the frameworks."""

import os

import megatron_worlds

# Read when verl is imported: its platform and the adapter's mode.
os.environ |= {"VERL_PLATFORM": "cpu", "ROUTING_REPLAY_MODE": "R3", "HF_HUB_OFFLINE": "1"}
megatron_worlds.PRELOADED[:] = ["preloaded"]
NEEDED = {
    "test_verl": ["verl"],
    "test_skyrl": ["skyrl"],
    "test_slime": ["slime", "miles"],
    "test_nemo_rl": ["nemo_rl"],
    "test_framework_examples": ["verl", "skyrl", "slime", "nemo_rl"],
}


def pytest_collection_finish(session):
    """Leave word which frameworks the selected tests run: each costs many seconds to import."""
    files = dict.fromkeys(item.path.stem for item in session.items)
    needed = [name for file in files for name in NEEDED.get(file, ())]
    os.environ["PRELOADED_FRAMEWORKS"] = " ".join(dict.fromkeys(needed))
