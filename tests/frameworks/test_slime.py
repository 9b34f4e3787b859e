"""slime's and miles' own trainer with our replay, from their command line to their update.

They are not on a package index: ROUTING_REPLAY_SLIME and ROUTING_REPLAY_MILES name checkouts.
"""

import functools
import math

import checkouts
import pytest
import tiny_batch
import torch
from megatron_worlds import RankError, run_world

ADAPTER = ("--custom-megatron-init-path", "routing_replay.adapters.slime.init")
R3 = ("--use-rollout-routing-replay",)
R2 = ("--use-routing-replay",)
# (layer, token)s of the eight sequences whose token was fed: 179 tokens, 8 of them the last ones.
ROUTED = 4 * (179 - 8)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    return tiny_batch.write_checkpoint_of_words(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="session")
def train(checkpoint, tmp_path_factory):
    """Trains on a rollout; the same job runs once. Returns the ranks' results and a folder."""

    @functools.cache
    def once(package, flags=(), mini_batches=2, **layout):
        checkouts.checkout_of(package)
        folder = str(tmp_path_factory.mktemp("tensorboard"))
        job = {
            "package": package,
            "checkpoint": checkpoint,
            "flags": flags,
            "layout": tuple(layout.items()),
            "mini_batches": mini_batches,
            "folder": folder,
        }
        return run_world("slime_step:run", math.prod(layout.values()), job), folder

    return once


def total(ranks, name):
    """(right, demanded) of a pass over all ranks, as the witness counted."""
    counts = [rank["seen"][name] for rank in ranks if name in rank["seen"]]
    demanded = sum(count["rows"] for count in counts)
    return [demanded - sum(count["wrong"] for count in counts), demanded]


def log_probs(ranks, name="log_probs"):
    """Log-probs of the whole rollout by sample, from the ranks of the last stage."""
    found = {}
    for rank in ranks:
        for sample, values in zip(rank["partition"], rank[name] or (), strict=False):
            found.setdefault(sample, []).append(values)
    return found


def scalars_of(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(folder)
    events.Reload()
    return {tag: [e.value for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@pytest.mark.parametrize("package", ["slime", "miles"])
def test_the_actor_replays_every_row_and_the_reference_stays_stock(train, package):
    ranks, _ = train(package, (*ADAPTER, *R3))
    assert total(ranks, "old_log_probs") == [ROUTED, ROUTED]
    assert total(ranks, "update") == [ROUTED, ROUTED]
    # By chance 1 of 28 pairs of 8 experts is the given one.
    same, routed = total(ranks, "ref_log_probs")
    assert routed == ROUTED and same < ROUTED / 4
    assert "mode R3, routes of the rollout" in ranks[0]["printed"]


@pytest.mark.parametrize("package", ["slime", "miles"])
def test_the_reference_is_bitwise_the_stock_jobs(train, package):
    ranks, _ = train(package, (*ADAPTER, *R3))
    stock, _ = train(package)
    ours, theirs = log_probs(ranks, "ref_log_probs"), log_probs(stock, "ref_log_probs")
    assert all(torch.equal(ours[s][0], theirs[s][0]) for s in range(8))
    # The actor of the stock job is its reference; with replay it is not.
    assert not torch.equal(log_probs(ranks)[0][0], log_probs(stock)[0][0])


@pytest.mark.parametrize("package", ["slime", "miles"])
def test_metrics_arrive_in_their_logger_at_each_update(train, package):
    _, folder = train(package, (*ADAPTER, *R3))
    logged = scalars_of(folder)
    assert logged["train/routing_replay/coverage"] and len(logged["train/grad_norm"]) == 2
    assert len(logged["train/routing_replay/overlap_layer_3"]) == 2
    # Rows of an update are those of half of the rollout.
    assert sum(logged["train/routing_replay/replayed_rows"]) == ROUTED


LAYOUTS = (
    {"pipeline": 2},
    {"context": 2},
    {"expert": 2},
    {"tensor": 2},
)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: "-".join(layout))
@pytest.mark.parametrize("package", ["slime", "miles"])
def test_two_ranks_replay_the_same_rows(train, package, layout):
    alone, _ = train(package, (*ADAPTER, *R3))
    ranks, _ = train(package, (*ADAPTER, *R3), **layout)
    for name in ("old_log_probs", "update"):
        same, routed = total(ranks, name)
        assert same == routed == ROUTED
    for name in ("ref_log_probs", "log_probs"):
        expected, found = log_probs(alone, name), log_probs(ranks, name)
        assert found.keys() == expected.keys()
        if "context" in layout:  # each rank holds two slices of a sequence
            lengths = {sample: sum(map(len, parts)) for sample, parts in found.items()}
            assert lengths == {sample: len(parts[0]) for sample, parts in expected.items()}
        elif "tensor" not in layout:
            require_close(found, expected, 2e-5)
        elif name == "log_probs":
            # Another order of sums in bfloat16. The reference's live routes turn over with it.
            largest = max(float(parts[0].abs().max()) for parts in expected.values())
            require_close(found, expected, 2**-8 * largest)


def require_close(found, expected, bound):
    for sample, parts in expected.items():
        difference = float((found[sample][0] - parts[0]).abs().max())
        assert difference <= bound, f"sample {sample}: {difference} over {bound}"


def test_padded_batches_replay_the_same_rows(train):
    flags = (*ADAPTER, *R3, "--qkv-format", "bshd", "--micro-batch-size", "2")
    ranks, _ = train("miles", flags)
    assert total(ranks, "update") == [ROUTED, ROUTED]


@pytest.mark.parametrize("package", ["slime", "miles"])
def test_r2_replays_what_the_old_policy_chose(train, package):
    ranks, folder = train(package, (*ADAPTER, *R2))
    stock, _ = train(package)
    # The first update starts from the old policy: its own routes are the live ones.
    assert torch.equal(log_probs(ranks)[0][0], log_probs(stock)[0][0])
    assert sum(scalars_of(folder)["train/routing_replay/replayed_rows"]) == ROUTED
    assert "mode R2, routes of the old policy's pass" in ranks[0]["printed"]


def test_r2_without_an_old_pass_ends_with_an_error(train):
    with pytest.raises(RankError, match="no pass of the old policy was recorded"):
        train("slime", (*ADAPTER, *R2), mini_batches=1)


def test_the_adapter_without_their_replay_flag_is_refused(train):
    with pytest.raises(RankError, match="the adapter is loaded, and no replay is asked for"):
        train("slime", ADAPTER)
