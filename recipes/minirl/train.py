"""The training loop: `torchrun ... -m recipes.minirl.train RUN_DIR --rollout-url URL ...`.

Every rank runs it. Rank 0 talks to the servers and keeps the journal; the batch and its routes
reach the others as memory-mapped files in the scratch folder of their node.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from recipes.model import bridge, parallel
from recipes.model.collective import on_every_rank
from recipes.serving.kept import STATE_FILE
from routing_replay.errors import RoutingReplayError
from routing_replay.metrics.typed import Metric, Value, merge, to_floats
from routing_replay.objectives import Objective
from routing_replay.routes.part_index import PartIndex
from routing_replay.routes.parts import PartedTable

from .data.inputs import Inputs, load_inputs
from .job import checkpoints
from .job.first_rank import FirstRank
from .job.journal import Clock, Journal
from .job.pool import RolloutPool
from .launch import devices
from .node import require_alike
from .policy.old_pass import StepScores, replaying, score_batch, score_replayed
from .policy.policy import FixedScores, Policy
from .policy.shaping import with_advantages
from .policy.step_choices import choose
from .publish.publisher import Publisher
from .rollout.answers import StepAnswers, remove_covered
from .rollout.batch import BATCH_FILE, Batch
from .rollout.exchange import Exchange, LocalExchange
from .rollout.groups import INDEX_FILE, GroupWriter, StepFiles
from .rollout.sampling import Rollout, mean_reward
from .rollout.step_batch import sample_batch
from .settings import checks
from .settings.config import RecipeConfig


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a step works with; the journal exists on rank 0 only.

    `run_dir` may be another folder on each node; `shared_dir` is one for all.
    """

    config: RecipeConfig
    run_dir: Path
    shared_dir: Path
    inputs: Inputs
    policy: Policy
    first_rank: FirstRank
    exchange: Exchange
    journal: Journal | None
    objective: Objective
    publisher: Publisher

    def sample(self, step: int, first_prompt: int, folder: Path) -> dict[str, float]:
        """Sample a step's batch on rank 0, in a thread; return the rollout's metrics."""
        return sample_batch(
            self.exchange,
            self.config,
            self.inputs.prompts,
            self._files(step, folder),
            step=step,
            start=first_prompt,
            folder=folder,
        )

    def _files(self, step: int, folder: Path) -> StepFiles:
        """Return where the groups of a step go."""
        config, shape = self.config, self.policy.replay.shape
        answers = writer = None
        if config.run.store_answers:
            answers = StepAnswers.of(self.shared_dir, step, config, shape)
        if config.rollout_capture != "off":
            writer = GroupWriter.of(config, step, folder, shape, self.policy.stages)
        return StepFiles(step=step, answers=answers, writer=writer)

    def open_routes(self, folder: Path, batch: Batch) -> PartedTable | None:
        """Open the parts that this rank trains, on its node's disk; collective.

        Raises:
            TableError: A part is missing, damaged, or belongs to another step.
            DataError: A node could not write them (on every rank).
        """
        if self.config.rollout_capture == "off":
            return None
        policy, path = self.policy, folder / INDEX_FILE
        sequences = policy.sharding.sequences(batch.lengths_S)
        layers = policy.replay.local_layers
        self.exchange.fetch(folder, PartIndex.open(path).files(sequences, layers))
        # Ranks of a group read the same files; one of them verifies what all map.
        return PartedTable.open(path, sequences, layers, verify=policy.is_first_of_sequences)

    def evaluate(self, step: int) -> dict[str, float]:
        """Return the mean reward on the held-out prompts, sampled as in training, on rank 0."""

        def sample() -> dict[str, float]:
            groups = self.exchange.sample(self.inputs.heldout, 1)
            samples = [sample for group in groups for sample in group.samples]
            return {"eval/reward": mean_reward(samples)}

        return self.publisher.sample(f"evaluated_{step}", sample)


