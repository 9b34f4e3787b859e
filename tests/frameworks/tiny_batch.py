"""A tiny model, and sequences whose every token has another id: a dispatch then names its token."""

from __future__ import annotations

from pathlib import Path

import torch

from recipes.minirl.data.tiny_task import write_tokenizer
from recipes.model.tiny import tiny_config

LAYERS, EXPERTS, TOP_K, VOCAB = 4, 8, 2, 512
LENGTHS = [17, 30, 9, 23, 12, 40]  # 131 tokens of a data-parallel rank
CUT, NUM_CAPTURED = 2, 4  # a truncated capture: this sequence has routes for its first rows only
NUM_ROUTED = sum(LENGTHS) - len(LENGTHS) - (LENGTHS[CUT] - 1 - NUM_CAPTURED)


def write_checkpoint(folder: Path) -> str:
    """Write a random Qwen3-MoE whose routers are decided, and its tokenizer."""
    from transformers import Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = tiny_config(
        layers=LAYERS, experts=EXPERTS, top_k=TOP_K, vocab=VOCAB, head_dim=16, dense_size=128
    )
    config.initializer_range = 0.2
    Qwen3MoeForCausalLM(config).save_pretrained(folder)
    write_tokenizer(folder)
    return str(folder)


def write_checkpoint_of_words(folder: Path) -> str:
    """Write a random Qwen3-MoE of 256 tokens, each a word of its own."""
    from tiny_models import write_tiny_qwen3_moe
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    write_tiny_qwen3_moe(folder, vocab=256)
    words = Tokenizer(models.WordLevel({str(i): i for i in range(256)}, unk_token="0"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="1").save_pretrained(folder)
    return str(folder)


def token_routes() -> torch.Tensor:
    """Experts of every token id: int64 [V, L, K], distinct in a row, and never a row of zeros."""
    scores = torch.rand(VOCAB, LAYERS, EXPERTS, generator=torch.Generator().manual_seed(3))
    return scores.topk(TOP_K).indices


def sequences(data_rank: int) -> list[torch.Tensor]:
    """Token ids of a data-parallel rank's sequences; no id occurs twice on any rank."""
    ids = torch.randperm(VOCAB - 1, generator=torch.Generator().manual_seed(7)) + 1
    own = ids[data_rank * sum(LENGTHS) :][: sum(LENGTHS)]
    return list(own.split(LENGTHS))


def captured(tokens: list[torch.Tensor]) -> list[torch.Tensor]:
    """Routes [n, L, K] of each sequence; rows that were not captured are zero."""
    routed = captured_whole(tokens)
    routed[CUT][NUM_CAPTURED:] = 0
    return routed


def captured_whole(tokens: list[torch.Tensor]) -> list[torch.Tensor]:
    """As `captured`, with the rows that were cut; the last token of a sequence was never fed."""
    routed = [token_routes()[sequence].to(torch.int16) for sequence in tokens]
    for routes in routed:
        routes[-1] = 0
    return routed


def expected_maps(tokens: list[torch.Tensor]) -> torch.Tensor:
    """bool [V, L, E]: where a token must be dispatched; no expert for one that routes live."""
    maps_VLE = torch.zeros(VOCAB, LAYERS, EXPERTS, dtype=torch.bool)
    for sequence, routes in zip(tokens, captured(tokens), strict=True):
        for token, ids_LK in zip(sequence.tolist(), routes.long(), strict=True):
            if ids_LK.any():
                maps_VLE[token].scatter_(1, ids_LK, True)
    return maps_VLE
