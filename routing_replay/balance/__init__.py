"""Known routes balance a step before it runs: which sequences and experts share a rank.

    step = rr.plan(table, lengths, PlanLayout(data=8, expert=8), PlanOptions(minibatch_size=512))
    step.packing.microbatches(minibatch, data_rank)     # lists of sequences
    step.placement                                      # experts to expert-parallel ranks
    step.prediction.peak_over_mean_L                    # and step.natural for comparison

Engine-free: numpy only. A plan is the same on every rank that computes it from the same counts.
"""

from .budget import Budget
from .cost import CostModel
from .layout import PlanLayout
from .packing import Packing
from .placement import Placement
from .prediction import Prediction
from .step_plan import PlanOptions, StepPlan, plan

__all__ = [
    "Budget",
    "CostModel",
    "Packing",
    "Placement",
    "PlanLayout",
    "PlanOptions",
    "Prediction",
    "StepPlan",
    "plan",
]
