"""The recipe's driver on Ray: placement, its actors, and what goes wrong, on real raylets.

tests/test_recipe_ray_run.py trains there.
"""

import contextlib
import json
import pickle
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest
from ray_clusters import LocalCluster

from recipes.minirl.ray.actors import Place, RankActor, ServerActor
from recipes.minirl.ray.cluster import check_version, connected, ray_cluster
from recipes.minirl.ray.placed import LostActorError, make
from recipes.minirl.ray.placement import place, rank_bundles, rank_environments
from recipes.minirl.settings.command_line import parse
from recipes.serving.server import answers
from routing_replay.errors import ConfigError

ROOT = Path(__file__).parent.parent
WAIT_S = 240.0
# In place of the interpreter of the servers: it tells versions, or is healthy on the port in argv.
STAND_IN = """\
#!{python}
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
if sys.argv[1] == "-c":
    print("0.5.23 0.1")
else:
    host, port = (sys.argv[sys.argv.index(flag) + 1] for flag in ("--host", "--port"))
    HTTPServer((host, int(port)), Handler).serve_forever()
"""
# A driver that starts servers and goes on.
DRIVER = """\
import pickle, sys, time
from pathlib import Path
from recipes.minirl.ray.cluster import ray_cluster
folder = Path(sys.argv[1])
config = pickle.loads((folder / "config.pickle").read_bytes())
with ray_cluster(config) as machines:
    machines.start_servers(config, folder)
    time.sleep(600)
"""
# 60 sequences per update, divided among up to 6 ranks.
ANY_RANKS = [
    *("--prompts-per-step", "15", "--samples-per-prompt", "4"),
    *("--minibatch-size", "60", "--microbatch-tokens", "64"),
]
pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def cluster():
    with LocalCluster([2, 1]) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """What a server's actor looks at before it starts one."""
    folder = tmp_path_factory.mktemp("checkpoint")
    (folder / "config.json").write_text('{"model_type": "qwen3_moe"}')
    (folder / "prompts.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n')
    return folder


def configuration(cluster, checkpoint, *flags):
    prompts = str(checkpoint / "prompts.jsonl")
    files = ["--model", str(checkpoint), "--prompts", prompts, "--heldout-prompts", prompts]
    limits = ["--ray", cluster.address, "--node-timeout-s", "240", "--routing-replay-mode", "R3"]
    return parse([*files, *limits, *ANY_RANKS, *flags])


def run_folder(folder):
    (folder / "config.json").write_text("{}")
    return folder


def ended(trainer):
    """The trainer's error once a rank has failed."""
    deadline = time.monotonic() + WAIT_S
    while trainer.status is None and time.monotonic() < deadline:
        time.sleep(0.1)
    assert trainer.status == 1
    return str(trainer.error())


def test_without_ray_installed_the_flag_says_what_to_install():
    code = """import sys; sys.modules["ray"] = None
from recipes.minirl.__main__ import main
sys.exit(main(["--ray", "auto"]))"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "error: Ray is not installed" in done.stderr and "[ray]'" in done.stderr


def test_the_launcher_without_the_flag_does_not_load_ray():
    code = """import sys
from recipes.minirl.launch.processes import machines_of
from recipes.minirl.settings.command_line import parse
machines_of(parse([])); print("ray" in sys.modules)"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr


def test_an_untested_version_is_named_once(capsys):
    check_version("2.60.3")
    assert capsys.readouterr().out == ""
    check_version("2.61.0")
    assert "warning: Ray 2.61.0 is not tested; 2.60 is" in capsys.readouterr().out


@pytest.mark.parametrize("address", ["127.0.0.1:9", "ray://127.0.0.1:10001"])
def test_an_address_without_a_cluster_is_refused_at_once(address):
    start = time.monotonic()
    message = r"the Ray cluster cannot be reached; expected auto.*\[" + address
    with pytest.raises(ConfigError, match=message), connected(address):
        pass
    assert time.monotonic() - start < 10


def test_a_cluster_that_is_too_small_is_told_what_is_there_and_what_is_needed(cluster, checkpoint):
    config = configuration(cluster, checkpoint, "--nproc", "4", "--num-servers", "2")
    config = replace(config, run=replace(config.run, node_timeout_s=1.0))
    with pytest.raises(ConfigError) as caught, ray_cluster(config):
        pass
    message = str(caught.value)
    assert "no room for the run; expected 6 x (1 CPU, 0 GPU)" in message
    assert "got 127.0.0.2 (2 CPU, 0 GPU), 127.0.0.3 (1 CPU, 0 GPU)" in message
    assert "--num-servers" in message


def test_gpus_and_tensor_parallel_groups_are_bundles():
    config = parse(["--nproc", "4", "--tensor-parallel", "2", "--num-servers", "2", "--ray", "a"])
    assert rank_bundles(config, has_gpus=True) == [{"CPU": 2, "GPU": 2}] * 2
    assert rank_bundles(config, has_gpus=False) == [{"CPU": 2}] * 2


def test_ranks_are_numbered_node_by_node_and_see_the_gpus_of_their_node():
    config = parse([])
    places = [
        Place(node=node, address=node, gpus=(gpu,), num_cores=8)
        for node, gpu in (("a", "3"), ("b", "0"), ("a", "1"))
    ]
    ranks = rank_environments(config, places)
    assert [number for number, _ in ranks] == [0, 2, 1]
    seen = [(e["RANK"], e["GROUP_RANK"], e["LOCAL_RANK"], e["LOCAL_WORLD_SIZE"]) for _, e in ranks]
    assert seen == [("0", "0", "0", "2"), ("1", "0", "1", "2"), ("2", "1", "0", "1")]
    assert [e["CUDA_VISIBLE_DEVICES"] for _, e in ranks] == ["3,1", "3,1", "0"]
    assert {e["MASTER_ADDR"] for _, e in ranks} == {"a"}
    assert {e["WORLD_SIZE"] for _, e in ranks} == {"3"}


def test_ranks_get_the_gpus_that_ray_gave_them(checkpoint):
    with LocalCluster([2], num_gpus=2) as cluster:
        config = configuration(cluster, checkpoint, "--nproc", "2")
        with connected(cluster.address):
            group = place(rank_bundles(config, has_gpus=True), WAIT_S)
            ranks = make(group, RankActor, range(2), 1, WAIT_S)
            environments = rank_environments(config, [one.place for one in ranks])
    gpus = [environment["CUDA_VISIBLE_DEVICES"].split(",") for _, environment in environments]
    assert gpus[0] == gpus[1] and sorted(gpus[0]) == ["0", "1"]


def test_a_second_job_in_the_same_folder_is_refused(cluster, checkpoint, tmp_path):
    flags = ["--run-dir", str(tmp_path), "--rollout-url", "http://127.0.0.1:9"]
    config = configuration(cluster, checkpoint, *flags)
    (tmp_path / "config.json").write_text(json.dumps(config.to_mapping()))
    with ray_cluster(config):
        command = [sys.executable, "-m", "recipes.minirl", "--run-dir", str(tmp_path), "--resume"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "error: another job on the cluster trains in this folder" in done.stderr
    assert str(tmp_path) in done.stderr


def test_servers_of_different_versions_are_refused_before_one_starts(cluster, checkpoint, tmp_path):
    # Each time it is asked it has another SGLang, as another node's environment might.
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\nmkdir {tmp_path}/asked && echo 0.5.23 1 || echo 0.5.22 1\n")
    python.chmod(0o755)
    flags = ["--num-servers", "2", "--rollout-python", str(python)]
    config = configuration(cluster, checkpoint, *flags, "--run-dir", str(tmp_path / "run"))
    with ray_cluster(config) as machines:
        message = r"two servers would differ in SGLang; expected 0\.5\.2[23], as on node"
        run_dir = tmp_path / "run"
        run_dir.mkdir()
        with pytest.raises(ConfigError, match=message):
            machines.start_servers(config, run_folder(run_dir))
    assert not (run_dir / "logs").exists()


def test_an_interpreter_that_a_node_lacks_is_named(cluster, checkpoint):
    config = configuration(cluster, checkpoint, "--rollout-python", "/no/python")
    with connected(cluster.address):
        (actor,) = make(place(rank_bundles(config, False), 1), ServerActor, [0], 0, WAIT_S)
        with pytest.raises(ConfigError, match=r"no SGLang with our plugin; .*\[/no/python, node"):
            actor.call("identity", config)


def stand_in(folder, num_servers=1):
    """Flags of servers without SGLang."""
    path = folder / "stand_in"
    path.write_text(STAND_IN.format(python=sys.executable))
    path.chmod(0o755)
    return ["--num-servers", str(num_servers), "--rollout-python", str(path)]


def servers_of(folder):
    """Processes of the stand-ins, by their port."""
    found = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            line = process.cmdline()
            if line[1:2] == [str(folder / "stand_in")] and "--port" in line:
                found[int(line[line.index("--port") + 1])] = process
    return found


def wait_until(is_time):
    deadline = time.monotonic() + WAIT_S
    while not is_time():
        assert time.monotonic() < deadline, "it was never time"
        time.sleep(0.05)


def test_each_actor_keeps_its_server_running_on_its_node_until_the_run_ends(
    cluster, checkpoint, tmp_path
):
    config = configuration(cluster, checkpoint, *stand_in(tmp_path, num_servers=2))
    with ray_cluster(config) as machines:
        first, second = machines.start_servers(config, run_folder(tmp_path))
        assert first.keep(None) is second.keep(None) is False
        processes = servers_of(tmp_path)
        processes[urlsplit(second.url).port].kill()
        wait_until(lambda: second.keep(None))
        assert first.keep(None) is False
        wait_until(lambda: answers(second.url))
        assert len(servers_of(tmp_path)) == 2
    assert servers_of(tmp_path) == {}


def test_a_server_ends_with_its_killed_actor(cluster, checkpoint, tmp_path):
    config = configuration(cluster, checkpoint, *stand_in(tmp_path))
    with ray_cluster(config) as machines:
        (server,) = machines.start_servers(config, run_folder(tmp_path))
        cluster.actors("ServerActor")[0].kill()
        wait_until(lambda: not servers_of(tmp_path))
        with pytest.raises(LostActorError, match=r"server \d died.*node 127\.0\.0\."):
            server.keep(None)


def test_a_server_ends_with_an_actor_that_ends_in_order(cluster, checkpoint, tmp_path):
    """As with `ray stop`: Ray then kills the children of an actor, but not theirs."""
    config = configuration(cluster, checkpoint, *stand_in(tmp_path))
    with ray_cluster(config) as machines:
        machines.start_servers(config, run_folder(tmp_path))
        assert servers_of(tmp_path)
        machines._servers[0].actor.__ray_terminate__.remote()
        wait_until(lambda: not servers_of(tmp_path))


def test_a_server_ends_with_its_killed_driver(cluster, checkpoint, tmp_path):
    config = configuration(cluster, checkpoint, *stand_in(tmp_path))
    run_folder(tmp_path)
    with open(tmp_path / "config.pickle", "wb") as file:
        pickle.dump(config, file)
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, str(tmp_path)], cwd=ROOT)
    try:
        wait_until(lambda: servers_of(tmp_path) or driver.poll() is not None)
        assert driver.poll() is None
    finally:
        driver.kill()
    wait_until(lambda: not servers_of(tmp_path))


