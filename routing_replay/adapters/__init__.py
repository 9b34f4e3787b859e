"""Routing replay in training loops that are not ours: one short file per framework.

`job.py` is what they share: a job attaches to the model chunks at the actor's first pass, and opens
a scope around every pass of the actor. `batch.py` numbers a batch's rows, which the framework lays
out as it lays out tokens; `routes.py` reads its forms of routes. `patches.py` replaces a
framework's functions after their import, and only as they are known.

Loops whose batches carry no routes read them from a file (`routes_file.py`), find the rows by the
tokens (`content.py`), and announce them at the chunks (`forwards.py`, `relay.py`).
"""
