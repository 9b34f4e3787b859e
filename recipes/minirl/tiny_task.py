"""The default task as files: addition of two-digit numbers, and a tokenizer for it."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

# Fixed: every run of a comparison trains and evaluates on the same split, whatever its seed.
SPLIT_SEED = 0
NUM_HELDOUT = 512
PAD, EOS = "<pad>", "<eos>"
VOCABULARY = (PAD, EOS, "<unk>", *"0123456789+=-")
OPERANDS = range(10, 100)


def write_task(folder: str | os.PathLike[str]) -> tuple[Path, Path]:
    """Write train.jsonl and heldout.jsonl (disjoint pairs of numbers); returns their paths.

    An answer has three digits ("37+48=" -> "085"), so that each one has a fixed meaning.
    """
    pairs = [(a, b) for a in OPERANDS for b in OPERANDS]
    random.Random(SPLIT_SEED).shuffle(pairs)
    folder = Path(folder)
    paths = folder / "train.jsonl", folder / "heldout.jsonl"
    for path, part in zip(paths, (pairs[NUM_HELDOUT:], pairs[:NUM_HELDOUT]), strict=True):
        lines = [
            {"prompt": f"{a}+{b}=", "answer": f"{a + b:03d}", "verifier": "exact"} for a, b in part
        ]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return paths


def write_tokenizer(folder: str | os.PathLike[str]) -> None:
    """Write a real fast tokenizer, one token per character, into a checkpoint folder."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: number for number, token in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, unk_token="<unk>"
    ).save_pretrained(folder)
