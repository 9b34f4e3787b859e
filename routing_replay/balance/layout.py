"""Which data-parallel ranks send their tokens to the same experts."""

from __future__ import annotations

from dataclasses import dataclass, fields

from ..errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class PlanLayout:
    """The parallel sizes of the trainer, in Megatron's default order of ranks.

    Expert-parallel groups are runs of consecutive ranks of one pipeline stage. A group that is as
    large as several data-parallel ranks exchanges the tokens of all of them.

    Args:
        data: Data-parallel ranks.
        expert: Expert-parallel ranks; each holds 1 / expert of a layer's experts.
        tensor: Tensor-parallel ranks, which share each sequence.
        context: Context-parallel ranks, which share each sequence.
        expert_tensor: Ranks that share an expert: all of them see its tokens.
        pipeline: Pipeline stages.
        virtual_pipeline: Model chunks of a stage.

    Raises:
        ConfigError: Sizes below 1, or groups that do not hold whole data-parallel ranks.
    """

    data: int
    expert: int
    tensor: int = 1
    context: int = 1
    expert_tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int = 1

    def __post_init__(self) -> None:
        for field in fields(self):
            size = getattr(self, field.name)
            if not isinstance(size, int) or size < 1:
                raise ConfigError(
                    f"the parallel size {field.name} is out of range",
                    expected="an integer of at least 1",
                    got=repr(size),
                )
        experts, tokens = self.expert * self.expert_tensor, self.tensor * self.context
        if max(experts, tokens) % min(experts, tokens) or self.data % self.ranks_per_group:
            raise ConfigError(
                "the expert-parallel groups do not divide the data-parallel ranks",
                expected="expert * expert_tensor and tensor * context that divide one another, and "
                "groups that divide data",
                got=self,
            )

    @property
    def ranks_per_group(self) -> int:
        """Data-parallel ranks whose tokens meet at one group of experts."""
        return max(1, self.expert * self.expert_tensor // (self.tensor * self.context))

    @property
    def num_groups(self) -> int:
        """Groups of experts that train side by side on other sequences."""
        return self.data // self.ranks_per_group

    @property
    def has_whole_sequences(self) -> bool:
        """Whether a group of experts receives all tokens of its sequences.

        Otherwise several groups share a sequence by position, and its counts are split evenly
        between them: an estimate.
        """
        return self.expert * self.expert_tensor >= self.tensor * self.context

    @property
    def microbatch_multiple(self) -> int:
        """What the number of microbatches must be a multiple of."""
        return self.pipeline if self.virtual_pipeline > 1 else 1
