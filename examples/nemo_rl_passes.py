"""NeMo-RL's passes of a policy with the rollout's routes. Without a GPU:

    ROUTING_REPLAY_NEMO_RL=CHECKOUT .venv-frameworks/bin/python examples/nemo_rl_passes.py

`make test-frameworks` builds that environment; NeMo-RL is on no package index
(docs/adopt/nemo_rl.md). In a job `RAY_RUNTIME_ENV_HOOK` makes Ray patch every worker. Batching,
packing, passes and loss are NeMo-RL's; model and routes are random.
"""

import os
import tempfile
from types import ModuleType

os.environ["ROUTING_REPLAY_MODE"] = "R3"

import frameworks_on_cpu  # noqa: F401

# isort: split
import checkouts
import nemo_step
from nemo_rl.models.megatron import data, train
from tiny_models import write_tiny_qwen3_moe

from recipes.model import parallel
from recipes.model.parallel import ParallelLayout
from routing_replay.adapters import nemo_rl


def main() -> None:
    checkouts.put_on_path("nemo_rl")
    parallel.initialize(ParallelLayout(), seed=1)
    with tempfile.TemporaryDirectory() as folder:
        model = nemo_step.model_of(str(write_tiny_qwen3_moe(folder, vocab=256)), ParallelLayout())
    # The worker's module needs an unreleased Megatron: this has the one name that is replaced.
    worker = ModuleType("nemo_rl.models.policy.workers.megatron_policy_worker")
    worker.get_microbatch_iterator = data.get_microbatch_iterator
    nemo_rl.patch_worker(worker)
    nemo_rl.patch_train(train)
    config = nemo_step.configuration(True, ParallelLayout())
    batch = nemo_step.batch(config, nemo_step.routes())
    old = nemo_step.one_pass(worker, model, config, batch, "logprobs")
    print(f"log-probs of the old policy: {sum(len(part['logprobs']) for part in old)} sequences")
    metrics = nemo_step.one_pass(worker, model, config, batch, "train")[-1]
    for name in ("coverage", "overlap", "overlap_layer_0", "live_mass"):
        print(f"routing_replay/{name}: {metrics['routing_replay/' + name]:.3f}")


if __name__ == "__main__":
    main()
