"""The designs that are compared."""

from __future__ import annotations

from .legs import Design

# The defaults of the recipe: one leg after another, weights through a disk.
TODAY = Design(name="default", is_built=True)
DESIGNS = (
    TODAY,
    Design(name="buckets", is_built=True, has_buckets=True),
    Design(name="one step ahead", is_built=True, ahead=1),
    Design(name="buckets, one step ahead", is_built=True, has_buckets=True, ahead=1),
    Design(name="buckets, two steps ahead", is_built=True, has_buckets=True, ahead=2),
    Design(name="buckets, four steps ahead", is_built=True, has_buckets=True, ahead=4),
    Design(name="beside servers", is_beside_servers=True),
    Design(name="all three", is_beside_servers=True, has_buckets=True, ahead=1),
    Design(name="all three, four steps ahead", is_beside_servers=True, has_buckets=True, ahead=4),
)
