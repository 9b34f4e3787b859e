"""Server processes begin and end as promised; the commands here are not SGLang."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from types import SimpleNamespace

import psutil
import pytest

from recipes.serving import cpu, server
from recipes.serving.kept import KeptServer, read_absences, write_states
from recipes.serving.server import ServerOptions, launch
from routing_replay.capture import CaptureSettings
from routing_replay.errors import ConfigError, ServerError
from routing_replay.rollout.servers import ServerState
from routing_replay.sglang import versions
from routing_replay.sglang.cpu import enable_cpu
from routing_replay.sglang.refusals import refuse_unsupported

# What matters of a server's arguments, as SGLang sets them.
DEFAULTS = {"disaggregation_mode": "null", "chunked_prefill_size": 8192, "pp_size": 1}
TORCH_COMPILE, BREAKABLE = (
    SimpleNamespace(prefill=SimpleNamespace(backend=backend))
    for backend in ("tc_piecewise", "breakable")
)
# Serves /health with a grandchild beside it, as SGLang does with its scheduler.
SERVING = """
    import http.server, subprocess, sys
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    print("grandchild", child.pid, flush=True)
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200); self.end_headers()
    http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


@pytest.fixture
def command(monkeypatch):
    """Makes `launch` run this Python text instead of SGLang; its argument is the port."""

    def use(text):
        def command_line(model_path, options, port):
            return [sys.executable, "-c", textwrap.dedent(text), str(port)]

        monkeypatch.setattr(server, "command_line", command_line)

    return use


def is_running(pid):
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().split()[2] != "Z"
    except FileNotFoundError:
        return False


def assert_ends(pid, within_s=15):
    deadline = time.monotonic() + within_s
    while is_running(pid):
        assert time.monotonic() < deadline, f"process {pid} outlived its owner"
        time.sleep(0.05)


def grandchild_of(log_path):
    return int(log_path.read_text().split("grandchild ")[1].split()[0])


