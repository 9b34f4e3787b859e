"""Fixtures that several test files share."""

from sglang_servers import references, server, sglang_server

__all__ = ["references", "server", "sglang_server"]
