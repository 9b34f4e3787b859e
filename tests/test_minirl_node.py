"""recipes.minirl.node: machines of a trainer wait for each other, and say which one is missing."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from recipes.minirl.launch import commands
from recipes.minirl.node import NodeError, main, make_parser, meet
from recipes.minirl.settings.command_line import parse
from recipes.serving.ports import HeldPort

HOST = "127.0.0.1"
LATE_S = 1.0
TIMEOUT_S = 20.0


def outcome(port, node, num_nodes=2, late_s=0.0, timeout_s=TIMEOUT_S):
    """The error of a machine that starts `late_s` late, or None."""
    time.sleep(late_s)
    try:
        meet(HOST, port, node, num_nodes, timeout_s)
    except NodeError as error:
        return str(error)
    return None


def outcomes(*machines):
    """What happens to machines that are started at once; (node, options) each."""
    with HeldPort() as port, ThreadPoolExecutor(len(machines)) as pool:
        waiting = [pool.submit(outcome, port, node, **options) for node, options in machines]
        return [future.result() for future in waiting]


@pytest.mark.parametrize("late", [0, 1])
def test_a_machine_that_starts_late_is_waited_for(late):
    options = [{}, {}]
    options[late] = {"late_s": LATE_S}
    assert outcomes((0, options[0]), (1, options[1])) == [None, None]


def test_a_machine_that_never_starts_is_named_on_all_others():
    short = {"num_nodes": 3, "timeout_s": 2.0}
    for error in outcomes((0, short), (2, short)):
        assert "3 machines within 2 s (--node-timeout-s); got none for --node-rank 1" in error or (
            "node 0 ended while this machine waited" in error
        )


def test_without_node_0_the_others_say_so():
    with HeldPort() as port:
        error = outcome(port, node=1, timeout_s=2.0)
    assert "node 0 did not start; expected 127.0.0.1" in error
    assert "within 2 s (--node-timeout-s)" in error


def test_a_number_that_two_machines_have_is_refused():
    # Node 0 counts both; the second to come is told.
    errors = outcomes(
        (0, {"timeout_s": 3.0, "num_nodes": 3}), (1, {"num_nodes": 3}), (1, {"num_nodes": 3})
    )
    assert any(
        "two machines have the same number; got --node-rank 1 on" in (e or "") for e in errors
    )


def test_a_number_beyond_the_machines_is_refused():
    with HeldPort() as port:
        error = outcome(port, node=2)
    assert "out of range; expected 0..1 (--nnodes 2); got 2" in error


def test_a_machine_without_the_configuration_says_where_it_comes_from(tmp_path, capsys):
    argv = [str(tmp_path), "--node-rank", "1", "--master-addr", HOST, "--rollout-url", "http://x"]
    assert main(argv) == 1
    error = capsys.readouterr().err
    assert "the configuration of the run cannot be read" in error and "--prepare-only" in error


def test_the_printed_command_of_a_machine_is_understood(tmp_path):
    config = parse(["--nnodes", "2", "--nproc", "4"])
    command = commands.node_command(config, tmp_path, ["http://a", "http://b"], 1, "10.0.0.1")
    assert command[:3] == ["python", "-m", "recipes.minirl.node"]
    arguments = make_parser().parse_args(command[3:])
    assert (arguments.node_rank, arguments.master_addr) == (1, "10.0.0.1")
    assert arguments.rollout_url == ["http://a", "http://b"]
