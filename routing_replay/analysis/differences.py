"""The result of comparing two route tables: by layer, position and origin, and the worst tokens."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class LayerDifference:
    """One layer: mean overlap, exact-set rate, share of tokens whose first difference it is.

    `router_kl` is KL(A || B) in nats over the rows whose logits both files hold, or None.
    `explanation` names a simple cause of unrelated routes, where there is one.
    """

    layer: int
    overlap: float
    exact_match: float
    first_difference: float
    router_kl: float | None = None
    explanation: str = ""


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """A group of tokens: how many, the mean overlap, the share with a differing layer."""

    name: str
    num_rows: int
    overlap: float
    any_layer_differs: float


@dataclass(frozen=True, kw_only=True)
class TokenDifference:
    """One of the tokens with the most differing layers; `text` if a tokenizer decoded it."""

    sequence: int
    position: int
    num_layers: int
    first_layer: int
    text: str = ""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Agreement of two tables, over the rows that both cover."""

    first: str
    second: str
    num_rows: int
    num_skipped: int
    overlap: float
    exact_match: float
    any_layer_differs: float
    layers: tuple[LayerDifference, ...]
    positions: tuple[Bucket, ...]
    origins: tuple[Bucket, ...]
    worst: tuple[TokenDifference, ...]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def text(self) -> str:
        """Return the human-readable report."""
        lines = [
            f"{self.first} against {self.second}",
            f"  rows compared {self.num_rows}, skipped (not covered by both) {self.num_skipped}",
            f"  overlap@K {self.overlap:.6f}, exact sets {self.exact_match:.6f}, "
            f"tokens with a differing layer {100 * self.any_layer_differs:.2f} %",
            "",
            "  layer  overlap@K  exact sets  first difference  router KL",
        ]
        for row in self.layers:
            kl = "-" if row.router_kl is None else f"{row.router_kl:.3e}"
            lines.append(
                f"  {row.layer:5d}  {row.overlap:9.6f}  {row.exact_match:10.6f}  "
                f"{100 * row.first_difference:14.2f} %  {kl:>9s}  {row.explanation}".rstrip()
            )
        for title, buckets in (("position", self.positions), ("origin", self.origins)):
            lines += ["", f"  by {title:<14s}  rows  overlap@K  tokens that differ"]
            lines += [
                f"  {b.name:<17s}  {b.num_rows:d}  {b.overlap:.6f}  "
                f"{100 * b.any_layer_differs:.2f} %"
                for b in buckets
            ]
        if self.worst:
            lines += ["", "  sequence  position  differing layers  first  token"]
            lines += [
                f"  {t.sequence:8d}  {t.position:8d}  {t.num_layers:16d}  {t.first_layer:5d}  "
                f"{t.text}"
                for t in self.worst
            ]
        return "\n".join(lines)
