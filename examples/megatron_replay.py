"""Routing replay in a Megatron loop of your own. Runs in one process, without a GPU:

    python examples/megatron_replay.py

A job of yours has its model, batches and loss already. What replay adds are the lines marked (1) to
(4). Here the model is tiny, the tokens are random, and so are the routes, which a job takes from
SGLang's answers (see sglang_capture.py).
"""

import sys
from pathlib import Path

import numpy as np
import torch
from transformers import Qwen3MoeConfig

sys.path.insert(0, str(Path(__file__).parents[1]))  # recipes/ is not installed with the package

# A stand-in for your model: Megatron on a CPU needs recipes.model before megatron itself.
from recipes.model import parallel
from recipes.model.model import build_model, transformer_config

# isort: split
from megatron.core.pipeline_parallel import get_forward_backward_func

import routing_replay as rr

VOCAB, LAYERS, EXPERTS, TOP_K = 128, 4, 8, 2
LENGTHS = [16, 11, 13, 16, 9, 15, 12, 16]  # tokens of the step's sequences
WIDTH, MICROBATCH = 16, 2


def build() -> tuple[list[torch.nn.Module], torch.optim.Optimizer]:
    """Return the model chunks of this rank, as Megatron's get_model does, and their optimizer."""
    layout = parallel.ParallelLayout()
    parallel.initialize(layout, seed=1)
    hf = Qwen3MoeConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=64,
        moe_intermediate_size=32,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        norm_topk_prob=True,
    )
    chunks = build_model(transformer_config(hf, layout, recompute="full"), layout)
    return chunks, torch.optim.AdamW(chunks[0].parameters(), lr=1e-3)


def random_routes(num_tokens: int, generator: np.random.Generator) -> rr.Routes:
    """Return what SGLang returns for a sequence: a row for each token but the last."""
    scores_TLE = generator.random((num_tokens - 1, LAYERS, EXPERTS))
    return rr.Routes(
        expert_ids_TLK=np.argsort(scores_TLE)[..., :TOP_K].astype(np.uint8),
        covered_T=np.ones(num_tokens - 1, np.bool_),
        layers=tuple(range(LAYERS)),
        num_experts=EXPERTS,
    )


def microbatches(table: rr.RouteTable, generator: np.random.Generator):
    """Yield the step's microbatches; `token_rows` are cut like `input_ids`."""
    for first in range(0, len(LENGTHS), MICROBATCH):
        sequences = range(first, first + MICROBATCH)
        lengths = [LENGTHS[s] for s in sequences]
        input_ids = torch.from_numpy(generator.integers(0, VOCAB, (MICROBATCH, WIDTH)))
        yield {
            "input_ids": input_ids,
            "position_ids": torch.arange(WIDTH).expand(MICROBATCH, -1),
            "labels": input_ids.roll(-1, dims=1),
            "mask": torch.arange(1, WIDTH + 1) < torch.tensor(lengths)[:, None],
            "advantages": torch.from_numpy(generator.normal(size=(MICROBATCH, 1))).float(),
            "token_rows": table.token_rows(lengths, width=WIDTH, sequences=sequences),  # (2)
        }


def main() -> None:
    chunks, optimizer = build()
    generator = np.random.default_rng(0)
    replay = rr.attach(chunks, rr.ReplayConfig(mode="R3"))  # (1)

    def forward_step(iterator, model):
        batch = next(iterator)
        with replay.microbatch(batch["token_rows"], mask=batch["mask"]):  # (3)
            output = model(batch["input_ids"], batch["position_ids"], None, labels=batch["labels"])

        def policy_gradient(nll):  # -log pi(token) of every position, from the labels
            loss = (nll * batch["advantages"] * batch["mask"]).sum() / batch["mask"].sum()
            return loss, {"loss": loss.item()}

        return output, policy_gradient

    for step in range(3):
        table = rr.RouteTable.from_routes([random_routes(n, generator) for n in LENGTHS])
        optimizer.zero_grad()
        with replay.replaying(table):  # (4): forward, recomputation and backward
            losses = get_forward_backward_func()(
                forward_step_func=forward_step,
                data_iterator=microbatches(table, generator),
                model=chunks[0],
                num_microbatches=len(LENGTHS) // MICROBATCH,
                seq_length=WIDTH,
                micro_batch_size=MICROBATCH,
                forward_only=False,
            )
        optimizer.step()
        metrics = {name: metric.value() for name, metric in replay.metrics().items()}
        coverage, overlap = (metrics[f"routing_replay/{n}"] for n in ("coverage", "overlap"))
        mean_loss = np.mean([loss["loss"] for loss in losses])
        print(f"step {step}: loss {mean_loss:.4f}, coverage {coverage:.2f}, overlap {overlap:.2f}")
    print(replay.receipt.table())
    replay.remove()
    parallel.destroy()


if __name__ == "__main__":
    main()
