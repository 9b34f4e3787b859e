"""One HTML page, or one picture, from the metrics of runs."""

from .page import write_report
from .picture import write_picture

__all__ = ["write_picture", "write_report"]
