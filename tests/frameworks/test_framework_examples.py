"""The frameworks' examples run as they stand, in ranks that have imported the frameworks."""

import re

import checkouts
import pytest
from checkouts import ROOT
from megatron_worlds import run_world

NUMBER = r"\d+\.\d+"
PRINTED = {
    "verl_worker_step": [
        "engine: RoutingReplayEngine",
        "routing_replay: .*mode R3, routes of the rollout, 4 routed layers 0-3, .*verl",
        f"actor/routing_replay/overlap_layer_0: {NUMBER}",
    ],
    "skyrl_worker_step": [
        "routing_replay: .*mode R3, routes of the rollout, .*SkyRL",
        f"routing_replay/overlap_layer_0: {NUMBER}",
    ],
    "slime_rollout_step": [
        "routing_replay: .*mode R3, routes of the rollout",
        "old_log_probs: 684 of 684 rows replayed",
        "update: 684 of 684 rows replayed",
    ],
    "nemo_rl_passes": [
        "routing_replay: .*mode R3, routes of the rollout, .*NeMo-RL",
        f"routing_replay/overlap_layer_0: {NUMBER}",
    ],
}
NEEDED = {"slime_rollout_step": "slime", "nemo_rl_passes": "nemo_rl"}


def run_example(rank, name):
    """Run a file as a script; return what it printed."""
    import contextlib
    import io
    import runpy
    import sys

    sys.path.insert(0, str(ROOT / "examples"))
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
    return printed.getvalue()


@pytest.mark.parametrize("name", PRINTED)
def test_an_example_replays_and_says_so(name):
    if name in NEEDED:
        checkouts.checkout_of(NEEDED[name])
    (printed,) = run_world("test_framework_examples:run_example", 1, name)
    for line in PRINTED[name]:
        assert re.search(line, printed), printed
