"""Transformer Engine's layer spec without Transformer Engine: same module tree, same names.

Megatron's own TESpecProvider and TEGroupedMLP are used; only the leaf classes that TE implements
are stand-ins. Their parameter names are those that TE gives them and that Megatron's
extensions/transformer_engine.py expects: `layer_norm_weight` beside `weight`, and `weight0`,
`weight1`, ... in a grouped linear.
"""

import contextlib
from unittest import mock

import torch

from recipes.model.local_modules import AllGatherAttention, RMSNorm

# isort: split
from megatron.core.extensions import transformer_engine_spec_provider as provider
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear


class LayerNormColumnParallelLinear(ColumnParallelLinear):
    def __init__(self, input_size, output_size, *, config, **arguments):
        super().__init__(input_size, output_size, config=config, **arguments)
        self.eps = config.layernorm_epsilon
        self.layer_norm_weight = torch.nn.Parameter(torch.ones(input_size))
        self.layer_norm_weight.sequence_parallel = config.sequence_parallel

    def forward(self, hidden):
        shape = (hidden.shape[-1],)
        normed = torch.nn.functional.rms_norm(hidden, shape, self.layer_norm_weight, self.eps)
        return super().forward(normed)


class _GroupedLinear(torch.nn.Module):
    split_axis = None

    def __init__(self, num_gemms, input_size, output_size, *, config, pg_collection, **unused):
        super().__init__()
        shape = [output_size, input_size]
        shape[self.split_axis] //= pg_collection.expt_tp.size()
        for index in range(num_gemms):
            weight = torch.nn.Parameter(torch.empty(shape))
            weight.allreduce = config.expert_model_parallel_size == 1  # else reduced among experts
            self.register_parameter(f"weight{index}", weight)

    def forward(self, tokens, tokens_per_expert):
        parts = tokens.split(tokens_per_expert)
        outputs = [part @ getattr(self, f"weight{i}").t() for i, part in enumerate(parts)]
        return torch.cat(outputs), None


class ColumnParallelGroupedLinear(_GroupedLinear):
    split_axis = 0


class RowParallelGroupedLinear(_GroupedLinear):
    split_axis = 1


@contextlib.contextmanager
def te_spec():
    """Makes Megatron's Transformer Engine layer spec buildable and runnable on a CPU."""
    stand_ins = {
        "TENorm": RMSNorm,
        "_TENormWithResidual": RMSNorm,
        "TEDotProductAttention": AllGatherAttention,
        "TEColumnParallelLinear": ColumnParallelLinear,
        "TERowParallelLinear": RowParallelLinear,
        "TELayerNormColumnParallelLinear": LayerNormColumnParallelLinear,
        "TEColumnParallelGroupedLinear": ColumnParallelGroupedLinear,
        "TERowParallelGroupedLinear": RowParallelGroupedLinear,
        "is_te_min_version": lambda version: True,
    }
    with (
        mock.patch.multiple(provider, **stand_ins),
        mock.patch.multiple(
            gpt_layer_specs, TESpecProvider=provider.TESpecProvider, TENorm=RMSNorm
        ),
    ):
        yield
