"""The designs that are compared."""

from __future__ import annotations

from .legs import Design

# The defaults of the recipe: one leg after another, weights through a disk.
TODAY = Design(name="default", is_built=True)
BUILT = Design(name="buckets, one step ahead", is_built=True, has_buckets=True, is_ahead=True)
DESIGNS = (
    TODAY,
    Design(name="buckets", is_built=True, has_buckets=True),
    Design(name="one step ahead", is_built=True, is_ahead=True),
    BUILT,
    Design(name="beside servers", is_beside_servers=True),
    Design(name="all three", is_beside_servers=True, has_buckets=True, is_ahead=True),
    Design(
        name="all three, pool",
        is_beside_servers=True,
        has_buckets=True,
        is_ahead=True,
        has_pool=True,
    ),
)
