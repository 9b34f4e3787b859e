"""Rewards that can be checked: 1.0 for a right answer, else 0.0."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any


def exact(response: str, answer: str) -> float:
    """Reward a response that is the answer, apart from surrounding white space."""
    return float(response.strip() == answer.strip())


def math(response: str, answer: str) -> float:
    """Reward a response whose last expression equals the answer (library `math-verify`).

    Both sides are parsed: LaTeX (boxed or not), numbers, fractions, sets, intervals. The reference
    may be given with or without dollar signs. A response that cannot be parsed is wrong.
    """
    parse, verify = _math_verify()
    gold = _parsed_answer(answer)
    return float(bool(gold) and bool(verify(gold, parse(response))))


VERIFIERS = {"exact": exact, "math": math}


@functools.lru_cache(maxsize=4096)
def _parsed_answer(answer: str) -> list[Any]:
    parse, _ = _math_verify()
    # LaTeX is only recognised between delimiters; a bare reference is wrapped.
    return parse(answer if "$" in answer or "\\boxed" in answer else f"${answer}$")


@functools.cache
def _math_verify() -> tuple[Callable[..., list[Any]], Callable[..., bool]]:
    # Optional until a task asks for it; its import takes a second.
    import math_verify

    # It warns of every response without an expression, which would bury everything else.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    return math_verify.parse, math_verify.verify
