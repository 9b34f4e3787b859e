"""recipes.minirl.job.pool: rollouts of several steps at once, taken in the order of steps."""

import threading
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed as dist
from megatron_worlds import run_world

TIMEOUT_S = 60
FLAGS = ["--prompts-per-step", "8", "--samples-per-prompt", "2", "--minibatch-size", "4"]
FLAGS += ["--microbatch-size", "4", "--steps", "5"]
POOL = ["--ahead", "2", "--publish-pause", "retract"]


class Sampler:
    """Rollouts that end when they are told to."""

    def __init__(self, errors=()):
        self.begun, self.errors = [], dict(errors)
        self.may_end = {step: threading.Event() for step in range(1, 6)}

    def __call__(self, step, first_prompt, folder):
        assert Path(folder).is_dir() and folder.name == f"step_{step:06d}"
        self.begun.append((step, first_prompt))
        assert self.may_end[step].wait(TIMEOUT_S)
        if self.errors.get(step):
            raise self.errors[step].pop()
        return {"step": float(step)}


def make_pool(flags, sampler, folder):
    """A pool of a run, and the versions that its publisher publishes."""
    from recipes.minirl.job.first_rank import FirstRank
    from recipes.minirl.job.pool import RolloutPool
    from recipes.minirl.publish.publisher import Publisher
    from recipes.minirl.settings.command_line import parse

    published = []

    class Noting(Publisher):
        def publish(self, version):
            self._version = version
            self.num_published += 1
            published.append(version)
            return {}

    config, first_rank = parse([*FLAGS, *flags]), FirstRank(folder)
    policy = SimpleNamespace(config=config)
    publisher = Noting(policy, folder, folder, first_rank, None, (), lambda mode: nullcontext())
    publisher._sender = object()  # weights in buckets can be lost
    publisher.publish(0)
    return RolloutPool(config, first_rank, publisher, sampler), publisher, published


def begun(sampler, count):
    """The rollouts that rank 0 has begun, once there are so many."""
    if dist.get_rank() > 0:
        return None
    deadline = time.monotonic() + TIMEOUT_S
    while len(sampler.begun) < count:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(0.1)
    # Threads of their own: their order is no promise.
    return sorted(sampler.begun)


def steps_of_a_pool(rank, folder):
    from recipes.minirl.job.checkpoints import Progress

    sampler = Sampler()
    pool, _, _ = make_pool(POOL, sampler, Path(folder))
    progress, seen, taken = Progress(), [], []
    for step in range(1, 6):
        # The rollout of the step after the next one ends before the next one's.
        for number in (step + 1, step):
            if number < 6:
                sampler.may_end[number].set()
        rollout = pool.take(progress)
        taken.append((rollout.step, rollout.first_prompt, rollout.pending.wait()))
        progress = Progress(step=step, prompts_consumed=8 * step)
        pool.refill(progress)
        seen.append(begun(sampler, min(step + 2, 5)))
    return taken, seen


def test_a_step_takes_the_oldest_rollout_and_two_run_while_it_is_trained(tmp_path):
    first, second = run_world(steps_of_a_pool, 2, str(tmp_path / "scratch"))
    steps = [(step, 8 * (step - 1)) for step in range(1, 6)]
    assert first[0] == [(*numbers, {"step": float(numbers[0])}) for numbers in steps]
    assert second[0] == [(*numbers, {}) for numbers in steps]
    # Step n is trained while n + 1 and n + 2 are sampled; none follows the last.
    assert first[1] == [steps[: min(step + 2, 5)] for step in range(1, 6)]


def steps_that_fail(rank, folder):
    from recipes.minirl.job.checkpoints import Progress
    from routing_replay.errors import ServerError
    from routing_replay.rollout.servers import LostWeightsError

    lost = [LostWeightsError("the weights are lost")]
    sampler = Sampler({2: lost * 2, 3: [ServerError("too few servers are left")]})
    for event in sampler.may_end.values():
        event.set()
    pool, publisher, published = make_pool(POOL, sampler, Path(folder))
    pool.take(Progress())
    pool.refill(Progress(step=1, prompts_consumed=8))
    pool.await_ends()  # no error of steps 2 and 3 is raised here
    publisher.publish(1)
    # Weights have come since it lost them, so it begins anew; the second time they have not.
    assert pool.take(Progress(step=1, prompts_consumed=8)).number == 2
    if rank == 0:
        with pytest.raises(ServerError, match="too few servers"):
            pool.take(Progress(step=2, prompts_consumed=16))
    # The others wait for rank 0, which ends with its error.
    return published, begun(sampler, 6)


def test_a_rollout_that_failed_raises_at_its_own_step_and_lost_weights_are_published_again(
    tmp_path,
):
    (published, steps), _ = run_world(steps_that_fail, 2, str(tmp_path / "scratch"))
    assert published == [0, 1, 1]
    assert [step for step, _ in steps] == [1, 2, 2, 2, 3, 4]


def one_step_ahead(rank, folder):
    from recipes.minirl.job.checkpoints import Progress

    sampler = Sampler()
    for event in sampler.may_end.values():
        event.set()
    pool, _, _ = make_pool(["--ahead", "1", "--dynamic-sampling", "2"], sampler, Path(folder))
    pool.take(Progress())
    # The step consumed more prompts than its batch has.
    pool.refill(Progress(step=1, prompts_consumed=19))
    pool.take(Progress(step=1, prompts_consumed=19))
    return begun(sampler, 2)


def test_one_step_ahead_begins_at_the_prompt_that_dynamic_sampling_came_to(tmp_path):
    (steps,) = run_world(one_step_ahead, 1, str(tmp_path / "scratch"))
    assert steps == [(1, 0), (2, 19)]
