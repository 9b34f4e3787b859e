"""The training loop: `torchrun ... -m recipes.minirl.train RUN_DIR --rollout-url URL ...`.

Every rank runs it. The first rank talks to the servers and keeps the journal; the batch and its
routes reach the others as memory-mapped files in the run's scratch folder.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path

import torch

from recipes.model import parallel
from routing_replay.errors import RoutingReplayError
from routing_replay.megatron import Recording
from routing_replay.metrics.load import expert_load
from routing_replay.metrics.typed import Metric, merge, to_floats
from routing_replay.objectives import Objective
from routing_replay.routes.table import RouteTable

from . import checkpoints
from .batch import Batch
from .config import RecipeConfig
from .first_rank import FirstRank
from .inputs import Inputs, inputs_of
from .journal import Clock, Journal
from .policy import Given, Policy, Scores
from .prompts import take
from .publish import write_weights
from .rollout import Rollout, mean_reward, sample_groups
from .shaping import with_advantages
from .step_choices import choose


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a step works with; `rollout` and `journal` exist on the first rank only."""

    config: RecipeConfig
    run_dir: Path
    inputs: Inputs
    policy: Policy
    first_rank: FirstRank
    rollout: Rollout | None
    journal: Journal | None
    objective: Objective

    def publish(self, version: int) -> None:
        """Give the current weights to all servers; collective."""
        folder = write_weights(self.policy, self.run_dir / "weights", self.inputs.base)
        update = self.rollout.client.update_weights if self.rollout else None
        self.first_rank.does(f"published_{version}", update, str(folder), version)

    def evaluate(self, step: int) -> dict[str, float]:
        """Mean reward on the held-out prompts, sampled like the training prompts, no replay."""

        def sample() -> dict[str, float]:
            samples = self.rollout.sample(self.inputs.heldout, 1, for_training=False)
            return {"eval/reward": mean_reward(samples)}

        return self.first_rank.does(f"evaluated_{step}", sample)


def train(config: RecipeConfig, run_dir: Path, urls: list[str]) -> None:
    """The whole run, from its newest checkpoint if there is one."""
    inputs = inputs_of(config)
    checkpoint = checkpoints.newest(run_dir)
    progress = checkpoints.read_progress(checkpoint) if checkpoint else checkpoints.Progress()
    policy = Policy(config, checkpoint or inputs.base, inputs.reference)
    if checkpoint:
        checkpoints.load_trainer(policy, checkpoint)
    first_rank = FirstRank(run_dir / "scratch")
    rollout = journal = None
    if first_rank.is_me:
        rollout = Rollout(config, urls, inputs.base, policy.replay.shape)
        # Without a checkpoint even the record of step 0 is written anew.
        last_step = progress.step if checkpoint else -1
        journal = Journal(run_dir, last_step, config.run.steps, config.telemetry)
    job = Job(
        config=config,
        run_dir=run_dir,
        inputs=inputs,
        policy=policy,
        first_rank=first_rank,
        rollout=rollout,
        journal=journal,
        objective=config.make_objective(),
    )
    job.publish(progress.step)
    if not progress.step:
        found = job.evaluate(0)
        if journal:
            journal.write(0, found)
    while progress.step < config.run.steps:
        progress = take_step(job, progress)
    first_rank.remove(first_rank.folder)
    if journal:
        journal.close()


