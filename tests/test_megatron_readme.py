"""The README's trainer block, on a real model in one process."""

import os

import numpy as np
import torch
from megatron_worlds import run_world

LAYERS, EXPERTS, TOP_K, WIDTH = 2, 8, 2, 16
LENGTHS = (16, 9, 12, 14)


def run_the_trainer_block(rank, checkpoint, folder):
    """Run the block on a fresh model.

    Return the rows replayed per (layer, microbatch) and the squared norm of the gradients.
    """
    import readme_blocks
    from megatron_worlds import megatron

    from recipes.model.model import build_model, transformer_config
    from recipes.model.parallel import ParallelLayout

    os.chdir(folder)
    routes_of_the_step().save("routes.safetensors")
    layout = ParallelLayout()
    with megatron(layout):
        chunks = build_model(transformer_config(checkpoint, layout, dtype=torch.float32), layout)
        names = readme_blocks.run(
            readme_blocks.block("rr.attach"),
            model_chunks=chunks,
            batches=list(batches()),
            policy_loss=lambda nll, batch: (nll.mean(), {}),
        )
        lines = names["replay"].receipt.lines
        gradients = [p.grad for p in chunks[0].parameters() if p.grad is not None]
        replayed = {(line.layer, line.microbatch): line.num_replayed for line in lines}
        return replayed, float(sum(g.square().sum() for g in gradients))


def routes_of_the_step():
    import routing_replay as rr

    generator = np.random.default_rng(0)
    sequences = []
    for length in LENGTHS:
        scores_TLE = generator.random((length - 1, LAYERS, EXPERTS))
        sequences.append(
            rr.Routes(
                expert_ids_TLK=np.argsort(scores_TLE)[..., :TOP_K].astype(np.uint8),
                covered_T=np.ones(length - 1, np.bool_),
                layers=tuple(range(LAYERS)),
                num_experts=EXPERTS,
            )
        )
    return rr.RouteTable.from_routes(sequences)


def batches():
    """Two microbatches of two sequences each."""
    generator = torch.Generator().manual_seed(0)
    for first in (0, 2):
        tokens = torch.randint(0, 128, (2, WIDTH), generator=generator)
        yield {
            "lengths": LENGTHS[first : first + 2],
            "sequences": range(first, first + 2),
            "tokens": tokens,
            "labels": tokens.roll(-1, dims=1),
            "positions": torch.arange(WIDTH).expand(2, -1),
        }


def test_the_trainer_block_replays_every_layer_of_every_microbatch(tmp_path):
    from tiny_models import write_tiny_qwen3_moe

    checkpoint = write_tiny_qwen3_moe(tmp_path / "model", layers=LAYERS)
    ((replayed, squared_norm),) = run_world(run_the_trainer_block, 1, checkpoint, tmp_path)
    # Sequences of 16 and 9, then of 12 and 14 tokens; the last token of each has no row.
    assert replayed == {(layer, m): 23 + m for layer in range(LAYERS) for m in (0, 1)}
    assert squared_norm > 0
