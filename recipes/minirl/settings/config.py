"""The configuration of a run: all sections together, with what follows from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import yaml

from routing_replay import objectives
from routing_replay.config import ReplayConfig
from routing_replay.errors import ConfigError

from ..launch import devices
from . import checks
from .sections import (
    SECTIONS,
    DataSettings,
    ModelSettings,
    ObjectiveSettings,
    PlanSettings,
    RolloutSettings,
    RunSettings,
    TelemetrySettings,
    TrainingSettings,
    by_section,
    key_of,
)


@dataclass(frozen=True, kw_only=True)
class RecipeConfig:
    """All sections; every key exists once over them.

    Raises:
        ConfigError: Values that cannot work together.
    """

    run: RunSettings = field(default_factory=RunSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    data: DataSettings = field(default_factory=DataSettings)
    rollout: RolloutSettings = field(default_factory=RolloutSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)
    objective: ObjectiveSettings = field(default_factory=ObjectiveSettings)
    replay: ReplayConfig = field(default_factory=ReplayConfig)
    telemetry: TelemetrySettings = field(default_factory=TelemetrySettings)
    plan: PlanSettings = field(default_factory=PlanSettings)

    def __post_init__(self) -> None:
        checks.check_sizes(self)
        checks.check_interleaving(self)
        devices.check_devices(self)
        checks.check_machines(self)
        checks.check_sampling(self)
        checks.check_publish(self)
        checks.check_objective(self)
        checks.check_ahead(self)
        checks.check_replay(self)
        checks.check_plan(self)
        checks.check_balance(self)

    @property
    def batch_size(self) -> int:
        """Responses per step."""
        return self.data.prompts_per_step * self.data.samples_per_prompt

    @property
    def num_mini_batches(self) -> int:
        """N: updates per step."""
        return self.batch_size // self.training.minibatch_size

    @property
    def world_size(self) -> int:
        """Ranks of the trainer."""
        return self.run.nnodes * self.run.nproc

    @property
    def has_sampling_mask(self) -> bool:
        """Whether all policies are restricted to what top-p and top-k left."""
        r = self.rollout
        return r.keep_sampling_mask and (r.top_p < 1 or r.top_k > 0)

    @property
    def needs_reference(self) -> bool:
        """Whether a frozen reference is part of the reward or of the loss."""
        in_loss = "logp_ref_T" in self.make_objective().needs
        return in_loss or self.objective.reward_kl_coefficient > 0

    @property
    def num_top_logprobs(self) -> int:
        """How many of mu's most likely tokens come back per position."""
        is_needed = "topk_ids_TK" in self.make_objective().needs
        return self.objective.topk_logprobs if is_needed else 0

    @property
    def max_version_lag(self) -> int:
        """Versions by which weights may be older whose routes are replayed."""
        lag = self.rollout.max_version_lag
        return self.rollout.ahead if lag < 0 else lag

    @property
    def has_priorities(self) -> bool:
        """Whether requests of several steps, or of a step and an evaluation, meet in a server."""
        return self.rollout.ahead > 0 and self.rollout.publish_pause != "wait"

    @property
    def rollout_capture(self) -> str:
        """What training rollouts bring back of the routes: only R3 replays them."""
        return self.telemetry.capture if self.replay.mode == "R3" else "off"

    def make_objective(self) -> objectives.Objective:
        """Return the loss with its parameters."""
        pairs = [_name_and_value(text) for text in self.objective.objective_parameters]
        return objectives.get(self.objective.objective, **dict(pairs))

    def to_mapping(self) -> dict[str, Any]:
        """Return flat keys, as a YAML file would hold them."""
        return {
            key_of(section, name): value
            for section, values in asdict(self).items()
            for name, value in values.items()
        }

    @classmethod
    def from_mapping(cls, values: Mapping[str, object], where: object = None) -> RecipeConfig:
        """Read flat keys; `-` and `_` alike.

        Raises:
            ConfigError: A key is unknown (the nearest is named), or a value cannot work.
        """
        sections = by_section(values, where)
        return cls(**{name: SECTIONS[name](**settings) for name, settings in sections.items()})


def _name_and_value(text: str) -> tuple[str, object]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(
            "an objective parameter has no value", expected="name=value", got=repr(text)
        )
    value = yaml.safe_load(value)
    # YAML 1.1 reads 1e-4 as text.
    try:
        return name, float(value) if isinstance(value, str) else value
    except ValueError:
        return name, value
