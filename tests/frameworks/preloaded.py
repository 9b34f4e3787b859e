"""What the ranks of all files need, imported once: half a minute of processor time."""

import stand_ins

stand_ins.prepare()

# isort: split
import skyrl_model  # noqa: E402, F401
import verl_worker  # noqa: E402, F401