def train(
    config: RecipeConfig,
    run_dir: Path,
    urls: list[str],
    exchange_of: Callable[[Rollout | None, FirstRank], Exchange] = LocalExchange,
) -> None:
    """Run all steps, from the newest checkpoint if there is one."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    checks.require_ready(config, world_size, run_dir / "config.json")
    if config.training.weights == "bridge":
        bridge.require_installed()
    devices.require_gpu(config, devices.why_no_cuda())
    num_local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    devices.require_gpu_per_rank(torch.cuda.device_count(), num_local_ranks)
    parallel.start_distributed()
    require_alike(config.to_mapping())
    inputs = on_every_rank(lambda: load_inputs(config))
    shared_dir = Path(config.run.shared_dir or run_dir).absolute()
    checkpoint = checkpoints.agreed(shared_dir)
    progress = checkpoints.read_progress(checkpoint) if checkpoint else checkpoints.Progress()
    policy = Policy(config, checkpoint or inputs.base, inputs.reference)
    if checkpoint:
        checkpoints.load_trainer(policy, checkpoint)
    first_rank = FirstRank(scratch_folder(config, run_dir))
    rollout = journal = None
    if first_rank.is_me:
        states = run_dir / STATE_FILE
        rollout = Rollout(config, urls, inputs.base, policy.replay.shape, states)
        # Without a checkpoint even the record of step 0 is written anew.
        last_step = progress.step if checkpoint else -1
        journal = Journal(run_dir, last_step, config.run.steps, config.telemetry)
    exchange = exchange_of(rollout, first_rank)
    job = Job(
        config=config,
        run_dir=run_dir,
        shared_dir=shared_dir,
        inputs=inputs,
        policy=policy,
        first_rank=first_rank,
        exchange=exchange,
        journal=journal,
        objective=config.make_objective(),
        publisher=Publisher(
            policy,
            inputs.base,
            shared_dir / "weights",
            first_rank,
            rollout.client if rollout else None,
            urls,
            exchange.paused,
        ),
    )
    job.publisher.publish(progress.step)
    if not progress.step:
        metrics = job.evaluate(0)
        if journal:
            journal.write(0, metrics)
    pool = RolloutPool(config, first_rank, job.publisher, job.sample)
    while progress.step < config.run.steps:
        progress = take_step(job, pool, progress)
    job.publisher.close()
    first_rank.close()
    if journal:
        journal.close()


def take_step(job: Job, pool: RolloutPool, progress: checkpoints.Progress) -> checkpoints.Progress:
    """Take one step: what happens in it stands here from top to bottom.

    Args:
        job: What it works with.
        pool: The rollouts that run.
        progress: How far the run is.

    Returns:
        How far the run is then.
    """
    config, policy, step = job.config, job.policy, progress.step + 1
    clock = Clock(job.journal)
    policy.weight_version = progress.step

    # 1. Rollout and rewards, on rank 0. Those of further steps may run while this one is trained.
    with clock("rollout"):
        rollout = pool.take(progress)
        values: dict[str, Value] = dict(rollout.pending.wait())
        job.first_rank.share(rollout.folder, [BATCH_FILE, INDEX_FILE])
        batch = Batch.open(rollout.folder / BATCH_FILE)
    progress = checkpoints.Progress(
        step=step, prompts_consumed=progress.prompts_consumed + int(batch.num_prompts)
    )
    pool.refill(progress)

    # 2. Known routes arrange the step: sequences to microbatches, experts to ranks.
    values |= arrange(policy, clock, batch, rollout.folder)
    with clock("rollout"):
        table = job.open_routes(rollout.folder, batch)

    # 3. The old policy scores the batch: R3 replays the rollout's routes, R2 records its own.
    measures_live = is_due(step, config.run.measure_live_every, config.run.steps)
    scored = score_batch(policy, clock, batch, table, measures_live)

    # 4. Rewards become advantages.
    batch, shaping = with_advantages(policy, batch, scored.old.scores, scored.reference)
    metrics = scored.metrics | policy.reduce(shaping)

    # 5. N updates, each on its own minibatch, with the same routes.
    metrics |= policy.reduce(update_policy(job, clock, step, batch, scored))
    policy.follow(None)

    # 6. New weights for the servers, and now and then an evaluation of them; metrics in any case.
    try:
        values |= publish_step(job, pool, clock, step)
    finally:
        if job.journal:
            job.journal.write(step, values | to_floats(metrics) | clock.times())

    # 7. Now and then a checkpoint.
    finish_step(job, progress, rollout.folder)
    return progress


def publish_step(job: Job, pool: RolloutPool, clock: Clock, step: int) -> dict[str, float]:
    """Give the servers the weights of a step, and evaluate these if that is due.

    With `--publish-pause wait` each response is of one version: rollouts end before.
    """
    if job.config.rollout.publish_pause == "wait":
        with clock("rollout"):
            pool.await_ends()
    with clock("weights"):
        values = job.publisher.publish(step)
    if is_due(step, job.config.run.evaluate_every, job.config.run.steps):
        with clock("evaluation"):
            values |= job.evaluate(step)
    return values


def arrange(policy: Policy, clock: Clock, batch: Batch, folder: Path) -> dict[str, Value]:
    """Plan the step by its routes, if asked, and move the experts; return the plan's metrics."""
    if policy.config.training.plan == "none":
        return {}
    with clock("plan"):
        planned = policy.plan(batch, PartedTable(PartIndex.open(folder / INDEX_FILE), {}))
    with clock("move experts"):
        policy.follow(planned)
    return dict(planned.metrics)