def test_a_server_and_all_it_started_end_with_its_handle(command, tmp_path):
    command(SERVING)
    seen = []
    options = ServerOptions(log_path=tmp_path / "log")
    with launch("model", options, lambda *progress: seen.append(progress)) as running:
        running.check()
        grandchild = grandchild_of(running.log_path)
        assert is_running(grandchild)
    assert not running.is_alive
    assert_ends(grandchild)
    running.stop()  # idempotent
    assert all(seconds >= 0 for seconds, _ in seen)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_server_ends_when_its_owner_is_killed(tmp_path, number):
    owner = textwrap.dedent(f"""
        import sys, time
        from recipes.serving import server
        server.command_line = lambda model_path, options, port: [
            sys.executable, "-c", {textwrap.dedent(SERVING)!r}, str(port)]
        options = server.ServerOptions(log_path={str(tmp_path / "log")!r})
        server.launch("model", options)
        print("ready", flush=True)
        time.sleep(600)
    """)
    process = subprocess.Popen([sys.executable, "-c", owner], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    grandchild = grandchild_of(tmp_path / "log")
    process.send_signal(number)
    process.wait()
    assert_ends(grandchild)


def test_a_dead_server_shows_its_last_lines_and_the_place_of_its_log(command, tmp_path):
    command("print('loading'); raise SystemExit('no such checkpoint')")
    options = ServerOptions(log_path=tmp_path / "log")
    with pytest.raises(ServerError, match="died with status 1") as caught:
        launch("model", options)
    assert str(tmp_path / "log") in str(caught.value)
    assert "loading\nno such checkpoint" in str(caught.value)


def kept(tmp_path, num_restarts, restart_after_s=0.2):
    options = ServerOptions(log_path=tmp_path / "log")
    return KeptServer("model", options, num_restarts=num_restarts, restart_after_s=restart_after_s)


def kill(keeper):
    """Kill what the guard started, as the kernel does without memory."""
    (child,) = psutil.Process(keeper.server.process.pid).children()
    child.kill()
    keeper.server.process.wait()


def wait_for_answer(url, timeout_s=15):
    deadline = time.monotonic() + timeout_s
    while not server.answers(url):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_killed_server_is_started_again_at_its_port_until_it_was_started_too_often(
    command, tmp_path
):
    command(SERVING)
    with kept(tmp_path, num_restarts=1) as keeper:
        url, first = keeper.url, grandchild_of(tmp_path / "log")
        assert not keeper.keep(None)
        kill(keeper)
        assert keeper.keep(None)
        wait_for_answer(url)
        assert (keeper.url, keeper.num_started) == (url, 2)
        assert_ends(first)
        kill(keeper)
        with pytest.raises(ServerError, match="died with status 137.*log"):
            keeper.keep(None)
    assert (tmp_path / "log").read_text().count("grandchild") == 2


def test_a_server_that_its_client_has_left_out_for_long_is_started_again_once(command, tmp_path):
    command(SERVING)
    with kept(tmp_path, num_restarts=2) as keeper:
        path = tmp_path / "servers.json"
        state = ServerState(url=keeper.url)
        write_states(path, [state])
        assert read_absences(path) == {}
        state.out_since = time.time()
        for waits in ("is_loading", "is_stale"):  # for weights: another start would not help
            setattr(state, waits, True)
            write_states(path, [state])
            assert read_absences(path) == {}
            setattr(state, waits, False)
        write_states(path, [state])
        absence = read_absences(path)[keeper.url]
        assert not keeper.keep(absence)
        time.sleep(0.3)
        assert keeper.keep(absence)
        # What the file says is older than the new process.
        time.sleep(0.3)
        assert not keeper.keep(absence)
    assert read_absences(tmp_path / "none.json") == {}


def test_a_server_that_loads_longer_than_it_may_be_left_out_is_not_started_a_third_time(
    command, tmp_path
):
    loading = f"""
        import pathlib, time
        marker = pathlib.Path({str(tmp_path / "started once")!r})
        time.sleep(1.5 if marker.exists() else 0)
        marker.touch()
    """
    command(textwrap.dedent(loading) + textwrap.dedent(SERVING))
    with kept(tmp_path, num_restarts=2) as keeper:
        kill(keeper)
        assert keeper.keep(None)
        left_out = time.time()  # by a client that has met nobody at the port
        time.sleep(0.5)
        assert not keeper.keep(left_out)
        wait_for_answer(keeper.url)
        assert not keeper.keep(left_out)
        # It answers, and is of no use to its client all the same.
        time.sleep(0.3)
        assert keeper.keep(left_out)


def test_a_server_that_never_answers_is_given_up_and_ended(command, tmp_path):
    command("import os, time; print('grandchild', os.getpid(), flush=True); time.sleep(600)")
    options = ServerOptions(log_path=tmp_path / "log", ready_timeout_s=1.0)
    with pytest.raises(ServerError, match="not ready; expected an answer within 1 s"):
        launch("model", options)
    assert_ends(grandchild_of(tmp_path / "log"))


def test_a_server_runs_in_the_environment_of_its_own_interpreter(tmp_path):
    python = tmp_path / "python"  # says by which name it was started
    python.write_text(f'#!/bin/sh\necho started as "$0"; exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    options = ServerOptions(log_path=tmp_path / "log", python=python)
    with pytest.raises(ServerError, match="died") as caught:
        launch(tmp_path / "no checkpoint", options)
    assert f"started as {python}" in options.log_path.read_text()
    assert "no checkpoint" in str(caught.value)
    with pytest.raises(ServerError, match="interpreter does not exist; got nowhere"):
        launch("model", ServerOptions(python="nowhere"))


def test_a_taken_port_is_an_error_of_its_own():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ServerError, match=f"port {port} is taken.*Choose another port"):
            launch("model", ServerOptions(port=port))


def test_nobody_can_take_the_port_while_the_server_starts(command):
    loading = "import sys, time\nprint(sys.argv[1], flush=True)\ntime.sleep(1)\n"
    command(loading + textwrap.dedent(SERVING))
    refused = []

    def take_it(_, last_line):
        if last_line.isdigit():
            with socket.socket() as other, pytest.raises(OSError, match="in use"):
                other.bind(("127.0.0.1", int(last_line)))
            refused.append(last_line)

    with launch("model", on_progress=take_it) as running:
        assert set(refused) == {str(running.port)}


def test_a_server_does_not_take_itself_for_a_rank(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("MASTER_ADDR", "elsewhere")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "7")
    environment = server.environment_of(ServerOptions(capture="gates", environment={"A": "b"}))
    assert not {"RANK", "MASTER_ADDR", "TORCHELASTIC_RUN_ID"} & environment.keys()
    assert environment["A"] == "b"
    assert CaptureSettings.from_environment(environment).level == "gates"


def test_without_cuda_the_stub_stands_before_the_real_kernels(monkeypatch):
    monkeypatch.setattr(cpu.torch.cuda, "is_available", lambda: False)
    environment = cpu.server_environment({"PYTHONPATH": "/mine"})
    assert environment["PYTHONPATH"] == f"{cpu.STUBS}{os.pathsep}/mine"
    code = "import sgl_kernel; sgl_kernel.topk_softmax(1)"
    run = [sys.executable, "-c", code]
    result = subprocess.run(run, env=os.environ | environment, capture_output=True, text=True)
    assert "sgl_kernel.topk_softmax needs a CUDA device" in result.stderr


def test_with_cuda_a_server_starts_as_stock(monkeypatch):
    monkeypatch.setattr(cpu.torch.cuda, "is_available", lambda: True)
    assert cpu.server_environment({}) == {}
    assert cpu.server_arguments() == []
    assert not enable_cpu()


def test_capture_settings_are_checked():
    with pytest.raises(ConfigError, match="unknown capture level; expected one of off, stock"):
        server.environment_of(ServerOptions(capture="all"))
    with pytest.raises(ConfigError, match="out of range; expected above 0"):
        CaptureSettings(logit_fraction=0)
    with pytest.raises(ConfigError, match="LOGIT_FRACTION is not a number"):
        CaptureSettings.from_environment({"ROUTING_REPLAY_LOGIT_FRACTION": "some"})
    with pytest.raises(ConfigError, match="CAPTURE_KERNEL is no switch; expected 0 or 1"):
        CaptureSettings.from_environment({"ROUTING_REPLAY_CAPTURE_KERNEL": "yes"})
    settings = CaptureSettings(level="gates", logit_fraction=0.5, has_kernel=True)
    assert CaptureSettings.from_environment(settings.to_environment()) == settings


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pp_size": 2}, "pp_size=2 and the capture level logits"),
        ({"enable_hisparse": True}, "enable_hisparse=True"),
        ({"enable_two_batch_overlap": True}, "enable_two_batch_overlap=True"),
        ({"dllm_algorithm": "LowConfidence"}, "dllm_algorithm=LowConfidence"),
        ({"attn_cp_size": 2}, "attn_cp_size=2"),
        ({"enable_pdmux": True}, "enable_pdmux=True"),
        ({"enable_dp_attention": True}, "enable_dp_attention=True"),
        ({"moe_a2a_backend": "mooncake"}, "moe_a2a_backend=mooncake"),
        ({"moe_a2a_backend": "deepep"}, "moe_a2a_backend=deepep and the capture level logits"),
        ({"backend": "triton_kernel"}, "moe_runner_backend=triton_kernel"),
        # Prefill graphs of SGLang 0.5.12, and of some versions since 0.5.14.
        ({"disable_piecewise_cuda_graph": False}, "prefill graphs of torch.compile and"),
        ({"cuda_graph_config": TORCH_COMPILE}, "prefill graphs of torch.compile and"),
    ],
)
def test_features_under_which_rows_would_be_wrong_are_refused(arguments, message):
    settings = CaptureSettings(level="logits")
    refuse_unsupported(SimpleNamespace(**DEFAULTS), "triton", settings)
    backend = arguments.get("backend", "triton")
    with pytest.raises(ServerError, match=f"no true routes with {message}.*Reason: "):
        refuse_unsupported(SimpleNamespace(**DEFAULTS | arguments), backend, settings)


