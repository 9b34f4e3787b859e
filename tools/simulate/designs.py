"""The designs that are compared."""

from __future__ import annotations

from dataclasses import replace

from .legs import Design

# The defaults of the recipe: one leg after another, weights through a disk.
TODAY = Design(name="default")
BUCKETS = Design(name="buckets", has_buckets=True)
ONE_AHEAD = Design(name="buckets, one step ahead", has_buckets=True, ahead=1)
TWO_AHEAD = Design(name="buckets, two steps ahead", has_buckets=True, ahead=2)
FOUR_AHEAD = Design(name="buckets, four steps ahead", has_buckets=True, ahead=4)


def on_ray(design: Design) -> Design:
    """Return a design with a sampler beside each server."""
    return replace(design, name=f"{design.name}, on Ray", is_beside_servers=True)


DESIGNS = (
    TODAY,
    BUCKETS,
    Design(name="one step ahead", ahead=1),
    ONE_AHEAD,
    TWO_AHEAD,
    FOUR_AHEAD,
    *map(on_ray, (TODAY, ONE_AHEAD, TWO_AHEAD, FOUR_AHEAD)),
)
