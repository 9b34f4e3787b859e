"""The tiny model: a Qwen3-MoE checkpoint with a tokenizer, warmed up on the task's answers.

The launcher runs it as `python -m recipes.minirl.data.tiny_model CONFIG.json`: a child process, so
that its memory is free again before the engines start.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from recipes.model.tiny import tiny_config

from ..settings.config import RecipeConfig
from .prompts import Prompt, read_prompts, take
from .tiny_task import EOS, PAD, VOCABULARY, demonstration, write_task, write_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, Qwen3MoeConfig

# With transformers' default of 0.02 the logits of so small a model are flat: for long it learns
# nothing, and its experts are so alike that the choice among them hardly matters.
INITIALIZER_RANGE = 0.12
# Narrow, with experts as wide as the residual stream: the experts then carry what the model knows,
# and a token that is routed to another expert gets another answer, as in a large model.
HIDDEN_SIZE = 64
EXPERT_SIZE = 64
BATCH_SIZE = 128
LEARNING_RATE = 3e-3
RAMP_STEPS = 20
# Leaves the model unsure of what it knows. Reinforcement learning sharpens that, so a few minutes
# show its effect. A response with calls has four times as many tokens to be unsure of.
LABEL_SMOOTHING = {"none": 0.25, "calculator": 0.05}
NUM_PROBES = 256
PROBE_EVERY = 10
IGNORE = -100  # the label that cross_entropy leaves out
# Raise it with every change of `make_model` or `warm_up`: models of other versions are not reused.
VERSION = 2


def checkpoint_folder(config: RecipeConfig) -> Path:
    """Return the folder of this configuration's tiny model."""
    m = config.model
    sizes = [m.tiny_layers, m.tiny_experts, m.tiny_top_k, m.warmup_target, m.warmup_steps]
    smoothing = LABEL_SMOOTHING[config.rollout.tool]
    constants = [HIDDEN_SIZE, EXPERT_SIZE, INITIALIZER_RANGE, smoothing, VOCABULARY]
    tool = [config.rollout.tool] if config.rollout.tool != "none" else []
    text = json.dumps([VERSION, *sizes, *constants, config.run.seed, *tool])
    return Path(m.cache_dir) / f"tiny-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def prepare(config: RecipeConfig, report: Callable[[str], None] = print) -> Path:
    """Write checkpoint, tokenizer and task of this configuration unless they exist.

    Returns:
        The checkpoint's folder; the task's files lie in it.
    """
    folder = checkpoint_folder(config)
    if (folder / "config.json").is_file():
        report(f"Tiny model: {folder} (kept from an earlier run)")
        return folder
    partial = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    partial.mkdir(parents=True)
    try:
        train_path, heldout_path = write_task(partial, config.rollout.tool)
        write_tokenizer(partial)
        model = make_model(config)
        if config.model.warmup_target > 0:
            warm_up(model, read_prompts(train_path), read_prompts(heldout_path), config, report)
        model.save_pretrained(partial)
        try:
            os.replace(partial, folder)
        except OSError:
            # Another run may have made the same model meanwhile; anything else is an error.
            if not (folder / "config.json").is_file():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def make_model(config: RecipeConfig) -> PreTrainedModel:
    """Return a random Qwen3-MoE in float32."""
    from transformers import Qwen3MoeForCausalLM

    torch.manual_seed(config.run.seed)
    model: PreTrainedModel = Qwen3MoeForCausalLM(hf_config(config))
    model.float()
    return model


def hf_config(config: RecipeConfig) -> Qwen3MoeConfig:
    """Return the tiny model's sizes."""
    m = config.model
    hf: Qwen3MoeConfig = tiny_config(
        layers=m.tiny_layers,
        hidden=HIDDEN_SIZE,
        experts=m.tiny_experts,
        top_k=m.tiny_top_k,
        vocab=len(VOCABULARY),
        heads=2,
        expert_size=EXPERT_SIZE,
        dense_size=2 * HIDDEN_SIZE,  # of dense layers, of which there are none
        initializer_range=INITIALIZER_RANGE,
        eos_token_id=VOCABULARY.index(EOS),
        # transformers sets the embedding of a padding token to zero. Responses sample it at
        # first, and RMSNorm scales the gradient of a zero vector by 1 / sqrt(eps) = 1,000.
        pad_token_id=None,
    )
    return hf


def warm_up(
    model: PreTrainedModel,
    train: list[Prompt],
    probes: list[Prompt],
    config: RecipeConfig,
    report: Callable[[str], None],
) -> None:
    """Train on the answers until the model is right often enough to learn from rewards.

    The end is a sampled accuracy instead of a step count: seeds differ by a factor of two in the
    steps until a tiny model learns to carry, and RL should start from the same accuracy.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    probe = _encode(probes[:NUM_PROBES], config.rollout.tool)
    for step in range(1, config.model.warmup_steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, step / RAMP_STEPS)
        batch = take(train, (step - 1) * BATCH_SIZE, BATCH_SIZE, config.run.seed)
        logits, labels = _logits_and_labels(model, *_encode(batch, config.rollout.tool))
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1),
            labels.flatten(),
            label_smoothing=LABEL_SMOOTHING[config.rollout.tool],
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % PROBE_EVERY == 0:
            accuracy = _sampled_accuracy(model, *probe)
            report(f"Warm-up step {step}: loss {loss:.3f}, sampled accuracy {accuracy:.2f}")
            if accuracy >= config.model.warmup_target:
                return


@torch.no_grad()
def _sampled_accuracy(
    model: PreTrainedModel, tokens_ST: torch.Tensor, labels_ST: torch.Tensor
) -> float:
    """Return the exact probability that a sample at temperature 1 is right, mean over prompts."""
    logits, labels = _logits_and_labels(model, tokens_ST, labels_ST)
    nll_ST = torch.nn.functional.cross_entropy(
        logits.transpose(1, 2), labels, reduction="none", ignore_index=IGNORE
    )
    return (-nll_ST.sum(1)).exp().mean().item()


def _logits_and_labels(
    model: PreTrainedModel, tokens_ST: torch.Tensor, labels_ST: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return model(tokens_ST).logits[:, :-1], labels_ST[:, 1:]


def _encode(prompts: list[Prompt], tool: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token ids and labels [S, T]; prompts and what a tool returns have no label."""
    ids = {token: number for number, token in enumerate(VOCABULARY)}
    tokens, labels = [], []
    for p in prompts:
        assert isinstance(p.prompt, str)  # the task's own prompts
        pieces = [(p.prompt, False), *demonstration(p.prompt, p.answer, tool)]
        tokens.append([*(ids[c] for text, _ in pieces for c in text), ids[EOS]])
        is_own = [*(is_own for text, is_own in pieces for _ in text), True]
        labels.append([t if own else IGNORE for t, own in zip(tokens[-1], is_own, strict=True)])
    return _padded(tokens, ids[PAD]), _padded(labels, IGNORE)


def _padded(rows: list[list[int]], value: int) -> torch.Tensor:
    tensors = [torch.tensor(row) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)


def main(config_path: str) -> None:
    values = json.loads(Path(config_path).read_text())
    prepare(RecipeConfig.from_mapping(values), lambda text: print(text, flush=True))


if __name__ == "__main__":
    main(sys.argv[1])
