"""Train on rolled-out samples in Megatron-Bridge's own loop, with their routes. Without a GPU:

    make test-frameworks FRAMEWORKS_ARGS=--only-install
    .venv-frameworks/bin/python examples/megatron_bridge.py

Samples and routes are those of `megatron_lm.py`. This writes them to a table, which a job saves
from SGLang's answers, then starts this file as a training job. All that replay adds to the job is
the callback; ROUTING_REPLAY_ROUTES names the table.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from megatron_lm import EXPERTS, LAYERS, LENGTH, TOP_K, VOCAB, Samples, forward_step, write_routes

ROOT = Path(__file__).parents[1]


def start(path: Path) -> int:
    """Run this file as a training job of one process."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", __file__]
    environment = os.environ | {"ROUTING_REPLAY_ROUTES": str(path), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, cwd=path.parent).returncode


def train() -> None:
    # On GPUs: leave it out, and make the provider and the configuration that you would make anyway.
    sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "frameworks")]
    import bridge_on_cpu

    bridge_on_cpu.prepare()
    # isort: split
    from megatron.bridge.data.base import DatasetProvider
    from megatron.bridge.training.pretrain import pretrain

    from recipes.model.tiny import tiny_config
    from routing_replay.adapters.megatron_bridge import RoutingReplay

    class Rollouts(DatasetProvider):
        """The samples, as a job's own data set."""

        def build_datasets(self, context):
            return Samples(), None, None

    hf = tiny_config(layers=LAYERS, experts=EXPERTS, top_k=TOP_K, vocab=VOCAB, head_dim=16)
    model = bridge_on_cpu.provider(hf, seq_length=LENGTH)
    data = Rollouts(dataloader_type="single", num_workers=0)
    config = bridge_on_cpu.job_config(model, data, ".", steps=3, micro_batch_size=2)
    pretrain(config, forward_step, callbacks=[RoutingReplay()])


if __name__ == "__main__":
    if "RANK" in os.environ:  # torchrun started this process
        train()
    else:
        with tempfile.TemporaryDirectory() as folder:
            routes = Path(folder) / "routes.safetensors"
            write_routes(routes)
            sys.exit(start(routes))
