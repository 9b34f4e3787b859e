"""The default task as files: addition of two-digit numbers, and a tokenizer for it.

With the calculator the sums have three terms, and a response calls it once for each addition.
"""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

from ..rollout.turns import calculate

# Fixed: every run of a comparison trains and evaluates on the same split, whatever its seed.
SPLIT_SEED = 0
NUM_HELDOUT = 512
PAD, EOS = "<pad>", "<eos>"
VOCABULARY = (PAD, EOS, "<unk>", *"0123456789+=-")
OPERANDS = range(10, 100)
NUM_TERMS = {"none": 2, "calculator": 3}


def write_task(folder: str | os.PathLike[str], tool: str = "none") -> tuple[Path, Path]:
    """Write train.jsonl and heldout.jsonl (disjoint sums); returns their paths.

    An answer has three digits ("37+48=" -> "085"), so that each one has a fixed meaning.
    """
    sums: list[tuple[int, ...]] = [(a, b) for a in OPERANDS for b in OPERANDS]
    shuffle = random.Random(SPLIT_SEED)
    shuffle.shuffle(sums)
    if NUM_TERMS[tool] == 3:
        sums = [(*terms, shuffle.choice(OPERANDS)) for terms in sums]
    folder = Path(folder)
    paths = folder / "train.jsonl", folder / "heldout.jsonl"
    for path, part in zip(paths, (sums[NUM_HELDOUT:], sums[:NUM_HELDOUT]), strict=True):
        lines = [
            {"prompt": f"{'+'.join(map(str, s))}=", "answer": f"{sum(s):03d}", "verifier": "exact"}
            for s in part
        ]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return paths


def demonstration(prompt: str, answer: str, tool: str) -> list[tuple[str, bool]]:
    """Return a good response in pieces, each with whether the model writes it itself.

    With the calculator "12+34+56=" is answered by "12+34=" "046" "046+56=" "102" "102", of which
    the tool returns the second and the fourth.
    """
    pieces: list[tuple[str, bool]] = []
    if tool == "calculator":
        total, *terms = prompt.removesuffix("=").split("+")
        for term in terms:
            call = f"{total}+{term}="
            total = calculate(call)
            pieces += [(call, True), (total, False)]
    return [*pieces, (answer, True)]


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
