"""A real SGLang server as a child process: `launch(model_path, options) -> Server`."""

from __future__ import annotations

import atexit
import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from routing_replay.capture import CaptureSettings
from routing_replay.errors import ServerError

from . import cpu

HOST = "127.0.0.1"
GUARD = Path(__file__).with_name("guard.py")
LAST_LINES = 20
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
POLL_S = 0.25
# guard.py waits 3 s for the server; more than this means that the guard itself hangs.
STOP_S = 10.0
# SGLang before 0.5.19 derives a second port from the first by adding 10,000, used or not.
HIGHEST_PORT = 65535 - 10000
# A server started by a rank of a torchrun job must not believe that it is one of the ranks.
RANK_PREFIXES = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_")


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """How a server is started.

    Args:
        port: TCP port on 127.0.0.1; a free one, if None.
        capture: "off" (no routes), "stock" (SGLang's own capture), or ours: "ids", "gates",
            "logits". It bounds what a request can ask for.
        logit_fraction: Fraction of the tokens whose full router logits "logits" keeps, in (0, 1].
        weight_version: Version of the weights that the server starts with.
        log_path: Where its output goes; a new temporary file, if None.
        arguments: Further arguments of `sglang.launch_server`, last, so that they win.
        environment: Further environment variables (CUDA_VISIBLE_DEVICES, ...).
        ready_timeout_s: How long it may take to answer; large models load for many minutes.
    """

    port: int | None = None
    capture: str = "ids"
    logit_fraction: float = 0.05
    weight_version: int = 0
    log_path: str | os.PathLike | None = None
    arguments: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    ready_timeout_s: float = 600.0


class Server:
    """A running server. A context manager; it also ends with this process, however that ends.

    Args:
        process: The guard (`guard.py`), whose standard input is our end of the pipe.
        url: Where it answers.
        log_path: Its output.
    """

    def __init__(self, process: subprocess.Popen, url: str, log_path: Path):
        self.process = process
        self.url = url
        self.log_path = log_path
        atexit.register(self.stop)

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *exception) -> None:
        self.stop()

    @property
    def is_alive(self) -> bool:
        return self.process.poll() is None

    def check(self) -> None:
        """Raise ServerError, with the last lines of the log, if the server has died."""
        status = self.process.poll()
        if status is not None:
            raise ServerError(
                f"the SGLang server died with status {status}",
                where=f"{self.url}, log {self.log_path}",
                fix=f"Its last lines:\n{last_lines(self.log_path)}",
            )

    def stop(self) -> None:
        """End the server and everything it started. Idempotent."""
        atexit.unregister(self.stop)
        if self.process.stdin is not None:
            with contextlib.suppress(OSError):
                self.process.stdin.close()
        try:
            self.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def launch(
    model_path: str | os.PathLike,
    options: ServerOptions | None = None,
    on_progress: Callable[[float, str], None] | None = None,
) -> Server:
    """Start `python -m sglang.launch_server` with our plugin and wait until it serves.

    Args:
        model_path: A Hugging Face checkpoint. Without a tokenizer in it the server takes and
            returns token ids only.
        options: See `ServerOptions`.
        on_progress: Called a few times per second with the seconds so far and the log's last line.

    Raises:
        ConfigError: An unknown capture level.
        ServerError: The port is taken, the server died, or was not ready in time.
    """
    options = options or ServerOptions()
    port = options.port if options.port is not None else free_port()
    check_port(port)
    server = _start(Path(model_path), options, port)
    try:
        _wait_until_ready(server, options.ready_timeout_s, on_progress)
    except BaseException:
        server.stop()
        raise
    return server


def command_line(model_path: Path, options: ServerOptions, port: int) -> list[str]:
    """The server's command."""
    command = [sys.executable, "-m", "sglang.launch_server"]
    command += ["--model-path", str(model_path), "--host", HOST, "--port", str(port)]
    command += ["--weight-version", str(options.weight_version)]
    # Its warm-up is a sentence, of which a small tokenizer may make no token at all: it then dies.
    # /health, by which we wait, samples a token too.
    command.append("--skip-server-warmup")
    command += cpu.server_arguments()
    if options.capture != "off":
        command.append("--enable-return-routed-experts")
    # A name on the hub is no folder; SGLang finds its tokenizer there.
    if model_path.is_dir() and not any((model_path / name).exists() for name in TOKENIZERS):
        command.append("--skip-tokenizer-init")
    return command + [str(argument) for argument in options.arguments]


def environment_of(options: ServerOptions) -> dict[str, str]:
    """The server's environment: ours without the ranks of a torchrun job."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(RANK_PREFIXES)}
    environment = inherited | cpu.server_environment(inherited)
    capture = CaptureSettings(level=options.capture, logit_fraction=options.logit_fraction)
    return environment | capture.to_environment() | dict(options.environment)


def free_port() -> int:
    """A TCP port that was free a moment ago."""
    while True:
        with socket.socket() as probe:
            probe.bind((HOST, 0))
            port = probe.getsockname()[1]
        if port <= HIGHEST_PORT:
            return port


def check_port(port: int) -> None:
    """Raise ServerError if somebody listens on the port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise ServerError(
                f"port {port} is taken",
                got=error.strerror,
                where=f"{HOST}:{port}",
                fix="Choose another port, or none to get a free one",
            ) from error


def last_lines(path: Path, count: int = LAST_LINES) -> str:
    """The end of a log, without reading the whole of it."""
    with contextlib.suppress(OSError), open(path, "rb") as log:
        log.seek(max(0, os.path.getsize(path) - 16384))
        return "\n".join(log.read().decode(errors="replace").splitlines()[-count:])
    return ""


def _start(model_path: Path, options: ServerOptions, port: int) -> Server:
    log_path = Path(options.log_path or tempfile.mkstemp("-sglang.log")[1])
    log_path.parent.mkdir(parents=True, exist_ok=True)
    command = command_line(model_path, options, port)
    with open(log_path, "ab") as log:  # a resumed run keeps the log of the one that crashed
        process = subprocess.Popen(
            # A guard that inherited -O or PYTHONPATH could not start where the server could.
            [sys.executable, "-I", str(GUARD), *command],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment_of(options),
        )
    return Server(process, f"http://{HOST}:{port}", log_path)


def _wait_until_ready(server: Server, timeout_s: float, on_progress) -> None:
    start = time.monotonic()
    while not _answers(server.url):
        server.check()
        waited_s = time.monotonic() - start
        if waited_s > timeout_s:
            raise ServerError(
                "the SGLang server is not ready",
                expected=f"an answer within {timeout_s:.0f} s",
                got="none",
                where=f"{server.url}, log {server.log_path}",
                fix=f"Raise ready_timeout_s, or see its last lines:\n{last_lines(server.log_path)}",
            )
        if on_progress is not None:
            on_progress(waited_s, last_lines(server.log_path, 1))
        time.sleep(POLL_S)


def _answers(url: str) -> bool:
    # Without a proxy: the server is on this machine.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"{url}/health", timeout=5) as response:
            return response.status == 200
    except (OSError, urllib.error.URLError):
        return False
