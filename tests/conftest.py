"""Fixtures that several test files share."""

from sglang_servers import sglang_server

__all__ = ["sglang_server"]