def update_policy(
    job: Job, clock: Clock, step: int, batch: Batch, scored: StepScores
) -> dict[str, Metric]:
    """Take all updates of a step; return this rank's metrics."""
    config, policy, old = job.config, job.policy, scored.old
    layer = inner_layer(config, step)
    metrics: dict[str, Metric] = {}
    with policy.logits_from_layer(layer):
        scores = old.scores if layer < 0 else score_replayed(policy, batch, old)
        for number in range(config.num_mini_batches):
            if scored.live is not None and layer < 0:
                with clock("live log-probs"):
                    metrics = merge(metrics, policy.live_ratios(batch, scored.live, number))
            with clock("update"):
                seed = (config.run.seed, step, number)
                chosen = choose(policy, batch, old.table, scores, number, seed)
                fixed = FixedScores(
                    old=scores, reference=scored.reference, chosen=chosen, has_mu=layer < 0
                )
                with replaying(policy, old.table, policy.planned_counts(number)):
                    metrics = merge(
                        metrics,
                        policy.update(batch, old.table, fixed, job.objective, number),
                    )
    return metrics


def finish_step(job: Job, progress: checkpoints.Progress, folder: Path) -> None:
    """Save a checkpoint if one is due; keep the newest batch.

    A resumed run begins the rollouts that ran ahead again. It finds the responses that had ended,
    and samples the others with the checkpoint's weights.
    """
    run = job.config.run
    if is_due(progress.step, run.checkpoint_every, run.steps):
        checkpoints.save(job.policy, job.shared_dir, progress, job.inputs.base)
        if job.first_rank.is_me:
            remove_covered(job.shared_dir, progress.step)
    # `tools/attribute_kl.py` and `routing-replay inspect` look at it; at the end it is whole.
    if progress.step == run.steps and job.config.rollout_capture != "off":
        is_me = job.first_rank.is_me
        job.exchange.fetch(folder, PartIndex.open(folder / INDEX_FILE).files() if is_me else ())
    job.first_rank.keep(folder, job.run_dir / "last_batch")


def scratch_folder(config: RecipeConfig, run_dir: Path) -> Path:
    """Return the folder of a step's files; on a disk of the node it carries the run's name."""
    scratch_dir = config.run.scratch_dir
    return Path(scratch_dir) / f"minirl-{run_dir.name}" if scratch_dir else run_dir / "scratch"


def inner_layer(config: RecipeConfig, step: int) -> int:
    """Return the layer whose policy is trained in a step; -1: the whole policy."""
    o = config.objective
    return o.internal_layer if step <= o.internal_steps else -1


def is_due(step: int, every: int, last: int) -> bool:
    """Tell whether something that happens every so many steps is due; it is after the last one."""
    return step == last or (every > 0 and step % every == 0)


def main(argv: list[str] | None = None) -> int:
    """Run one rank; leave an error as a message for the launcher."""
    parser = argparse.ArgumentParser(prog="python -m recipes.minirl.train", description=__doc__)
    parser.add_argument("run_dir", type=Path, help="folder with config.json")
    parser.add_argument("--rollout-url", nargs="+", required=True, help="the rollout servers")
    arguments = parser.parse_args(argv)
    values = json.loads((arguments.run_dir / "config.json").read_text())
    try:
        train(RecipeConfig.from_mapping(values), arguments.run_dir, arguments.rollout_url)
    except Exception as error:
        is_bug = not isinstance(error, RoutingReplayError)
        message = f"{type(error).__name__} in the trainer: {error}" if is_bug else str(error)
        rank = os.environ.get("RANK", "0")
        (arguments.run_dir / f"error_rank_{rank}.txt").write_text(message)
        traceback.print_exc()
        # The other ranks are inside collectives; leaving the group in order would wait for them.
        sys.stderr.flush()
        os._exit(1)
    parallel.destroy()
    return 0


if __name__ == "__main__":
    sys.exit(main())
