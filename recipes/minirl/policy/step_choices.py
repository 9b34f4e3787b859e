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
        [S, T] each, by name in LossInputs, on ranks of the last pipeline stage.
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
        rows_ST = batch.token_rows(source)
        inputs["router_shift_T"] = by_position(policy.router_shift.gamma(), rows_ST)
    elif has_choice and objective.parameters.chooses_by_theta:
        with same_routes_as_update(policy, batch, replayed) as source:
            theta = policy.score(batch, source, number)
    if has_choice and policy.is_last_stage:
        step, shape = tokens_of_step(policy, batch, old, theta, number, seed)
        chosen = objective.parameters.choose(step)
        inputs |= {name: values_T.view(shape) for name, values_T in chosen.items()}
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


def by_position(values_R: torch.Tensor, rows_ST: torch.Tensor) -> torch.Tensor:
    """Return a value per row of the table as [S, T]; nan where a token has no row."""
    values_ST = values_R[rows_ST.clamp(min=0).to(values_R.device)]
    return torch.where(rows_ST.to(values_R.device) >= 0, values_ST, torch.nan)


def tokens_of_step(
    policy: Policy,
    batch: Batch,
    old: Scores,
    theta: Scores | None,
    number: int,
    seed: tuple[int, ...],
) -> tuple[StepTokens, torch.Size]:
    """Return all tokens of a minibatch on one axis, and their shape [S, T]."""
    shape, device = batch.mask_ST.shape, policy.sharding.device
    first = number * policy.sharding.minibatch_size
    mask_ST = torch.zeros(shape, dtype=torch.bool)
    mask_ST[first : first + policy.sharding.minibatch_size] = True
    uniform_ST = torch.from_numpy(np.random.default_rng(seed).random(shape, np.float32))
    values_ST = {
        "logp_theta_T": None if theta is None else policy.dense(theta, batch),
        "logp_old_T": policy.dense(old, batch),
        "logp_mu_T": batch.logp_mu_ST,
        "advantages_T": batch.advantages_S[:, None].expand(shape),
        "mask_T": mask_ST & batch.mask_ST,
        "uniform_T": uniform_ST,
    }
    flat = {n: v.to(device).flatten() for n, v in values_ST.items() if v is not None}
    return StepTokens(logp_theta_T=flat.pop("logp_theta_T", None), **flat), shape
