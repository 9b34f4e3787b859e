"""The two forms of the recipe's exchange: rank 0 samples, or actors beside the servers on Ray.

The servers are stand-ins. tests/test_recipe_ray_run.py has real ones.
"""

import contextlib
import itertools
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import numpy as np
import pytest
import torch.distributed as dist
from ray_clusters import LocalCluster
from rollout_servers import MODEL, FakeServer
from sglang_servers import write_checkpoint
from sglang_stand_in import unless_broken, write_stand_in
from test_payload import random_ids

from recipes.minirl.data.prompts import Prompt
from recipes.minirl.job.first_rank import FirstRank
from recipes.minirl.ray.cluster import ray_cluster
from recipes.minirl.ray.exchange import RayExchange
from recipes.minirl.rollout.answers import StepAnswers
from recipes.minirl.rollout.exchange import LocalExchange
from recipes.minirl.rollout.groups import INDEX_FILE, GroupWriter, StepFiles
from recipes.minirl.rollout.sampling import Rollout, mean_reward
from recipes.minirl.settings.command_line import parse
from routing_replay.errors import DataError, ServerError, TableError
from routing_replay.rollout.servers import LostWeightsError, Weights
from routing_replay.routes.part_index import PartIndex
from routing_replay.routes.parts import PartedTable
from routing_replay.routes.routes import Routes
from routing_replay.routes.table import RouteTable

