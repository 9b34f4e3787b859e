"""Jobs of `megatron_lm_script.py`: its flags, and ranks that are forked instead of started.

`run` is a rank of `megatron_worlds.run_world`: forked from a process that has imported Megatron, a
job takes a few seconds of processor time, where torchrun takes a dozen for each rank.
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

from loop_routes import EXPERTS, LAYERS, LENGTH, MICRO, TOP_K

SCRIPT = Path(__file__).parent / "megatron_lm_script.py"
STEPS = 2
FLAGS = f"""
    --num-layers {LAYERS} --hidden-size 64 --ffn-hidden-size 128 --num-attention-heads 4
    --seq-length {LENGTH} --max-position-embeddings {LENGTH} --position-embedding-type rope
    --micro-batch-size {MICRO} --global-batch-size 4 --train-iters {STEPS}
    --eval-iters 1 --eval-interval 1 --lr 1e-3 --min-lr 1e-4 --lr-decay-style constant
    --num-experts {EXPERTS} --moe-router-topk {TOP_K} --moe-ffn-hidden-size 64
    --moe-token-dispatcher-type alltoall --moe-router-load-balancing-type none
    --transformer-impl local --normalization RMSNorm --swiglu --disable-bias-linear
    --untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0
    --no-gradient-accumulation-fusion --no-masked-softmax-fusion --no-bias-swiglu-fusion
    --no-bias-dropout-fusion --no-persist-layer-norm --no-rope-fusion
    --distributed-backend gloo --tokenizer-type NullTokenizer --vocab-size 255
    --log-interval 1 --seed 7 --num-workers 0
""".split()
# Layers that take sequence and context parallelism and packed segments without a GPU.
OWN_SPEC = ["--spec", "megatron_lm_spec", "layer_spec"]


def run(rank: int, nproc: int, folder: str, flags: list[str], routes: str = "") -> None:
    """One rank of a job; with routes, by the launcher.

    Args:
        rank: In the world, which is initialized.
        nproc: Ranks of the world.
        folder: Where the witness writes.
        flags: Further flags of the script or of Megatron.
        routes: A table to replay.
    """
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(nproc)}
    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    os.chdir(folder)
    arguments = [str(SCRIPT), "--witness", folder, *FLAGS, *flags]
    if routes:
        from routing_replay.adapters import run as launcher

        launcher.main([*arguments, "--routing-replay-routes", routes])
    else:
        sys.argv = arguments
        runpy.run_path(str(SCRIPT), run_name="__main__")