def take_step(job: Job, progress: checkpoints.Progress) -> checkpoints.Progress:
    """One step: what happens in it stands here from top to bottom."""
    config, policy, step = job.config, job.policy, progress.step + 1
    clock, scratch = Clock(job.journal), job.first_rank.new_folder(f"step_{step:06d}")

    # 1. Rollout and rewards, on the first rank.
    with clock("rollout"):
        start = progress.prompts_consumed
        found = job.first_rank.does(f"sampled_{step}", sample_batch, job, start, scratch)
        batch, table = open_batch(scratch)

    # 2. The old policy scores the batch: R3 replays the rollout's routes, R2 records its own.
    with clock("old log-probs"):
        old, replayed, token_rows_ST = score_old(policy, batch, table, scratch)
        metrics = policy.reduce(policy.discrepancy(batch, old))
        if table is not None:
            metrics |= policy.replay.metrics()
        routes = table if replayed is None else replayed
        if routes is not None:
            metrics |= policy.reduce(expert_load(routes))
    is_measured_live = is_due(step, config.run.measure_live_every, config.run.steps)
    if is_measured_live:
        with clock("live log-probs"):
            # Under R2 and without replay the old policy routed live just now.
            live = policy.score(batch, batch.token_rows(None)) if table is not None else old
            metrics |= policy.reduce(policy.discrepancy(batch, live, "_live"))
    reference = None
    if policy.reference is not None:
        with clock("reference log-probs"):
            reference = policy.score_reference(batch)

    # 3. Rewards become advantages.
    batch, shaping = with_advantages(policy, batch, old, reference)
    metrics |= policy.reduce(shaping)

    # 4. N updates, each on its own minibatch, with the same routes.
    updates: dict[str, Metric] = {}
    with policy.reading(inner_layer(config, step)):
        anchor = old_of_update(policy, batch, replayed, token_rows_ST, old, step)
        for number in range(config.num_mini_batches):
            if is_measured_live and anchor is old:
                with clock("live log-probs"):
                    updates = merge(updates, policy.live_ratios(batch, live, number))
            with clock("update"):
                seed = (config.run.seed, step, number)
                chosen = choose(policy, batch, replayed, anchor, number, seed)
                given = Given(old=anchor, reference=reference, chosen=chosen)
                with replaying(policy, replayed):
                    of_update = policy.update(batch, token_rows_ST, given, job.objective, number)
                updates = merge(updates, of_update)
    if anchor is not old:  # an inner layer's policy has no mu to be compared with
        updates = {n: m for n, m in updates.items() if not n.startswith("off_policy/")}
    metrics |= policy.reduce(updates)

    # 5. New weights for the servers.
    with clock("weights"):
        job.publish(step)

    # 6. Now and then an evaluation; metrics; now and then a checkpoint.
    if is_due(step, config.run.evaluate_every, config.run.steps):
        with clock("evaluation"):
            found |= job.evaluate(step)
    if job.journal:
        job.journal.write(step, found | to_floats(metrics) | clock.times())
    consumed = progress.prompts_consumed + int(batch.num_prompts)
    return finish_step(job, checkpoints.Progress(step=step, prompts_consumed=consumed), scratch)


def finish_step(job: Job, progress: checkpoints.Progress, scratch: Path) -> checkpoints.Progress:
    """Now and then a checkpoint; the newest batch stays."""
    run = job.config.run
    if is_due(progress.step, run.checkpoint_every, run.steps):
        checkpoints.save(job.policy, job.run_dir, progress, job.inputs.base)
    # `tools/attribute_kl.py` and `routing-replay inspect` look at it.
    job.first_rank.keep(scratch, job.run_dir / "last_batch")
    return progress