def test_a_folder_that_a_node_sees_otherwise_is_refused(cluster, checkpoint, tmp_path):
    config = configuration(cluster, checkpoint)
    with connected(cluster.address):
        (actor,) = make(place(rank_bundles(config, False), 1), RankActor, [0], 0, WAIT_S)
        with pytest.raises(ConfigError, match="configuration of the run cannot be read.*--run-dir"):
            actor.call("require_shared", tmp_path, "of the driver")
        with pytest.raises(ConfigError, match="another configuration in the folder of the run"):
            actor.call("require_shared", run_folder(tmp_path), "of the driver")


@pytest.mark.slow
def test_a_node_that_is_lost_before_the_start_is_named(cluster, checkpoint):
    address = cluster.add(2)
    config = configuration(cluster, checkpoint, "--nproc", "5")
    with connected(cluster.address):
        group = place(rank_bundles(config, has_gpus=False), WAIT_S)
        cluster.lose(address)
        with pytest.raises(LostActorError, match=f"a node was lost before.*{address}"):
            make(group, RankActor, range(5), 0, WAIT_S)


def trainer_error(cluster, checkpoint, run_dir, num_ranks, break_it):
    """Start a trainer whose servers are no matter; break something; what the driver then says."""
    url = "http://127.0.0.1:9"
    flags = ["--nproc", str(num_ranks), "--rollout-url", url]
    config = configuration(cluster, checkpoint, *flags)
    with ray_cluster(config) as machines:
        trainer = machines.start_trainer(config, run_folder(run_dir), [url])
        break_it()
        return ended(trainer)


def test_a_dead_rank_ends_the_trainer_by_name(cluster, checkpoint, tmp_path):
    def kill():
        cluster.actors("RankActor")[0].kill()

    message = trainer_error(cluster, checkpoint, tmp_path, 2, kill)
    assert re.match(r"rank [01] died with its actor; got .*node 127\.0\.0\.[23]", message)


@pytest.mark.slow
def test_a_lost_node_ends_the_trainer_by_the_name_of_its_rank(cluster, checkpoint, tmp_path):
    address = cluster.add(1)
    message = trainer_error(cluster, checkpoint, tmp_path, 4, lambda: cluster.lose(address))
    assert re.match(rf"rank \d died with its actor; got .*node {address}", message)
