"""A step of verl's training worker with the rollout's routes. Without a GPU:

    .venv-frameworks/bin/python examples/verl_worker_step.py

`make test-frameworks` builds that environment. A job of verl sets the variable below in Ray's
runtime environment, and that is all (docs/adopt/verl.md): the worker, its engine and the batch are
what its trainer makes. The routes are random here; in a job they come from the rollout.
"""

import os
import tempfile
from pathlib import Path

os.environ["ROUTING_REPLAY_MODE"] = "R3"  # read when verl is imported

import frameworks_on_cpu  # noqa: F401

# isort: split
import tiny_batch
import verl_worker
from verl.utils import tensordict_utils
from verl.utils.metric import reduce_metrics

from recipes.model import parallel
from recipes.model.parallel import ParallelLayout


def main() -> None:
    parallel.initialize(ParallelLayout(), seed=1)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = tiny_batch.write_checkpoint(Path(folder))
        worker = verl_worker.worker(checkpoint, ParallelLayout())
    print("engine:", type(worker.engine).__name__)
    # verl's batch: input_ids, masks, and routed_experts [n, layers, top-k] of each sequence.
    data = verl_worker.batch(0, tiny_batch.captured(tiny_batch.sequences(0)))
    old = worker.infer_batch(data)["log_probs"].values()
    print(f"log-probs of the old policy: {len(old)} tokens, mean {old.float().mean():.3f}")
    tensordict_utils.assign_non_tensor(
        data, epochs=1, mini_batch_size=3, dataloader_kwargs={"shuffle": True}
    )
    output = worker.train_mini_batch(data.exclude("global_token_num", "compute_loss"))
    metrics = reduce_metrics(tensordict_utils.get(output, "metrics"))
    for name in ("coverage", "overlap", "overlap_layer_0", "live_mass"):
        print(f"actor/routing_replay/{name}: {metrics['routing_replay/' + name]:.3f}")


if __name__ == "__main__":
    main()
