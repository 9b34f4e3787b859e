"""Write docs/objectives.md from the docstrings; with --check only say whether it is current."""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from routing_replay.objectives import kl, presets, table
from routing_replay.objectives.advantages import ADVANTAGES
from routing_replay.objectives.aggregation import AGGREGATIONS
from routing_replay.objectives.help import Entry, own_parameters, preset_text
from routing_replay.objectives.parameters import CORRECTIONS, Parameters, described

PAGE = Path(__file__).parents[1] / "docs" / "objectives.md"

_INTRODUCTION = """\
# Objectives

Written by `tools/generate_objectives_doc.py` from the docstrings in `routing_replay/objectives/`; a
test checks that it is current.

    from routing_replay import objectives

    objective = objectives.get("minirl", cap=5.0)
    outputs = objective(objectives.LossInputs(...))
    outputs.loss.backward()

mu is the inference engine's policy, pi_old the trainer's at the rollout's weights, pi_theta the
trainer's current one. Per token m = pi_old / mu (discrepancy), r = pi_theta / pi_old (staleness), w
= pi_theta / mu = m * r. A is the advantage, sg[] stops the gradient, |y| is the length of a
response. Every objective is maximised; the loss is its negative. Log-ratios are bounded at +-20.

A step's loss is the sum of its microbatches' losses over all ranks: denominators count the whole
step. A token that is masked, clipped or dropped stays in the denominators.
"""

_RECIPE = """\
## In the recipe

    python -m recipes.minirl --objective dapo --objective-parameters eps_high=0.3 eps_low=0.2

or in YAML `objective: dapo` and `objective_parameters: {eps_high: 0.3}`. All objectives run there.
What one needs beyond log-probs comes by itself:

- `keep_T`, `penalised_T` (m2po, clip_cov, kl_cov): chosen over all tokens of the optimizer step, of
  all ranks. Where pi_theta matters this takes one forward pass more per update.
- `router_shift_T` (rspo): the trainer's routers at the old policy's experts, before and now, over
  all layers and pipeline stages; one forward pass more per update.
- `topk_*` (dppo_topk): SGLang's `top_logprobs_num`, K = `--topk-logprobs`.
- `logp_ref_T` (`kl_coefficient` with `kl_reference=ref`): a second, frozen model (`--reference`,
  else that of `--model`), scored without replay.
- Values: none. No value model is trained, so ppo takes its advantages from groups too.

What can be done to samples and rewards, each off by default:

- `--top-p`, `--top-k`: Keep Sampling Mask. SGLang returns the tokens that were left to choose from;
  pi_theta, pi_old, the reference and mu are renormalised over them. Needs a finite top-k. With
  `--no-keep-sampling-mask` log-probs are of the whole vocabulary, which is not what was sampled.
- `--dynamic-sampling N` (DAPO): groups of equal rewards are replaced in at most N further rounds,
  counted in `rollout/sampling_rounds` and `rollout/replaced_groups`.
- `--overlong-cache N` (DAPO): the reward falls by 1 over the last N tokens before
  `--max-new-tokens`.
- `--reward-kl-coefficient`, `--reward-kl-estimator`: KL to the reference in the reward, summed over
  the response.
- `--smoothing-correct`, `--smoothing-wrong`: differential smoothing by log pi_old of the response.
- `--internal-layer L`, `--internal-steps N` (BuPO): for N steps the policy of layer L (from 0),
  softmax(H_L E^T) without the final norm, is trained in place of the whole. Grpo and its like only:
  an inner layer's policy has no mu.

`--preset tiny_bupo` is BuPO (2512.19673), `--preset tiny_justrl` is JustRL (2512.16649), both at
the size of one machine without a GPU.
"""


_CHOICES = {
    "Advantages (`advantage`)": ADVANTAGES,
    "Aggregation (`aggregation`)": AGGREGATIONS,
    "Corrections (`correction`)": CORRECTIONS,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, fail if not current")
    arguments = parser.parse_args()
    text = markdown()
    if not arguments.check:
        PAGE.write_text(text, encoding="utf-8")
        return 0
    if PAGE.exists() and PAGE.read_text(encoding="utf-8") == text:
        return 0
    print(f"{PAGE.name} is not current. Run: python tools/generate_objectives_doc.py")
    return 1


def markdown() -> str:
    """Return the whole of docs/objectives.md."""
    entries = table()
    parts = [
        _INTRODUCTION,
        "## Overview\n",
        f"{len(entries)} losses, and {len(presets())} presets: other parameters of one of them "
        "under a name of their own.\n",
        _rows(["name", "what it is", "reference"], [_overview_row(entry) for entry in entries]),
        "## Presets\n",
        _rows(["name", "is", "what it is", "reference", "use", "pitfalls"], _preset_rows()),
        "## Methods\n",
        *(_method(entry) for entry in entries),
        "## Parameters that every objective has\n",
        _parameter_rows(described(Parameters)),
        *(_choices(title, choices) for title, choices in _CHOICES.items()),
        "## KL terms\n",
        (inspect.getdoc(kl) or "").partition("\n\n")[2] + "\n",
        _RECIPE,
    ]
    return "\n".join(parts).rstrip() + "\n"


def _preset_rows() -> list[list[str]]:
    return [
        [f"`{p.name}`", f"`{preset_text(p)}`", p.summary, p.reference, p.use, p.pitfalls]
        for p in presets()
    ]


def _overview_row(entry: Entry) -> list[str]:
    name = entry["name"]
    return [f"[`{name}`](#{name})", entry["summary"], entry["reference"]]


def _method(entry: Entry) -> str:
    text = [f"### {entry['name']}\n", entry["summary"] + "\n", f"    {entry['equation']}\n"]
    for key in ("reference", "use", "pitfalls"):
        text.append(f"- {key.capitalize()}: {entry[key]}")
    return "\n".join([*text, "", _parameter_rows(own_parameters(entry))])


def _parameter_rows(parameters: Sequence[Entry]) -> str:
    rows = [[f"`{p['name']}`", f"`{p['default']}`", p["help"], p["source"]] for p in parameters]
    return _rows(["parameter", "default", "meaning", "default from"], rows)


def _choices(title: str, choices: Mapping[str, str]) -> str:
    rows = [[f"`{name}`", meaning] for name, meaning in choices.items()]
    return f"## {title}\n\n" + _rows(["name", "meaning"], rows)


def _rows(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    # A bar would end the cell.
    cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    lines = [header, ["---"] * len(header), *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
