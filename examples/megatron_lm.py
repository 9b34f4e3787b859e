"""Train on rolled-out samples in Megatron-LM's own loop, with their routes. Without a GPU:

    python examples/megatron_lm.py

This writes a table of tokens and routes, which a job saves from SGLang's answers and which are
random here. Then it starts this file as a training script, by the launcher:

    torchrun ... -m routing_replay.adapters.run SCRIPT.py FLAGS --routing-replay-routes FILE

What follows `Samples` is an ordinary script of megatron-core 0.19: nothing in it knows of replay.
"""

import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch

LAYERS, EXPERTS, TOP_K, VOCAB, LENGTH, NUM_SAMPLES = 2, 8, 2, 128, 32, 12
FLAGS = f"""
    --num-layers {LAYERS} --hidden-size 64 --ffn-hidden-size 128 --num-attention-heads 4
    --seq-length {LENGTH} --max-position-embeddings {LENGTH} --position-embedding-type rope
    --micro-batch-size 2 --global-batch-size 4 --train-iters 3 --eval-iters 0
    --lr 1e-3 --lr-decay-style constant --log-interval 1 --tokenizer-type NullTokenizer
    --vocab-size {VOCAB - 1} --num-experts {EXPERTS} --moe-router-topk {TOP_K}
    --moe-ffn-hidden-size 64 --moe-router-load-balancing-type none --swiglu
    --normalization RMSNorm --disable-bias-linear --untie-embeddings-and-output-weights
""".split()
# Fused functions and NCCL need a GPU.
CPU_FLAGS = ["--transformer-impl", "local", "--distributed-backend", "gloo"]
CPU_FLAGS += ["--no-gradient-accumulation-fusion", "--no-masked-softmax-fusion"]
CPU_FLAGS += ["--no-bias-swiglu-fusion", "--no-bias-dropout-fusion"]
CPU_FLAGS += ["--no-persist-layer-norm", "--no-rope-fusion"]


def write_routes(path: Path) -> None:
    """Save what a rollout leaves: the tokens of each sample, and a row for each but the last."""
    import routing_replay as rr

    generator = np.random.default_rng(0)
    tokens = [sample_tokens(i) for i in range(NUM_SAMPLES)]
    routes = [
        rr.Routes(
            expert_ids_TLK=np.argsort(generator.random((len(t) - 1, LAYERS, EXPERTS)))[
                ..., :TOP_K
            ].astype(np.uint8),
            layers=tuple(range(LAYERS)),
            num_experts=EXPERTS,
        )
        for t in tokens
    ]
    rr.RouteTable.from_routes(routes).with_tokens(tokens).save(path)


def start(path: Path) -> int:
    """Run this file as a training job of one process."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["-m", "routing_replay.adapters.run", __file__, *FLAGS, *CPU_FLAGS]
    command += ["--routing-replay-routes", str(path)]
    environment = os.environ | {"CUDA_DEVICE_MAX_CONNECTIONS": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment).returncode


def sample_tokens(number: int) -> list[int]:
    """Return prompt and response of a sample, of some length."""
    generator = np.random.default_rng(number)
    return generator.integers(0, VOCAB - 1, generator.integers(LENGTH // 2, LENGTH + 2)).tolist()


class Samples(torch.utils.data.Dataset):
    """The samples, padded to the sequence length."""

    def __len__(self) -> int:
        return NUM_SAMPLES

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        tokens = torch.tensor(sample_tokens(number))
        padding = (0, LENGTH + 1 - len(tokens))
        padded = torch.nn.functional.pad(tokens, padding)
        return {
            "tokens": padded[:-1],
            "labels": padded[1:],
            "loss_mask": (torch.arange(1, LENGTH + 1) < len(tokens)).float(),
            "position_ids": torch.arange(LENGTH),
        }


def datasets(sizes, vp_stage=None):
    return Samples(), None, None


datasets.is_distributed = True


def loss(mask, nll):
    total, count = (nll.view(-1) * mask.view(-1)).sum(), mask.sum().int()
    return total, count, {"lm loss": torch.stack([total.detach(), count.float()])}


def forward_step(iterator, model):
    batch = next(iterator)
    nll = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
    return nll, partial(loss, batch["loss_mask"])


def train() -> None:
    import megatron_lm_on_cpu  # on GPUs: leave it out

    # isort: split
    from megatron.core.enums import ModelType
    from megatron.training import argument_utils, pretrain
    from megatron.training.arguments import parse_and_validate_args

    megatron_lm_on_cpu.allow_no_cuda()
    args = parse_and_validate_args()
    model_config = argument_utils.gpt_config_from_args(args)
    config = argument_utils.pretrain_cfg_container_from_args(args, model_config)
    pretrain(config, datasets, ModelType.encoder_or_decoder, forward_step)


if __name__ == "__main__":
    if "RANK" in os.environ:  # torchrun started this process
        train()
    else:
        with tempfile.TemporaryDirectory() as folder:
            routes = Path(folder) / "routes.safetensors"
            write_routes(routes)
            sys.exit(start(routes))
