"""Routes of sequences, tables of a step's routes, and their bytes on the wire and on disk."""

from .origin import Origin
from .payload import decode, encode
from .routes import RouterLogits, Routes
from .shape import MoEShape
from .table import RouteTable

__all__ = ["MoEShape", "Origin", "RouteTable", "RouterLogits", "Routes", "decode", "encode"]
