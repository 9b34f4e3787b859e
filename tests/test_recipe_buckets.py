"""Weights in buckets into a real server: bitwise those of the disk, or of no version."""

import pytest
from bucket_checks import PROMPTS, observe
from megatron_worlds import RankError, run_world
from sglang_servers import MODEL, random_prompt, request, running
from test_recipe_end_to_end import (
    NUM_STEPS,
    SMALL,
    is_server,
    kill_when,
    records,
    start,
    write_prompts,
)

from routing_replay.errors import ServerError
from routing_replay.rollout import ClientOptions, RolloutClient

# torch counts the readers in front of the bytes.
SHARED_HEADER_BYTES = 64


@pytest.fixture(scope="module")
def by_disk(sglang_server):
    """What the server does with each checkpoint from a disk."""
    seen = []
    for path in sglang_server.checkpoints:
        sglang_server.client.update_weights(str(path), 4)
        seen.append(observe(sglang_server.server.url))
    assert seen[0][1] != seen[1][1] and seen[0][2] != seen[1][2]
    sglang_server.restore()
    return seen


@pytest.fixture(scope="module")
def published(sglang_server, by_disk):
    """By event what a trainer of two pipeline stages saw, by rank."""
    folders = [str(path) for path in sglang_server.checkpoints]
    return run_world("bucket_checks:publish", 2, log_paths([sglang_server]), folders)


def log_paths(servers):
    return {one.server.url: one.server.log_path for one in servers}


def answers_of(seen):
    return [answer[:3] for answer in seen[2]]


@pytest.mark.parametrize(
    ("event", "checkpoint", "version"),
    [
        ("second", 1, 5),
        ("first", 0, 6),
        ("shared", 0, 10),
        ("shared healed", 1, 12),
        ("groups again", 0, 13),
    ],
)
def test_buckets_of_two_stages_give_a_server_bitwise_the_weights_of_the_disk(
    published, by_disk, event, checkpoint, version
):
    error, (seen,) = published[0][event]
    assert error == ""
    assert seen[0] == str(version)
    assert seen[1] == by_disk[checkpoint][1]
    assert answers_of(seen) == answers_of(by_disk[checkpoint])
    assert [versions for *_, versions in seen[2]] == [{version}] * len(seen[2])


def test_a_group_that_a_server_cannot_join_is_an_error_on_every_rank(published, by_disk):
    error, (seen,) = published[0]["refused"]
    assert "/init_weights_update_group" in error and published[1]["refused"][0] == error
    assert seen == ("incomplete-4", by_disk[0][1], None)


def test_servers_stay_in_the_groups_from_one_update_to_the_next(published):
    assert [result["same groups"] for result in published] == [True, True]


def test_shared_tensors_of_an_update_that_broke_off_have_no_version_and_are_freed_but_one_bucket(
    published, by_disk
):
    error, (seen,) = published[0]["shared ended"]
    assert "must run between begin_weight_update() and" in error
    assert published[1]["shared ended"][0] == error
    assert seen[0] == "incomplete-11" and seen[1] not in {checksum for _, checksum, _ in by_disk}
    # The bucket that was refused unread stays until the trainer ends.
    (whole, ended), others = (result["kept memory"] for result in published)
    assert (whole, others) == (0, [0, 0])
    assert ended <= published[0]["largest bucket"] + SHARED_HEADER_BYTES
    assert [result["sharing strategy"] for result in published] == ["file_descriptor"] * 2


def test_responses_that_are_paused_and_retracted_go_on_with_whole_new_weights(published):
    error, completions = published[0]["running"]
    assert error == ""
    assert len(completions) == len(PROMPTS)
    for completion in completions:
        assert completion.routes.covered_T.all() and completion.weight_version == "7"
        assert set(completion.routes.weight_version_T.tolist()) == {6, 7}


def test_an_update_that_breaks_off_has_no_version_and_the_next_one_heals_it(published, by_disk):
    error, (seen,) = published[0]["left"]
    assert "/update_weights_from_distributed" in error and published[1]["left"][0] == error
    assert seen[0] == "incomplete-8" and seen[1] not in {checksum for _, checksum, _ in by_disk}
    error, (seen,) = published[0]["healed"]
    assert (error, seen[0], seen[1]) == ("", "9", by_disk[1][1])
    assert answers_of(seen) == answers_of(by_disk[1])


def test_a_trainer_that_dies_leaves_no_server_with_parts_of_its_weights_in_use(
    sglang_server, by_disk
):
    sglang_server.restore()
    url, folder = sglang_server.server.url, str(sglang_server.checkpoints[1])
    with pytest.raises(RankError, match="ended without a result"):
        run_world("bucket_checks:die", 2, [url], folder)
    client = RolloutClient([url], MODEL, ClientOptions(num_retries=0))
    assert client.weight_versions() == {url: "incomplete-10"}
    with pytest.raises(ServerError, match="incomplete-10: it was restarted, or its update broke"):
        client.generate([request(random_prompt(1))])
    client.update_weights(folder, 11)
    assert observe(url)[1] == by_disk[1][1]


@pytest.mark.slow
def test_servers_of_one_and_of_two_tensor_ranks_get_the_weights_together(
    sglang_server, by_disk, monkeypatch
):
    monkeypatch.setenv("SGLANG_CPU_OMP_THREADS_BIND", "0|1")
    with running("gates", "--tp-size", "2") as wide:
        expected = [by_disk, []]
        for path in wide.checkpoints:
            wide.client.update_weights(str(path), 4)
            expected[1].append(observe(wide.server.url))
        folders = [str(path) for path in wide.checkpoints]
        servers = log_paths([sglang_server, wide])
        results = run_world("bucket_checks:publish", 2, servers, folders)
    events = [("second", 1), ("first", 0), ("healed", 1), ("shared", 0), ("shared healed", 1)]
    for event, checkpoint in events:
        error, seen = results[0][event]
        assert error == ""
        for one, from_disk in zip(seen, expected, strict=True):
            assert one[1] == from_disk[checkpoint][1]
            assert answers_of(one) == answers_of(from_disk[checkpoint])
    assert [version for version, *_ in results[0]["left"][1]] == ["incomplete-8"] * 2


@pytest.mark.slow
@pytest.mark.parametrize("way", ["buckets", "tensors"])
def test_a_server_that_was_started_again_in_a_rollout_gets_the_same_weights_without_a_disk(
    tmp_path, way
):
    run_dir = tmp_path / "run"
    flags = [*SMALL, *write_prompts(tmp_path), "--cache-dir", str(tmp_path / "cache")]
    process = start(run_dir, *flags, "--publish", way)
    output, status = kill_when(process, lambda: len(records(run_dir)) > 1, is_server)
    assert status == 0, output
    left, waits, returned = (
        output.index(text)
        for text in ("is left out", "healthy again and waits for new weights", "in use again")
    )
    assert left < waits < returned
    assert [step["rollout/weights_by_files"] for step in records(run_dir)[1:]] == [0] * NUM_STEPS
    assert not (run_dir / "weights").exists()
