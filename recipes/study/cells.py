"""The cells of the study: which settings are run, with which seeds. See docs/study.md for why."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

# 512 responses per step: N mini-batches of 512 / N.
RESPONSES = 512


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One setting of the recipe.

    Args:
        name: Of its files; a comparison names cells by it.
        flags: Of `python -m recipes.minirl`, on top of the preset tiny_cpu.
        seeds: One run each.
    """

    name: str
    flags: tuple[str, ...]
    seeds: tuple[int, ...]


# What replays, by the name in tables.
REPLAY = {
    "none": ("--routing-replay-mode", "disabled"),
    "R2": ("--routing-replay-mode", "R2"),
    "R3": ("--routing-replay-mode", "R3"),
    "weights": (
        *("--routing-replay-mode", "R3", "--routing-replay-weights", "straight_through"),
        *("--routing-replay-capture", "weights"),
    ),
    "soft": ("--routing-replay-mode", "R3", "--routing-replay-soft-ratio", "0.5"),
}
LOSSES = {
    "minirl": ("--objective", "minirl"),
    "no-m": ("--objective", "minirl_no_is"),
    "no-clip": ("--objective", "minirl_no_clip"),
    "grpo": ("--objective", "grpo"),
}
LEARNING_RATES = ("3e-4", "1e-3")
PRECISIONS = ("checkpoint", "fp8-grid")


def setting(learning_rate: str, minibatches: int, precision: str) -> tuple[str, ...]:
    """Return the flags of a regime."""
    return (
        *("--learning-rate", learning_rate),
        *("--minibatch-size", str(RESPONSES // minibatches)),
        *("--rollout-weights", precision),
    )


def pilot() -> list[Cell]:
    """Return the search for a regime in which training without replay degrades."""
    return [
        Cell(
            name=f"pilot-{replay}-lr{rate}-n{minibatches}-{precision}",
            flags=(*setting(rate, minibatches, precision), *REPLAY[replay], *LOSSES["minirl"]),
            seeds=(0,),
        )
        for rate, minibatches, precision, replay in product(
            LEARNING_RATES, (4, 8), PRECISIONS, ("none", "R3")
        )
    ]


def main_cells(regime: tuple[str, int, str]) -> list[Cell]:
    """Return the arms that decide, in the regime (learning rate, N, precision) of the pilot.

    Left out: soft replay and replayed weights under other losses than MiniRL, and grpo with R2. The
    arms of a hypothesis that lay within each other's interval after three seeds have two more.
    """
    arms = [(replay, "minirl") for replay in REPLAY]
    arms += [(replay, loss) for loss in ("no-m", "no-clip") for replay in ("none", "R2", "R3")]
    arms += [("none", "grpo"), ("R3", "grpo")]
    close = [(replay, "minirl") for replay in REPLAY]
    close += [("none", "no-clip"), ("R3", "no-clip"), ("R3", "no-m")]
    return [
        Cell(
            name=f"main-{replay}-{loss}",
            flags=(*setting(*regime), *REPLAY[replay], *LOSSES[loss]),
            seeds=tuple(range(5 if (replay, loss) in close else 3)),
        )
        for replay, loss in arms
    ]


def presets() -> list[Cell]:
    """Return the presets that have run for a few steps only, beside their baseline."""
    names = {"baseline": "tiny_cpu", "bupo": "tiny_bupo", "justrl": "tiny_justrl"}
    return [
        Cell(name=f"preset-{name}", flags=("--preset", preset), seeds=(0, 1, 2))
        for name, preset in names.items()
    ]
