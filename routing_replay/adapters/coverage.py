"""Rows of a pass that are not covered, by their cause: a metric over all ranks, and a bound."""

from __future__ import annotations

import torch

from ..metrics.typed import Mean, Value, all_reduce
from ..routes.origin import COVERED, Origin, num_uncovered, require_covered
from ..routes.table import RouteTable

CAUSES = [origin.name.lower() for origin in Origin if origin not in COVERED]


def covered_table(table: RouteTable, max_uncovered: float) -> RouteTable:
    """Return the table of a pass.

    Raises:
        RoutesError: A larger fraction of its rows is not covered against the caller's intention;
            it names the causes.
    """
    require_covered([table], max_uncovered, table.where)
    return table


def uncovered(table: RouteTable, device: torch.device | str) -> dict[str, Value]:
    """Return the fraction of all ranks' rows that are not covered, by metric name; collective.

    Ranks that work on the same sequences hold the same rows, so each sequence has one weight.
    Causes that did not occur are left out.

    Args:
        table: Of this rank's pass.
        device: Where the communication happens.
    """
    counts, num_rows = num_uncovered([table]), torch.tensor(float(table.num_rows))
    parts = {
        f"routing_replay/uncovered_{cause}": Mean(
            total=torch.tensor(float(counts.get(cause, 0))), count=num_rows
        )
        for cause in CAUSES
    }
    values = {name: mean.value().item() for name, mean in all_reduce(parts, None, device).items()}
    return {name: value for name, value in values.items() if value > 0}
