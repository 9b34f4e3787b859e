"""What the ranks of the selected files need, imported once: seconds of processor time for each."""

import importlib
import os

import checkouts
import stand_ins

stand_ins.prepare()

# In this order: what has no checkout must not meet the stand-ins of the others.
MODULES = {"skyrl": "skyrl_model", "verl": "verl_worker", "nemo_rl": "nemo_step"}
needed = os.environ.get("PRELOADED_FRAMEWORKS", "skyrl verl").split()
for name in ("skyrl", "verl", *checkouts.named()):
    if name in needed and name in MODULES:
        importlib.import_module(MODULES[name])
    elif name in needed:
        importlib.import_module("slime_step").load(name)
