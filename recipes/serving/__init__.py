"""Start SGLang servers and other children of a job, with or without a GPU."""

from .children import Child
from .server import Server, ServerOptions, launch

__all__ = ["Child", "Server", "ServerOptions", "launch"]