pytestmark = pytest.mark.timeout(600)
GROUP = 2
PROMPTS = [Prompt(prompt=f"t{n} t5" + " t6" * (n % 3), answer="t7 t8 t9") for n in range(6)]
STAGES = ((1, 2), (5,))
STEPS = itertools.count(1)
FLAGS = ["--routing-replay-capture", "ids", "--routing-replay-mode", "R3"]
FLAGS += ["--prompts-per-step", "6", "--samples-per-prompt", str(GROUP), "--minibatch-size", "12"]
FLAGS += ["--health-every-s", "0.3", "--server-recovery-s", "5", "--node-timeout-s", "240"]
# They are not started again: what a broken one does is the matter here.
FLAGS += ["--num-servers", "2", "--server-restarts", "0"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint, for its tokenizer, the servers' stand-in, and the folder of the run."""
    folder = write_checkpoint(tmp_path_factory.mktemp("exchange"), 0)
    (folder / "prompts.jsonl").write_text('{"prompt": "t1", "answer": "t2"}\n')
    write_stand_in(folder)
    (folder / "run").mkdir()
    (folder / "run" / "config.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def first_rank(tmp_path_factory):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield FirstRank(tmp_path_factory.mktemp("scratch"))
    dist.destroy_process_group()


class Form:
    """An exchange with two servers, and what a job has beside it.

    Args:
        folder: As of the fixture.
        config: The run's.
        urls: The servers.
        rollout: Rank 0's.
        exchange: The form.
        first_rank: This process.
    """

    def __init__(self, folder, config, urls, rollout, exchange, first_rank):
        self.folder, self.config, self.urls = folder, config, urls
        self.rollout, self.exchange, self.first_rank = rollout, exchange, first_rank

    def files(self):
        """Of a new step."""
        number = next(STEPS)
        step = self.first_rank.new_folder(f"step_{number:06d}")
        writer = GroupWriter.of(self.config, number, step, MODEL, STAGES)
        answers = StepAnswers.of(step / "shared", number, self.config, MODEL)
        return StepFiles(answers=answers, writer=writer)

    @contextlib.contextmanager
    def broken(self, *numbers):
        """Some servers answer nothing but 503 meanwhile."""
        paths = [self.folder / f"broken_{urlsplit(self.urls[n]).port}" for n in numbers]
        for path in paths:
            path.touch()
        yield
        for path in paths:
            path.unlink()


@contextlib.contextmanager
def local(folder, first_rank):
    with contextlib.ExitStack() as stack:
        servers = []
        for number in range(2):
            misbehave = unless_broken(folder, lambda n=number: servers[n].http.server_address[1])
            servers.append(stack.enter_context(FakeServer(misbehave)))
        urls = [server.url for server in servers]
        config = parse([*FLAGS, "--ray", "auto", "--model", str(folder), *prompts_of(folder)])
        rollout = Rollout(config, urls, folder, MODEL)
        yield Form(folder, config, urls, rollout, LocalExchange(rollout, first_rank), first_rank)


@contextlib.contextmanager
def on_ray(folder, first_rank):
    with LocalCluster([2, 1]) as cluster:
        servers = ["--rollout-python", str(folder / "stand_in"), "--model", str(folder)]
        config = parse([*FLAGS, "--ray", cluster.address, *servers, *prompts_of(folder)])
        with ray_cluster(config) as machines:
            urls = [server.url for server in machines.start_servers(config, folder / "run")]
            rollout = Rollout(config, urls, folder, MODEL)
            scratch = first_rank.folder.parent
            exchange = RayExchange(machines._servers, urls, scratch, rollout, first_rank)
            yield Form(folder, config, urls, rollout, exchange, first_rank)


def prompts_of(folder):
    path = str(folder / "prompts.jsonl")
    return ["--prompts", path, "--heldout-prompts", path]


@pytest.fixture(scope="module", params=[local, on_ray])
def form(request, folder, first_rank):
    with request.param(folder, first_rank) as form:
        yield form


def sampled(form, files):
    """The groups of a step, and the index of their parts."""
    groups = form.exchange.sample(PROMPTS, GROUP, files)
    files.writer.save_index(files.writer.folder, groups, 0.0)
    return groups, PartIndex.open(files.writer.folder / INDEX_FILE)


def tokens_of(group):
    return [
        (s.prompt_ids.tolist(), s.response_ids.tolist(), s.logp_mu.tolist(), s.reward)
        for s in group.samples
    ]


def test_groups_come_in_the_order_of_their_prompts_and_their_parts_where_they_are_asked_for(form):
    files = form.files()
    groups, index = sampled(form, files)
    for prompt, group in zip(PROMPTS, groups, strict=True):
        for sample in group.samples:
            assert list(sample.prompt_ids) == form.rollout.encode(prompt)
            assert (sample.response_ids.tolist(), sample.reward) == ([7, 8, 9], 1.0)
            assert sample.routes is None
    # A rank of the second data-parallel half and the last stage.
    names = index.files(range(6, 12), (5,))
    form.exchange.fetch(files.writer.folder, names)
    assert {name for name in index.files() if (files.writer.folder / name).exists()} >= set(names)
    table = PartedTable.open(files.writer.folder / INDEX_FILE, range(6, 12), (5,))
    lengths = [len(sample.prompt_ids) + 2 for group in groups for sample in group.samples]
    whole = RouteTable.from_routes(
        [
            Routes(expert_ids_TLK=random_ids(num_rows), layers=MODEL.layers, num_experts=16)
            for num_rows in lengths
        ]
    )
    rows_T = np.arange(sum(lengths[:6]), sum(lengths))
    np.testing.assert_array_equal(table.gather((5,), rows_T), whole.gather((5,), rows_T))


def test_an_evaluation_has_no_routes_and_writes_nothing(form):
    groups = form.exchange.sample(PROMPTS, 1)
    assert [len(group.samples) for group in groups] == [1] * len(PROMPTS)
    assert all(not group.parts and group.samples[0].routes is None for group in groups)
    assert mean_reward([sample for group in groups for sample in group.samples]) == 1.0


def test_what_was_stored_is_not_sampled_again(form):
    files = form.files()
    first, _ = sampled(form, files)
    assert sum(group.num_stored for group in first) == 0
    (files.answers.folder / "group_000004.jsonl").unlink()
    again, _ = sampled(form, files)
    assert [group.num_stored for group in again] == [GROUP] * 4 + [0] + [GROUP] * (len(again) - 5)
    assert [tokens_of(group) for group in first] == [tokens_of(group) for group in again]


def test_a_later_round_of_a_step_adds_to_its_parts(form):
    files = form.files()
    groups = form.exchange.sample(PROMPTS[:4], GROUP, files)
    groups += form.exchange.sample(PROMPTS[4:], GROUP, files, first=4)
    files.writer.save_index(files.writer.folder, groups, 0.0)
    index = PartIndex.open(files.writer.folder / INDEX_FILE)
    form.exchange.fetch(files.writer.folder, index.files())
    assert PartedTable.open(files.writer.folder / INDEX_FILE).covered_T.all()


def test_groups_of_a_server_that_fails_go_elsewhere_and_it_comes_back(form):
    form.exchange.state()
    with form.broken(0):
        groups, _ = sampled(form, form.files())
        assert len(groups) == len(PROMPTS)
        metrics = form.exchange.state()
        assert metrics["rollout/server_faults"] > 0 and metrics["rollout/servers"] == 1
    deadline = time.monotonic() + 60
    while form.exchange.state()["rollout/servers"] < 2:
        assert time.monotonic() < deadline
        sampled(form, form.files())


def test_weights_that_servers_lost_and_no_disk_has_must_be_published_again(form):
    client = form.rollout.client
    client.servers.expect(Weights(path=None, version=3))
    with pytest.raises(LostWeightsError, match="too few servers are left"):
        form.exchange.sample(PROMPTS, GROUP, form.files())
    client.update_weights("weights/4", 4)
    groups, _ = sampled(form, form.files())
    assert {sample.weight_version for group in groups for sample in group.samples} == {4}
    while form.exchange.state()["rollout/servers"] < 2:
        sampled(form, form.files())
    form.exchange.state()


def test_weights_change_between_groups_of_one_call(form):
    client = form.rollout.client
    client.update_weights("weights/5", 5)
    with ThreadPoolExecutor(1) as pool, form.exchange.paused("retract"):
        # The stand-ins answer while they are paused: as if the update came a moment later.
        running = pool.submit(sampled, form, form.files())
        client.update_weights("weights/6", 6)
        groups, _ = running.result()
    versions = {sample.weight_version for group in groups for sample in group.samples}
    assert versions <= {5, 6}
    groups, _ = sampled(form, form.files())
    assert {sample.weight_version for group in groups for sample in group.samples} == {6}
    metrics = form.exchange.state()
    assert (metrics["rollout/servers"], metrics["rollout/servers_left_out"]) == (2, 0)


def test_a_group_that_no_disk_takes_is_an_error_and_the_next_call_works(form):
    files = form.files()
    (files.answers.folder / "group_000002.jsonl").symlink_to("/dev/full")
    with pytest.raises(DataError, match="responses of a step cannot be"):
        form.exchange.sample(PROMPTS, GROUP, files)
    sampled(form, form.files())


def test_a_part_that_is_gone_is_an_error_that_names_it(form):
    files = form.files()
    _, index = sampled(form, files)
    (part,) = form.first_rank.folder.parent.rglob(f"*/{files.writer.folder.name}/*3_000_stage_1.*")
    part.unlink()
    with pytest.raises(TableError, match=part.name):
        form.exchange.fetch(files.writer.folder, index.files())
        PartedTable.open(files.writer.folder / INDEX_FILE)


def test_too_few_servers_are_an_error_with_what_happened(form):
    with form.broken(0, 1), pytest.raises(ServerError, match="too few servers are left"):
        form.exchange.sample(PROMPTS, GROUP, form.files())
