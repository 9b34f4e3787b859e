"""Seconds, bytes, processor time and memory of a step, for today's recipe and for other designs."""
