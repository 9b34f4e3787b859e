"""StepRoutes: the routes of a training step by row, in one table or in parts."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import numpy as np

from ..errors import TableError
from .shape import MoEShape
from .token_rows import RowSource


class StepRoutes(RowSource):
    """What replay reads; the rows of sequence s are offsets[s] .. offsets[s + 1].

    Attributes:
        shape: Layers, number of experts and top-k.
        source: "rollout" or "training".
        where: What error messages call it.
        offsets_S1: int64.
        covered_T: bool, the row has routes.
        newest_version: Of the weights that routed any row; -1: unknown.
        keeps_gates, keeps_logits: Gate probabilities, router logits of some rows are there.
    """

    shape: MoEShape
    source: str
    where: str
    offsets_S1: np.ndarray
    covered_T: np.ndarray
    newest_version: int
    keeps_gates: bool
    keeps_logits: bool

    @property
    def num_rows(self) -> int:
        return len(self.covered_T)

    @property
    def num_sequences(self) -> int:
        return len(self.offsets_S1) - 1

    def rows(self, sequence: int, num_tokens: int, covered_only: bool = True) -> np.ndarray:
        """Return for each token of a sequence its row, or -1.

        Args:
            sequence: Its number.
            num_tokens: Tokens of the sequence, prompt and response.
            covered_only: False names the rows that are still to be recorded, too (R2).

        Returns:
            int64 [num_tokens]; -1 for uncovered rows and for the last sampled token.

        Raises:
            TableError: The sequence has as many rows as tokens, or more: they belong to other
                tokens (each token but the last can have one).
        """
        if not 0 <= sequence < self.num_sequences:
            raise TableError(
                "the table has no such sequence",
                expected=f"0..{self.num_sequences - 1}",
                got=sequence,
                where=self.where,
            )
        start, stop = self.offsets_S1[sequence], self.offsets_S1[sequence + 1]
        if stop - start > num_tokens - 1:
            raise TableError(
                "the sequence has more rows than tokens that were fed to the model",
                expected=f"at most {num_tokens - 1} rows for {num_tokens} tokens",
                got=int(stop - start),
                where=f"sequence {sequence} of {self.where}",
                fix="Pass prompt + response tokens exactly as the server consumed them",
            )
        rows = np.full(num_tokens, -1, np.int64)
        covered_T = self.covered_T[start:stop] if covered_only else True
        rows[: stop - start] = np.where(covered_T, np.arange(start, stop), -1)
        return rows

    def check_shape(self, shape: MoEShape) -> None:
        """Raise TableError unless a model of this shape made the routes."""
        shape.require_equal(
            self.shape,
            "the routes belong to another model",
            TableError,
            where=self.where,
            fix="Roll out and train the same checkpoint; name the routed layers the same way",
        )

    @abstractmethod
    def gather(self, layers: Sequence[int], rows_T: np.ndarray) -> np.ndarray:
        """Return the expert ids of some layers and rows, in the compact dtype; read nothing else.

        Args:
            layers: Global layer indices.
            rows_T: int64 rows; what -1 returns must not be used.

        Returns:
            [len(layers), T, K], uint8 or uint16.
        """

    @abstractmethod
    def gather_weights(self, layers: Sequence[int], rows_T: np.ndarray) -> np.ndarray | None:
        """Return combine weights like `gather`, float32; None if they were not captured."""

    @abstractmethod
    def has_gates(self, rows_T: np.ndarray) -> np.ndarray:
        """Return whether gate probabilities of each row are kept; bool [T]."""

    @abstractmethod
    def gather_gates(self, layers: Sequence[int], rows_T: np.ndarray) -> np.ndarray | None:
        """Return gate probabilities like `gather`, float16; None if they were not captured.

        Args:
            layers: Global layer indices.
            rows_T: int64 rows that `has_gates`.
        """

    @abstractmethod
    def has_logits(self, rows_T: np.ndarray) -> np.ndarray:
        """Return whether router logits of each row are kept; bool [T]."""

    @abstractmethod
    def gather_logits(self, layers: Sequence[int], rows_T: np.ndarray) -> np.ndarray:
        """Return the router logits of some layers, float32 [len(layers), T, E].

        Args:
            layers: Global layer indices.
            rows_T: int64 rows that `has_logits`.
        """

    @abstractmethod
    def versions(self, rows_T: np.ndarray) -> np.ndarray:
        """Return the version of the weights that routed each row; int64 [T], -1: unknown."""

    @abstractmethod
    def local_rows(self) -> np.ndarray:
        """Return which rows this process can gather; bool over all rows."""

    @abstractmethod
    def local_layers(self) -> tuple[int, ...]:
        """Return the layers that this process can gather."""

    @abstractmethod
    def expert_counts(self) -> np.ndarray:
        """Return how many covered rows of each sequence select each expert.

        Returns:
            Unsigned integers [S, L, E]; with all rows covered a layer sums to rows x top-k.
        """
