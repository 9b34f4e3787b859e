"""recipes.minirl.rollout.sampling and its servers: stored responses, servers left out, metrics."""

import json

import pytest
from rollout_servers import MODEL, FakeServer
from sglang_servers import write_checkpoint

from recipes.minirl.data.prompts import Prompt
from recipes.minirl.rollout import sampling
from recipes.minirl.rollout.answers import StepAnswers
from recipes.minirl.rollout.groups import StepFiles
from recipes.minirl.rollout.sampling import Rollout, sample_groups
from recipes.minirl.settings.command_line import parse
from recipes.serving.kept import read_absences
from routing_replay.errors import ConfigError, ServerError

pytest.importorskip("transformers")
PROMPTS = [Prompt(prompt=f"t{n} t5 t6", answer="t7 t8 t9") for n in range(4)]
FLAGS = ["--prompts-per-step", "4", "--samples-per-prompt", "2", "--minibatch-size", "4"]
FLAGS += ["--routing-replay-capture", "ids", "--routing-replay-mode", "R3"]
FLAGS += ["--health-every-s", "0.3", "--server-recovery-s", "5"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("tokenizer"), 0)


def sampled(rollout, folder):
    """A step's groups, as a run samples and stores them."""
    files = StepFiles(answers=StepAnswers.of(folder, 1, rollout.config, MODEL))
    return sample_groups(
        lambda prompts, first: rollout.sample(prompts, 2, files, first),
        lambda offset, count: PROMPTS[offset : offset + count],
        4,
        0,
    )


def stored_in(folder):
    """The stored lines of a step, by the file of their group."""
    paths = sorted((folder / "answers" / "step_000001").iterdir())
    return {path: path.read_text().splitlines(keepends=True) for path in paths}


def generations(server):
    return sum(route == "/generate" for route, _ in server.calls)


def test_a_resumed_step_samples_only_what_was_not_stored(checkpoint, tmp_path):
    config = parse(FLAGS)
    with FakeServer() as server:
        first = sampled(Rollout(config, [server.url], checkpoint, MODEL), tmp_path)
        stored = stored_in(tmp_path)
        assert [len(lines) for lines in stored.values()] == [2] * 4
        # Killed while one was written, before any of the last group ended.
        *_, third, last = stored
        third.write_text(stored[third][0] + stored[third][1][:50])
        last.unlink()
        resumed = Rollout(config, [server.url], checkpoint, MODEL)
        before = generations(server)
        again = sampled(resumed, tmp_path)
        assert generations(server) - before == 3
        assert (first.num_stored, again.num_stored) == (0, 5)
    for lines in stored_in(tmp_path).values():
        assert sorted(json.loads(line)["key"][-2:] for line in lines) == ["-0", "-1"]
    for one, other in zip(first.samples, again.samples, strict=True):
        assert one.response_ids.tolist() == other.response_ids.tolist()
        assert one.logp_mu.tolist() == other.logp_mu.tolist()
        assert (one.routes.expert_ids_TLK == other.routes.expert_ids_TLK).all()
        assert one.reward == other.reward == 1


def test_responses_carry_the_version_that_sampled_them_and_keep_it_when_stored(
    checkpoint, tmp_path
):
    with FakeServer() as server:
        rollout = Rollout(parse(FLAGS), [server.url], checkpoint, MODEL)
        assert {s.weight_version for s in sampled(rollout, tmp_path / "none").samples} == {0}
        rollout.client.update_weights("v3", 3)
        assert {s.weight_version for s in sampled(rollout, tmp_path).samples} == {3}
        first, *_, last = stored_in(tmp_path)
        last.unlink()
        first.write_text(stored_in(tmp_path)[first][0])
        rollout.client.update_weights("v4", 4)
        versions = [s.weight_version for s in sampled(rollout, tmp_path).samples]
        assert sorted(versions) == [3] * 5 + [4] * 3


def test_a_dead_server_is_left_out_at_the_start_and_the_launcher_can_read_it(
    checkpoint, tmp_path, capsys
):
    config = parse([*FLAGS, "--rollout-url", "http://a", "http://b"])
    states = tmp_path / "servers.json"
    with FakeServer() as good, FakeServer() as dead:
        dead.http.shutdown()
        dead.http.server_close()
        rollout = Rollout(config, [dead.url, good.url], checkpoint, MODEL, states)
        assert list(read_absences(states)) == [dead.url]
        assert f"Servers: {dead.url} is left out: " in capsys.readouterr().out
        metrics = rollout.state()
        assert (metrics["rollout/servers"], metrics["rollout/servers_left_out"]) == (1, 1)
        strict = parse([*FLAGS, "--rollout-url", "http://a", "http://b", "--min-servers", "2"])
        with pytest.raises(ServerError, match="too few servers are left; expected 2 or more"):
            Rollout(strict, [dead.url, good.url], checkpoint, MODEL)


def test_answers_that_are_damaged_now_and_then_do_not_end_a_run_at_its_start(
    checkpoint, monkeypatch
):
    monkeypatch.setattr(sampling, "PROBE_WAIT_S", 0.01)
    broken = [503, 503]

    def at_first(route, body, answer):
        return (broken.pop() if broken and route == "/generate" else 200), answer

    with FakeServer(at_first) as server:
        Rollout(parse(FLAGS), [server.url], checkpoint, MODEL)
        assert not broken
        broken += [503] * 9
        with pytest.raises(ServerError, match="refuses a request for routes"):
            Rollout(parse(FLAGS), [server.url], checkpoint, MODEL)
        assert len(broken) == 5  # four tries


def test_more_servers_cannot_be_demanded_than_there_are():
    with pytest.raises(ConfigError, match=r"'min_servers'.*1\.\.1, the run's servers; got 2"):
        parse(["--min-servers", "2"])


def test_of_several_rollouts_the_earliest_step_goes_first_and_evaluations_before_all(checkpoint):
    def priorities(*flags):
        with FakeServer() as server:
            rollout = Rollout(parse([*FLAGS, *flags]), [server.url], checkpoint, MODEL)
            rollout.sample(PROMPTS[:1], 2, StepFiles(step=3))
            rollout.sample(PROMPTS[:1], 1)
            bodies = [body for route, body in server.calls if route == "/generate"]
            return [body.get("priority") for body in bodies[-3:]]

    assert priorities("--ahead", "2", "--publish-pause", "retract") == [-3, -3, 0]
    assert priorities("--ahead", "1") == [None] * 3
