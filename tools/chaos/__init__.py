"""A training run whose servers, connections, disk and processes fail: `python -m tools.chaos`."""
