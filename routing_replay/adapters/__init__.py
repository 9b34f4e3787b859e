"""Routing replay in training loops that are not ours: one short file per framework.

`job.py` is what they share: a job attaches to the model chunks at the first training step, opens a
scope around every schedule call and announces every forward. `content.py` finds a batch's rows by
its tokens, `relay.py` brings them to pipeline stages that see no tokens, `patches.py` replaces a
framework's functions, and only as they are known.
"""
