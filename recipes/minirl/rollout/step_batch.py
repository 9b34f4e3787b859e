"""The batch of a step: its groups sampled, saved for all ranks, described by metrics."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from ..data.prompts import Prompt, take
from ..settings.config import RecipeConfig
from .batch import BATCH_FILE, Batch
from .exchange import Exchange
from .groups import Group, StepFiles
from .sampling import Groups, mean_reward, sample_groups
from .versions import version_metrics


def sample_batch(
    exchange: Exchange,
    config: RecipeConfig,
    prompts: Sequence[Prompt],
    files: StepFiles,
    *,
    step: int,
    start: int,
    folder: Path,
) -> dict[str, float]:
    """Sample, reward, save batch and index for all ranks; return the rollout's metrics.

    It runs in a thread of rank 0, beside the training of earlier steps if it runs ahead.

    Args:
        exchange: Samples.
        config: The run's.
        prompts: All of them.
        files: Where the groups go.
        step: Whose batch it is.
        start: Number of its first prompt.
        folder: For batch and index.
    """
    began, data = time.monotonic(), config.data

    def draw(offset: int, count: int) -> list[Prompt]:
        return take(prompts, start + offset, count, config.run.seed)

    def sample(drawn: Sequence[Prompt], first: int) -> list[Group]:
        return exchange.sample(drawn, data.samples_per_prompt, files, first)

    groups = sample_groups(sample, draw, data.prompts_per_step, data.dynamic_sampling)
    batch = Batch.from_samples(groups.samples, data.samples_per_prompt, groups.num_prompts)
    batch.save(folder / BATCH_FILE)
    uncovered: dict[str, float] = {}
    if files.writer:
        uncovered = files.writer.save_index(folder, groups.groups, config.rollout.max_uncovered)
    metrics = {f"routing_replay/uncovered_{cause}": part for cause, part in uncovered.items()}
    is_in_place = config.rollout.publish_pause == "in_place"
    metrics |= version_metrics(groups.samples, step - 1, is_in_place)
    metrics["time/sampling_s"] = time.monotonic() - began
    return rollout_metrics(config, batch, groups) | metrics | exchange.state()


def rollout_metrics(config: RecipeConfig, batch: Batch, groups: Groups) -> dict[str, float]:
    """Describe a step's samples."""
    lengths_S = batch.num_sampled_S.double()
    solved_G = batch.rewards_S.view(-1, config.data.samples_per_prompt).mean(1)
    limit = config.rollout.max_new_tokens
    metrics = {
        "reward": mean_reward(groups.samples),
        "rollout/response_length": lengths_S.mean().item(),
        "rollout/truncated_fraction": (lengths_S == limit).double().mean().item(),
        "rollout/stored_responses": groups.num_stored,
        # Groups whose responses all fail or all succeed teach nothing.
        "rollout/informative_groups": ((solved_G > 0) & (solved_G < 1)).double().mean().item(),
    }
    if config.data.dynamic_sampling:
        metrics["rollout/sampling_rounds"] = groups.num_rounds
        metrics["rollout/replaced_groups"] = groups.num_prompts - config.data.prompts_per_step
    if config.has_sampling_mask:
        assert batch.support_ids_C is not None
        masses = [sample.support_mass for sample in groups.samples]
        metrics["rollout/sampling_mask_mass"] = sum(masses) / len(masses)
        num_choices = len(batch.support_ids_C) / max(1, int(batch.mask_N.sum()))
        metrics["rollout/sampling_mask_size"] = num_choices
    return metrics
