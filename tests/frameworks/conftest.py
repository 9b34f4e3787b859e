"""Ranks of the frameworks' tests are forked from a process that has imported all of them."""

import os

import megatron_worlds

# Read when verl is imported: its platform and the adapter's mode.
os.environ |= {"VERL_PLATFORM": "cpu", "ROUTING_REPLAY_MODE": "R3", "HF_HUB_OFFLINE": "1"}
megatron_worlds.PRELOADED[:] = ["preloaded"]