@pytest.mark.parametrize(
    "arguments",
    [
        {"enable_hierarchical_cache": True},
        {"speculative_algorithm": "EAGLE"},
        {"disaggregation_mode": "decode"},
        {"pp_size": 2},
    ],
)
def test_features_that_were_read_in_a_later_sglang_are_refused_in_older_ones(
    monkeypatch, arguments
):
    server_args, settings = SimpleNamespace(**DEFAULTS | arguments), CaptureSettings()
    monkeypatch.setattr(versions, "installed", lambda: (0, 5, 23))
    refuse_unsupported(server_args, "triton", settings)
    monkeypatch.setattr(versions, "installed", lambda: (0, 5, 22))
    with pytest.raises(ServerError, match="take SGLang 0.5.23"):
        refuse_unsupported(server_args, "triton", settings)


@pytest.mark.parametrize(
    ("level", "arguments", "is_refused"),
    [
        ("ids", {"enable_dp_attention": True}, True),
        ("ids", {"moe_a2a_backend": "flashinfer"}, True),
        ("ids", {"moe_a2a_backend": "deepep"}, False),
        ("gates", {"moe_a2a_backend": "deepep_v2"}, False),
        ("weights", {"moe_a2a_backend": "deepep"}, True),
        ("weights", {"cuda_graph_config": TORCH_COMPILE}, True),
        ("ids", {"cuda_graph_config": TORCH_COMPILE}, False),
        ("gates", {"cuda_graph_config": TORCH_COMPILE}, True),
        ("gates", {"cuda_graph_config": BREAKABLE}, False),
        ("gates", {"disable_piecewise_cuda_graph": True}, False),
    ],
)
def test_what_is_refused_depends_on_the_level(level, arguments, is_refused):
    server_args, settings = SimpleNamespace(**DEFAULTS | arguments), CaptureSettings(level=level)
    with pytest.raises(ServerError) if is_refused else contextlib.nullcontext():
        refuse_unsupported(server_args, "triton", settings)
