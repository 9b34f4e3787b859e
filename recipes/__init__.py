"""Training recipes built on routing_replay; nothing in the package imports them."""
