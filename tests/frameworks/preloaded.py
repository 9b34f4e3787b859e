"""What the ranks of all files need, imported once: half a minute of processor time."""

import importlib

import checkouts
import stand_ins

stand_ins.prepare()

# isort: split
import skyrl_model  # noqa: E402, F401
import verl_worker  # noqa: E402, F401

for package in checkouts.named():
    if package == "nemo_rl":
        importlib.import_module("nemo_step")
    else:
        importlib.import_module("slime_step").load(package)
