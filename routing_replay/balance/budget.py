"""What fits into a microbatch."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ..errors import ConfigError
from .layout import PlanLayout


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What fits into one bin, and how many microbatches there are.

    Args:
        tokens: Most tokens of a bin; 0: any number.
        sequences: Most sequences of a bin; 0: any number.
        microbatches: Microbatches of a minibatch on each rank; 0: as few as fit.
        expert_tokens: Most tokens of one layer on one expert-parallel rank in a microbatch, which
            bounds the buffers of the experts; 0: any number.

    Raises:
        ConfigError: Negative numbers, or none that bounds a microbatch.
    """

    tokens: int = 0
    sequences: int = 0
    microbatches: int = 0
    expert_tokens: int = 0

    def __post_init__(self) -> None:
        sizes = (self.tokens, self.sequences, self.microbatches, self.expert_tokens)
        if min(sizes) < 0 or not (self.tokens or self.sequences or self.microbatches):
            raise ConfigError(
                "the budget bounds no microbatch",
                expected="a number of tokens, sequences or microbatches, none below 0",
                got=self,
            )

    def check(self, lengths_S: np.ndarray) -> None:
        """Raise ConfigError for a budget below the longest sequence."""
        longest = int(lengths_S.max(initial=0))
        if self.tokens and longest > self.tokens:
            raise ConfigError(
                "the token budget is below the longest sequence",
                expected=f"at least {longest} tokens",
                got=self.tokens,
                where=f"sequence {int(lengths_S.argmax())}",
                fix="Raise the budget, or cut the sequence",
            )

    def counts_of_microbatches(self, lengths_S: np.ndarray, layout: PlanLayout) -> range:
        """Return the numbers of microbatches to try, smallest first.

        Raises:
            ConfigError: Fewer sequences than bins, or a number that the pipeline cannot run.
        """
        step, data = layout.microbatch_multiple, layout.data
        most = len(lengths_S) // data
        if self.microbatches:
            if self.microbatches % step or self.microbatches > most:
                raise ConfigError(
                    "the number of microbatches does not fit the minibatch and the pipeline",
                    expected=f"a multiple of {step}, at most {most}",
                    got=self.microbatches,
                )
            return range(self.microbatches, self.microbatches + 1)
        least = 1
        if self.tokens:
            least = max(least, math.ceil(int(lengths_S.sum()) / (self.tokens * data)))
        if self.sequences:
            least = max(least, math.ceil(len(lengths_S) / (self.sequences * data)))
        return range(math.ceil(least / step) * step, most + 1, step)
