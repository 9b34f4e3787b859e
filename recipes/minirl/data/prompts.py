"""Prompts with verifiable answers: a JSON-lines file, read strictly, and the order they come in."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from routing_replay.errors import DataError, reading

from .verifiers import VERIFIERS

EXPECTED = (
    '{"prompt": text or list of messages, "answer": text, "verifier": '
    + " or ".join(f'"{name}"' for name in VERIFIERS)
    + "}"
)
KEYS = ("prompt", "answer", "verifier")
# Data sets have it; nothing here reads it.
IGNORED_KEYS = ("id",)


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One task.

    Args:
        prompt: Text, or chat messages ({"role": ..., "content": ...}).
        answer: The reference.
        verifier: Name of the check that compares a response with it.
    """

    prompt: str | list[dict[str, str]]
    answer: str
    verifier: str = "exact"


def read_prompts(path: str | os.PathLike[str]) -> list[Prompt]:
    """Read all prompts of a file; skip empty lines.

    Raises:
        DataError: The file cannot be read or is empty, or a line is broken (file, line, expected).
    """
    prompts = []
    with reading(path, "the prompt file", DataError), open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                prompts.append(_parse(line, f"{path}, line {number}"))
    if not prompts:
        raise DataError("the prompt file is empty", expected=EXPECTED + " per line", where=path)
    return prompts


def take(prompts: Sequence[Prompt], start: int, count: int, seed: int) -> list[Prompt]:
    """Return prompts `start` .. `start + count` of an endless stream of shuffled epochs.

    The order is a function of the seed and the position alone: a resumed run needs nothing but the
    number of prompts it has consumed.
    """
    taken: list[Prompt] = []
    size = len(prompts)
    while len(taken) < count:
        epoch, offset = divmod(start + len(taken), size)
        order = np.random.default_rng([seed, epoch]).permutation(size)
        taken += [prompts[i] for i in order[offset : offset + count - len(taken)]]
    return taken


def _parse(line: str, where: str) -> Prompt:
    try:
        content = json.loads(line)
    except ValueError as error:
        raise DataError(
            "the line is no JSON",
            expected=EXPECTED,
            got=f"{line.strip()[:80]!r} ({error})",
            where=where,
        ) from error
    if not isinstance(content, dict) or not {"prompt", "answer"} <= content.keys():
        raise DataError(
            "the line is no prompt", expected=EXPECTED, got=line.strip()[:80], where=where
        )
    for key in content:
        if key not in KEYS + IGNORED_KEYS:
            raise DataError(f"unknown key {key!r}", expected=EXPECTED, where=where)
    prompt = Prompt(**{key: content[key] for key in KEYS if key in content})
    messages = isinstance(prompt.prompt, list) and all(
        isinstance(m, dict) and {"role", "content"} <= m.keys() for m in prompt.prompt
    )
    if not prompt.prompt or not (isinstance(prompt.prompt, str) or messages):
        raise DataError("the prompt is no text", expected=EXPECTED, where=where)
    if not isinstance(prompt.answer, str) or prompt.verifier not in VERIFIERS:
        raise DataError(
            "the answer or the verifier cannot be used",
            expected=EXPECTED,
            got=f"answer {prompt.answer!r}, verifier {prompt.verifier!r}",
            where=where,
        )
    return prompt