def sample_batch(job: Job, start: int, scratch: Path) -> dict[str, float]:
    """Sample, reward, and save the batch and its routes for all ranks; the rollout's metrics."""
    config, data = job.config, job.config.data

    def draw(offset: int, count: int):
        return take(job.inputs.prompts, start + offset, count, config.run.seed)

    groups = sample_groups(job.rollout, draw, data.prompts_per_step, data.dynamic_sampling)
    samples, size = groups.samples, data.samples_per_prompt
    batch = Batch.from_samples(samples, size, job.policy.length_multiple, groups.num_prompts)
    batch.save(scratch / "batch.safetensors")
    if config.rollout_capture != "off":
        table = RouteTable.from_routes([sample.routes for sample in samples])
        table.save(scratch / "routes.safetensors")
    lengths_S = batch.mask_ST.sum(1).double()
    solved_G = batch.rewards_S.view(-1, size).mean(1)
    limit = config.rollout.max_new_tokens
    found = {
        "reward": mean_reward(samples),
        "rollout/response_length": lengths_S.mean().item(),
        "rollout/truncated_fraction": (lengths_S == limit).double().mean().item(),
        # Groups whose responses all fail or all succeed teach nothing.
        "rollout/informative_groups": ((solved_G > 0) & (solved_G < 1)).double().mean().item(),
    }
    if data.dynamic_sampling:
        found["rollout/sampling_rounds"] = groups.num_rounds
        found["rollout/replaced_groups"] = groups.num_prompts - data.prompts_per_step
    if config.has_sampling_mask:
        found["rollout/sampling_mask_mass"] = sum(s.support_mass for s in samples) / len(samples)
        num_choices = len(batch.support_ids_N) / max(1, int(batch.mask_ST.sum()))
        found["rollout/sampling_mask_size"] = num_choices
    return found


def open_batch(scratch: Path) -> tuple[Batch, RouteTable | None]:
    """The batch and its routes, memory-mapped; one rank of a node verifies the checksums."""
    path = scratch / "routes.safetensors"
    is_verifier = os.environ.get("LOCAL_RANK", "0") == "0"
    table = RouteTable.open(path, verify=is_verifier) if path.exists() else None
    return Batch.open(scratch / "batch.safetensors"), table


def score_old(
    policy: Policy, batch: Batch, table: RouteTable | None, scratch: Path
) -> tuple[Scores, RouteTable | None, torch.Tensor]:
    """pi_old's scores; the routes that the updates replay; the rows that name them."""
    match policy.config.replay.mode:
        case "R3":
            token_rows_ST = batch.token_rows(table)
            with policy.replay.replaying(table), policy.remembering_routers(table.num_rows):
                return policy.score(batch, token_rows_ST), table, token_rows_ST
        case "R2":
            old, recorded = score_and_record(policy, batch)
            recorded_table = recorded.own_table()  # an update cuts the batch as this pass did
            return old, recorded_table, batch.token_rows(recorded_table)
        case _ if policy.router_shift is not None:
            old, _ = score_and_record(policy, batch)
        case _:
            old = policy.score(batch, batch.token_rows(None))
    return old, None, batch.token_rows(None)


def score_and_record(policy: Policy, batch: Batch) -> tuple[Scores, Recording]:
    """Scores under live routing, which is recorded."""
    with (
        policy.replay.recording(batch.lengths_S.numpy()) as recorded,
        policy.remembering_routers(recorded.num_rows),
    ):
        old = policy.score(batch, batch.token_rows(recorded))
    return old, recorded


def old_of_update(
    policy: Policy,
    batch: Batch,
    replayed: RouteTable | None,
    token_rows_ST: torch.Tensor,
    old: Scores,
    step: int,
) -> Scores:
    """pi_old in the updates: BuPO's first steps compare the inner layer's policy with itself."""
    if inner_layer(policy.config, step) < 0:
        return old
    with replaying(policy, replayed):
        return policy.score(batch, token_rows_ST)


def inner_layer(config: RecipeConfig, step: int) -> int:
    """The layer whose policy is trained in a step; -1: the whole policy."""
    o = config.objective
    return o.internal_layer if step <= o.internal_steps else -1


def replaying(policy: Policy, table: RouteTable | None):
    """The scope of an update."""
    return policy.replay.replaying(table) if table is not None else contextlib.nullcontext()


def is_due(step: int, every: int, last: int) -> bool:
    """Every so many steps, and after the last one."""
    return step == last or (every > 0 and step % every == 0)


def main(argv: list[str] | None = None) -> int:
    """Run one rank; a user's error is left as a message for the launcher."""
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
