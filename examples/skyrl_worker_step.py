"""Passes of SkyRL's Megatron policy worker with the rollout's routes. Without a GPU:

    .venv-frameworks/bin/python examples/skyrl_worker_step.py

`make test-frameworks` builds that environment. In a job `RAY_RUNTIME_ENV_HOOK` makes Ray call
`patch_wrapper` in every worker, and SkyRL's own key carries the routes (docs/adopt/skyrl.md). The
routes are random here; in a job they come from the rollout.
"""

import os
import tempfile
from pathlib import Path

os.environ["ROUTING_REPLAY_MODE"] = "R3"

import frameworks_on_cpu  # noqa: F401

# isort: split
import skyrl_model
import tiny_batch
from skyrl.backends.skyrl_train.workers.megatron import megatron_model_wrapper

from recipes.model import parallel
from recipes.model.parallel import ParallelLayout
from routing_replay.adapters import skyrl


def main() -> None:
    skyrl.patch_wrapper(megatron_model_wrapper)
    parallel.initialize(ParallelLayout(), seed=1)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = tiny_batch.write_checkpoint(Path(folder))
        wrapper = skyrl_model.wrapper(
            checkpoint, ParallelLayout(), packed=True, loss="routing_replay/minirl"
        )
    # SkyRL's microbatches: padded sequences, and the packed rollout_expert_indices beside them.
    routed = tiny_batch.captured(tiny_batch.sequences(0))
    old = skyrl_model.log_probs(wrapper, skyrl_model.micro_batches(2, routed))
    print(f"log-probs of the old policy: {len(old)} tokens, mean {old.float().mean():.3f}")
    _, metrics = skyrl_model.gradients(wrapper, skyrl_model.micro_batches(2, routed))
    for name in ("coverage", "overlap", "overlap_layer_0", "live_mass"):
        print(f"routing_replay/{name}: {metrics[-1]['routing_replay/' + name]:.3f}")


if __name__ == "__main__":
    main()
