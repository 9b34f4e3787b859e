"""A real SGLang server as a child process: `launch(model_path, options) -> Server`."""

from __future__ import annotations

import os
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
from .children import Child
from .ports import HOST, HeldPort

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
POLL_S = 0.25
HEALTH_TIMEOUT_S = 5.0
# A server started by a rank of a torchrun job must not believe that it is one of the ranks.
RANK_PREFIXES = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_")


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """How a server is started.

    Args:
        port: TCP port; a free one, if None.
        host: Address of this machine that it listens on.
        capture: "off" (no routes), "stock" (SGLang's own capture), or ours: "ids", "weights",
            "gates", "logits". It bounds what a request can ask for.
        logit_fraction: Fraction of the tokens whose full router logits "logits" keeps, in (0, 1].
        has_kernel: Whether a Triton kernel computes the gates; needs a GPU.
        weight_version: Version of the weights that the server starts with; -1: of none that a
            trainer publishes, so that a server that starts again never passes for one with those.
        log_path: Where its output goes; a new temporary file, if None.
        arguments: Further arguments of `sglang.launch_server`, last, so that they win.
        environment: Further environment variables (CUDA_VISIBLE_DEVICES, ...).
        python: The interpreter that runs SGLang. Its environment needs sglang and routing_replay;
            the trainer's then needs no SGLang.
        ready_timeout_s: How long it may take to answer; large models load for many minutes.
    """

    port: int | None = None
    host: str = HOST
    capture: str = "ids"
    logit_fraction: float = 0.05
    has_kernel: bool = False
    weight_version: int = 0
    log_path: str | os.PathLike[str] | None = None
    arguments: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    python: str | os.PathLike[str] = sys.executable
    ready_timeout_s: float = 600.0


class Server(Child):
    """A running server. A context manager; it also ends with this process, however that ends.

    Args:
        model_path: A Hugging Face checkpoint.
        options: See `ServerOptions`.
        port: TCP port; a free one, if None. It is held until the server stops.
    """

    def __init__(self, model_path: Path, options: ServerOptions, port: int | None):
        self._held = HeldPort(port, options.host)
        self.port = self._held.number
        self.url = f"http://{options.host}:{self.port}"
        super().__init__(
            command_line(model_path, options, self.port),
            Path(options.log_path or tempfile.mkstemp("-sglang.log")[1]),
            inherited=environment_of(options),
            logs_output=True,
        )

    @property
    def is_alive(self) -> bool:
        return self.status is None

    def stop(self) -> None:
        super().stop()
        self._held.release()

    def check(self) -> None:
        """Raise ServerError, with the last lines of the log, if the server has died."""
        if self.status is not None:
            raise ServerError(
                f"the SGLang server died with status {self.status}",
                where=f"{self.url}, log {self.log_path}",
                fix=f"Its last lines:\n{self.last_lines()}",
            )


def launch(
    model_path: str | os.PathLike[str],
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
        ServerError: The port is taken, the interpreter does not exist, the server died, or was not
            ready in time.
    """
    options = options or ServerOptions()
    if not Path(options.python).is_file():
        raise ServerError("the server's interpreter does not exist", got=options.python)
    server = Server(Path(model_path), options, options.port)
    try:
        _wait_until_ready(server, options.ready_timeout_s, on_progress)
    except BaseException:
        server.stop()
        raise
    return server


def command_line(model_path: Path, options: ServerOptions, port: int) -> list[str]:
    """Return the server's command."""
    command = [os.fspath(options.python), "-m", cpu.server_module()]
    command += ["--model-path", str(model_path), "--host", options.host, "--port", str(port)]
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
    """Return the server's environment: ours without the ranks of a torchrun job."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(RANK_PREFIXES)}
    environment = inherited | cpu.server_environment(inherited)
    capture = CaptureSettings(
        level=options.capture,
        logit_fraction=options.logit_fraction,
        has_kernel=options.has_kernel,
    )
    return environment | capture.to_environment() | dict(options.environment)


def _wait_until_ready(
    server: Server, timeout_s: float, on_progress: Callable[[float, str], None] | None
) -> None:
    start = time.monotonic()
    while not answers(server.url):
        server.check()
        waited_s = time.monotonic() - start
        if waited_s > timeout_s:
            raise ServerError(
                "the SGLang server is not ready",
                expected=f"an answer within {timeout_s:.0f} s",
                got="none",
                where=f"{server.url}, log {server.log_path}",
                fix=f"Raise ready_timeout_s, or see its last lines:\n{server.last_lines()}",
            )
        if on_progress is not None:
            on_progress(waited_s, server.last_lines(1))
        time.sleep(POLL_S)


def answers(url: str) -> bool:
    """Return whether a server is healthy, after at most `HEALTH_TIMEOUT_S`."""
    # Without a proxy: the server is on this machine.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"{url}/health", timeout=HEALTH_TIMEOUT_S) as response:
            return bool(response.status == 200)
    except (OSError, urllib.error.URLError):
        return False
