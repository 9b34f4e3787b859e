"""The designs that are compared."""

from __future__ import annotations

from .legs import Design

TODAY = Design(name="today", is_built=True)
DESIGNS = (
    TODAY,
    Design(name="buckets", has_buckets=True),
    Design(name="one step ahead", is_ahead=True),
    Design(name="routes in parts", has_parts=True),
    Design(name="all three", has_parts=True, has_buckets=True, is_ahead=True),
    Design(name="all three, pool", has_parts=True, has_buckets=True, is_ahead=True, has_pool=True),
)
