"""What can be set, where it is read from, and what must hold together before a run starts."""
