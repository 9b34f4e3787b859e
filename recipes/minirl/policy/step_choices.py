"""What an objective chooses or measures over a whole optimizer step, before its first microbatch.

M2PO, Clip-Cov and KL-Cov rank a step's tokens against each other; RSPO compares the routers before
and after an update. Both need all tokens of the step, of all microbatches and ranks. A choice that
depends on pi_theta costs one more forward pass per update.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import torch

from routing_replay.objectives import StepTokens
from routing_replay.routes.step_routes import StepRoutes
from routing_replay.routes.token_rows import RowSource

from ..rollout.batch import Batch
from .old_pass import replaying
from .policy import Policy
from .scoring import Scores

CHOICES = frozenset({"keep_T", "penalised_T"})


def choose(
    policy: Policy,
    batch: Batch,
    replayed: StepRoutes | None,
    old: Scores,
    number: int,
    seed: tuple[int, ...],
) -> dict[str, torch.Tensor]:
    """Return the inputs that a loss needs from the whole step; collective.

    Args:
        policy: As it is before the update.
        batch: With advantages.
        replayed: The table that the update will replay, or None.
        old: pi_old's scores.
        number: Of the minibatch: the optimizer step.
        seed: Of random choices, alike on all ranks.

    Returns:
        [N] each, by name in LossInputs, on ranks of the last pipeline stage.
    """
    inputs: dict[str, torch.Tensor] = {}
    theta, objective = None, policy.config.make_objective()
    has_choice = bool(CHOICES & objective.needs)
    if policy.router_shift is not None:
        with (
            same_routes_as_update(policy, batch, replayed) as source,
            policy.router_shift.comparing(),
        ):
            theta = policy.score(batch, source, number)
        assert source is not None
        rows_N = batch.token_rows(source)
        inputs["router_shift_T"] = by_position(policy.router_shift.gamma(), rows_N)
    elif has_choice and objective.parameters.chooses_by_theta:
        with same_routes_as_update(policy, batch, replayed) as source:
            theta = policy.score(batch, source, number)
    if has_choice and policy.is_last_stage:
        step = tokens_of_step(policy, batch, old, theta, number, seed)
        inputs |= objective.parameters.choose(step)
    return inputs


@contextlib.contextmanager
def same_routes_as_update(
    policy: Policy, batch: Batch, replayed: StepRoutes | None
) -> Iterator[RowSource | None]:
    """Open the scope of a pass that routes as the update will; yield what has its tokens' rows."""
    if replayed is not None:
        with replaying(policy, replayed):
            yield replayed
    elif policy.router_shift is not None:
        # Live routing: the recording only numbers the tokens; its routes are not used.
        with policy.replay.recording(batch.lengths_S.numpy()) as recorded:
            yield recorded
    else:
        yield None


def by_position(values_R: torch.Tensor, rows_N: torch.Tensor) -> torch.Tensor:
    """Return a value per row of the table as [N]; nan where a token has no row."""
    values_N = values_R[rows_N.clamp(min=0).to(values_R.device)]
    return torch.where(rows_N.to(values_R.device) >= 0, values_N, torch.nan)


def tokens_of_step(
    policy: Policy,
    batch: Batch,
    old: Scores,
    theta: Scores | None,
    number: int,
    seed: tuple[int, ...],
) -> StepTokens:
    """Return the step's positions, of which those of a minibatch count."""
    size, device = policy.sharding.minibatch_size, policy.sharding.device
    minibatch = batch.positions(number * size, (number + 1) * size)
    mask_N = torch.zeros_like(batch.mask_N)
    mask_N[minibatch] = batch.mask_N[minibatch]
    uniform_N = np.random.default_rng(seed).random(len(mask_N), np.float32)
    return StepTokens(
        logp_theta_T=None if theta is None else policy.dense(theta, batch),
        logp_old_T=policy.dense(old, batch),
        logp_mu_T=batch.logp_mu_N.to(device),
        advantages_T=batch.advantages_S[batch.sequence_N].to(device),
        mask_T=mask_N.to(device),
        uniform_T=torch.from_numpy(uniform_N).to(device),
    )
