"""routing_replay: the expert path that was sampled is the expert path that is trained."""

__version__ = "0.1.0"
