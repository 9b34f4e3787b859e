"""What a report shows of the layers: heat maps over the steps, and a table of recent means."""

from __future__ import annotations

import html
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from .charts import Grid, heat_map, shared_bounds
from .markup import cards, folded, number, table
from .run import Run

PREFIX = "routing_replay/"
SHOWN_RANKS = 8  # expert-parallel ranks with a heat map of their own


@dataclass(frozen=True, kw_only=True)
class LayerMap:
    """A metric of the layers as a heat map.

    Args:
        metric: Its name without the prefix.
        title: Heading.
        caption: What a cell shows.
        is_complement: A cell shows 1 - value, so that dark means far apart.
        is_log: Cells are coloured by their logarithm.
    """

    metric: str
    title: str
    caption: str
    is_complement: bool = False
    is_log: bool = False

    def grid(self, run: Run, bounds: tuple[float, float] | None = None) -> Grid:
        """Return the run's cells, from the first step with a value to the last.

        Args:
            run: The run.
            bounds: Scale that several runs share; the run's own if None.
        """
        series = run.layers.get(run.named(PREFIX + self.metric), {})
        columns = list(zip(*series.values(), strict=True))
        # An evaluation before the first step has no layers: it would be an empty column.
        known = [i for i, column in enumerate(columns) if any(v is not None for v in column)]
        steps = slice(known[0], known[-1] + 1) if known else slice(0)
        values = [[self._shown(value) for value in row[steps]] for row in series.values()]
        own = shared_bounds(itertools.chain(*values), self.is_log)
        return Grid(
            label=self.title,
            rows=list(series),
            steps=run.steps[steps],
            values=values,
            bounds=bounds or own,
            is_log=self.is_log,
        )

    def _shown(self, value: float | None) -> float | None:
        return 1 - value if self.is_complement and value is not None else value


LAYER_MAPS = (
    LayerMap(
        metric="exact_match",
        title="Tokens whose expert set differs",
        caption="Share of tokens for which the live router selects another set than the replayed.",
        is_complement=True,
    ),
    LayerMap(
        metric="overlap",
        title="Expert slots that differ",
        caption="Share of the selected experts that are not shared: 1 - overlap@K.",
        is_complement=True,
    ),
    LayerMap(
        metric="router_kl",
        title="Router KL",
        caption="KL(engine's router || trainer's live router) in nats, over all experts (exact).",
        is_log=True,
    ),
    LayerMap(
        metric="router_kl_bound",
        title="Router KL, lower bound",
        caption="The same on the selected experts and one bucket for the rest, in nats.",
        is_log=True,
    ),
    LayerMap(
        metric="dead_experts",
        title="Experts without a token",
        caption="Share of the layer's experts that no route of the step selects.",
    ),
    LayerMap(
        metric="max_load",
        title="Largest load of one expert",
        caption="Share of the layer's selections that its busiest expert takes.",
    ),
    LayerMap(
        metric="ep_peak_over_mean",
        title="Busiest expert-parallel rank, as planned",
        caption="Its tokens over the mean rank's, summed over the microbatches; 1 is balanced.",
    ),
    LayerMap(
        metric="ep_peak_over_mean_natural",
        title="Busiest expert-parallel rank, in natural order",
        caption="The same without the plan: experts and sequences where Megatron puts them.",
    ),
    *(
        LayerMap(
            metric=f"ep_load_rank_{rank}{suffix}",
            title=f"Load of expert-parallel rank {rank}, {words}",
            caption="Its tokens over the mean rank's, over the whole step.",
        )
        for rank in range(SHOWN_RANKS)
        for suffix, words in (("", "as planned"), ("_natural", "in natural order"))
    ),
)
COLUMNS = {
    "overlap": "overlap@K",
    "exact_match": "exact set",
    "router_kl": "router KL (nats)",
    "router_kl_bound": "router KL, lower bound (nats)",
    "margin": "margin",
    "live_mass": "live mass",
    "replay_bias": "replay bias (nats)",
    "first_difference": "first difference here",
    "dead_experts": "experts without a token",
    "max_load": "largest load",
    "ep_peak_over_mean": "busiest rank / mean, planned",
    "ep_peak_over_mean_natural": "busiest rank / mean, natural",
}


def layers(runs: Sequence[Run]) -> str:
    """Return heat maps of layers over steps, and a table of the recent means of each run."""
    maps = [figure for layer_map in LAYER_MAPS for figure in _heat_maps(layer_map, runs)]
    return cards(maps) + "".join(_recent_table(run) for run in runs)


def _heat_maps(layer_map: LayerMap, runs: Sequence[Run]) -> list[str]:
    """Return one figure per run, on one scale, so that their colours compare."""
    values = [row for run in runs for row in layer_map.grid(run).values]
    common = shared_bounds(itertools.chain(*values), layer_map.is_log)
    figures = []
    for run in runs:
        title = f"{layer_map.title} ({run.name})" if len(runs) > 1 else layer_map.title
        figures.append(heat_map(title, layer_map.caption, layer_map.grid(run, common)))
    return figures


def _recent_table(run: Run) -> str:
    recent = {
        words: run.recent_by_layer(run.named(PREFIX + name)) for name, words in COLUMNS.items()
    }
    columns = {words: values for words, values in recent.items() if values}
    numbers = sorted({layer for values in columns.values() for layer in values})
    rows = [[str(i), *(number(values.get(i)) for values in columns.values())] for i in numbers]
    if not rows:
        return ""
    label = f"Every layer of {html.escape(run.name)}, mean of the last quarter"
    return folded(label, table(["layer", *columns], rows))
