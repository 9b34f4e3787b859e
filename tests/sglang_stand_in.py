"""In place of an interpreter with SGLang: tells versions, or answers on --host and --port.

A file `broken_PORT` beside it makes its server answer nothing but 503.
"""

import sys
import time
from pathlib import Path

TESTS = Path(__file__).resolve().parent
SCRIPT = """\
#!{python}
import sys
if sys.argv[1] == "-c":
    print("0.5.23 0.1")
    sys.exit()
sys.path[:0] = [{tests!r}, {root!r}]
from sglang_stand_in import serve
serve({folder!r}, *(sys.argv[sys.argv.index(flag) + 1] for flag in ("--host", "--port")))
"""


def write_stand_in(folder):
    """Write the interpreter into a folder; return its path."""
    path = folder / "stand_in"
    names = {"python": sys.executable, "tests": str(TESTS), "root": str(TESTS.parent)}
    path.write_text(SCRIPT.format(**names, folder=str(folder)))
    path.chmod(0o755)
    return path


def unless_broken(folder, port):
    """What a stand-in answers, as a `FakeServer` is told."""

    def misbehave(route, body, answer):
        if (Path(folder) / f"broken_{port()}").exists():
            return 503, {}
        return 200, answer

    return misbehave


def serve(folder, host, port):
    from rollout_servers import FakeServer

    FakeServer(unless_broken(folder, lambda: port), int(port), host)
    while True:
        time.sleep(60)
