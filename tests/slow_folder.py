"""A shared folder as a network file system shows it: what others made is seen late.

A sitecustomize.py that imports this makes every Python process of a node do so. Under the folder
SLOW_FOLDER a process does not see a checkpoint or a version of the weights (two names below the
folder) before SLOW_S seconds have passed since it first looked for it: the file system remembers
that it was not there.
"""

import errno
import os
import time

ROOT, DELAY_S = os.environ.get("SLOW_FOLDER"), float(os.environ.get("SLOW_S", "0"))
first_look_s = {}


def is_visible(path):
    names = os.path.relpath(os.fspath(path), ROOT).split(os.sep)
    if names[0] == ".." or len(names) < 2:
        return True
    first_s = first_look_s.setdefault(tuple(names[:2]), time.monotonic())
    return time.monotonic() - first_s >= DELAY_S


def stat_late(path, *arguments, **options):
    if isinstance(path, (str, os.PathLike)) and not is_visible(path):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), os.fspath(path))
    return stat(path, *arguments, **options)


def mkdir_late(path, *arguments, **options):
    try:
        return mkdir(path, *arguments, **options)
    except FileExistsError:
        # The server has answered that it is there; the client's memory of it is corrected.
        names = os.path.relpath(os.fspath(path), ROOT).split(os.sep)
        first_look_s[tuple(names[:2])] = -DELAY_S
        raise


if ROOT:
    stat, mkdir = os.stat, os.mkdir
    os.stat, os.mkdir = stat_late, mkdir_late
