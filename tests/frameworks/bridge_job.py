"""A training job of Megatron-Bridge: a tiny Qwen3-MoE of its provider, its mock data, its pretrain.

One process runs one job: `run(rank, ...)` on the ranks of a world.
"""

from __future__ import annotations

import contextlib
import os
from functools import partial
from pathlib import Path
from typing import Any

import bridge_on_cpu
import loop_witness
from loop_routes import EXPERTS, LAYERS, LENGTH, MICRO, TOP_K

STEPS = 2
VOCAB = 128


def run(
    rank: int,
    folder: str,
    sizes: dict[str, int],
    routes: str = "",
    own_loop: str = "",
    lora: tuple[str, ...] = (),
) -> None:
    """Train; return nothing: the witness writes its file, and `output` has what was printed.

    Args:
        rank: In the world.
        folder: Of the witness.
        sizes: Parallel sizes and other fields, by the provider's names.
        routes: A table: the callback replays it.
        own_loop: A table: replayed by hand.
        lora: Modules that get adapters, by their names; everything else is frozen then.
    """
    os.environ["LOCAL_RANK"] = str(rank)
    with Path(folder, f"output{rank}").open("w") as file, contextlib.redirect_stdout(file):
        _train(folder, sizes, routes, own_loop, lora)


def _train(folder: str, sizes: dict[str, int], routes: str, own_loop: str, lora: Any) -> None:
    bridge_on_cpu.prepare()
    from megatron.bridge.training import pretrain, train

    witness = loop_witness.Witness(folder)
    witness.watch_routers()
    own = loop_witness.OwnLoop(own_loop, train) if own_loop else None
    callbacks: list[Any] = []
    if routes:
        os.environ["ROUTING_REPLAY_ROUTES"] = routes
        os.environ["ROUTING_REPLAY_METRICS_DIR"] = folder
        from routing_replay.adapters.megatron_bridge import RoutingReplay

        callbacks = [RoutingReplay()]
    model = provider(sizes)
    if lora:
        from megatron.bridge.peft.lora import LoRA

        adapters = LoRA(target_modules=list(lora), dim=4)
        model.register_pre_wrap_hook(lambda chunks: adapters(chunks, training=True))
    config = bridge_on_cpu.job_config(
        model, mock_data(), folder, steps=STEPS, micro_batch_size=MICRO
    )
    pretrain.pretrain(config, step_function(witness, own), callbacks=callbacks)
    witness.save()


def step_function(witness: Any, own: Any) -> Any:
    def step(iterator, model):
        batch = next(iterator)
        witness.begin(model, batch["tokens"])
        call = model if own is None else partial(own.forward, model)
        output = call(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
        return output, partial(witness.loss, model.training, batch["loss_mask"])

    return step


def provider(sizes: dict[str, int]) -> Any:
    from recipes.model.tiny import tiny_config

    hf = tiny_config(layers=LAYERS, experts=EXPERTS, top_k=TOP_K, vocab=VOCAB, head_dim=16)
    return bridge_on_cpu.provider(hf, seq_length=LENGTH, **sizes)


def mock_data() -> Any:
    from megatron.bridge.training import config as c

    return c.MockGPTDatasetConfig(
        random_seed=7,
        reset_attention_mask=False,
        reset_position_ids=False,
        eod_mask_loss=False,
        seq_length=LENGTH,
        num_dataset_builder_threads=1,
        dataloader_type="single",
        num_workers=0,
        data_sharding=True,
        create_attention_mask=False,
    )
