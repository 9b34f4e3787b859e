"""Sinks: what a step's metrics look like where they arrive."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from routing_replay.errors import ConfigError
from routing_replay.metrics.agreement import LayerAgreement
from routing_replay.metrics.policy_kl import Sequences, policy_metrics, update_metrics
from routing_replay.metrics.sinks import (
    HEAT_PIXELS,
    JsonLinesSink,
    LayerHistory,
    TensorBoardSink,
    WandbSink,
    open_sinks,
)

ROOT = Path(__file__).parents[1]


class Writer:
    """Stands for a SummaryWriter: keeps what it is given."""

    def __init__(self):
        self.scalars, self.images = [], {}

    def add_scalar(self, name, value, step):
        self.scalars.append((name, value, step))

    def add_image(self, name, image, step, dataformats):
        assert dataformats == "HWC"
        self.images[name, step] = image

    def flush(self):
        pass


def test_json_lines_are_whole_and_a_value_that_is_not_finite_is_null(tmp_path):
    sink = JsonLinesSink(tmp_path / "run")
    sink.write(3, {"reward": 0.5, "kl": math.nan})
    row = json.loads((tmp_path / "run/metrics.jsonl").read_text())
    assert (row["step"], row["reward"], row["kl"]) == (3, 0.5, None)
    assert row["time_s"] >= 0


def test_a_line_that_a_crash_cut_short_is_removed_before_the_next_is_written(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"step": 1, "rew')
    JsonLinesSink(tmp_path).write(1, {})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1]


def test_tensorboard_gets_finite_scalars_and_heat_maps_when_they_are_due():
    writer = Writer()
    sink = TensorBoardSink(writer, heat_map_every=2)
    for step in range(3):
        values = {f"routing_replay/overlap_layer_{i}": 1 - 0.1 * i * step for i in range(3)}
        sink.write(step, {**values, "x": math.nan})
    assert ("routing_replay/overlap_layer_2", 0.8, 1) in writer.scalars
    assert not [name for name, _, _ in writer.scalars if name == "x"]
    assert list(writer.images) == [
        ("routing_replay/overlap_heat_map", 0),
        ("routing_replay/overlap_heat_map", 2),
    ]


def test_a_heat_map_is_layers_down_and_steps_across():
    history = LayerHistory()
    history.add({"routing_replay/router_kl_layer_0": 0.0, "routing_replay/router_kl_layer_7": 1.0})
    history.add({"routing_replay/router_kl_layer_0": math.nan, "reward": 1.0})
    image = history.images()["routing_replay/router_kl_heat_map"][::HEAT_PIXELS, ::HEAT_PIXELS]
    # The lowest value is white, the highest the full hue, a missing one grey.
    white, hue, grey = [255] * 3, [130, 30, 20], [160] * 3
    np.testing.assert_array_equal(image, [[white, grey], [hue, grey]])


def test_wandb_gets_one_log_call_per_step():
    calls = []
    run = type("Run", (), {"log": lambda self, values, step: calls.append((values, step))})()
    sink = WandbSink(run, make_image=lambda image: ("image", image.shape), heat_map_every=1)
    sink.write(5, {"routing_replay/overlap_layer_0": 0.5, "nothing": math.inf})
    shape = (HEAT_PIXELS, HEAT_PIXELS, 3)
    assert calls == [
        (
            {
                "routing_replay/overlap_layer_0": 0.5,
                "routing_replay/overlap_heat_map": ("image", shape),
            },
            5,
        )
    ]


def test_names_choose_the_sinks(tmp_path):
    writer = Writer()
    sinks = open_sinks(["jsonl", "megatron"], tmp_path, megatron_writers=[writer, None])
    for sink in sinks:
        sink.write(0, {"a": 1.0})
        sink.close()
    assert writer.scalars == [("a", 1.0, 0)]
    assert (tmp_path / "metrics.jsonl").exists()


def test_megatron_without_an_open_writer_is_refused_with_the_fix():
    with pytest.raises(ConfigError, match="no writer of Megatron.*expected --tensorboard-dir"):
        open_sinks(["megatron"], megatron_writers=[None, None])


def test_an_unknown_sink_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="unknown sink; expected jsonl, .* got 'json'"):
        open_sinks(["json"], tmp_path)


def test_a_real_tensorboard_file_holds_the_scalar(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (sink,) = open_sinks(["tensorboard"], tmp_path)
    sink.write(7, {"reward": 0.25})
    sink.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("reward")] == [(7, 0.25)]


# Prefixes of everything that goes to a sink; a metric under another prefix needs its row, too.
EMITTED = re.compile(
    r"[\"']((?:routing_replay|train_infer|objective|rollout|reward|eval)/[a-z][a-z0-9_]*[a-z0-9])[\"']"
)
# Names of other recipes that a report understands; nothing here emits them.
ONLY_READ = {"rollout/reward", "reward/mean", "reward/eval"}


def documented_names():
    text = (ROOT / "docs" / "metrics.md").read_text()
    return set(re.findall(r"`([a-z_]+(?:/[a-z0-9_{}]+)?)`", text))


def plain(name):
    """As the page writes it: one prefix for the three ratios, no `_live`, `{i}` for the layer."""
    name = re.sub(r"^(staleness|off_policy)/", "train_infer/", name.removesuffix("_live"))
    return re.sub(r"_layer_\d+$", "_layer_{i}", name)


def test_every_metric_that_the_core_emits_is_documented():
    agreement = LayerAgreement([0, 3], num_rows=4, has_gates=True, has_logits=True)
    logp_T, mask_T = torch.zeros(2), torch.ones(2, dtype=torch.bool)
    sequences = Sequences(index_T=torch.zeros(2, dtype=torch.int64), count=1)
    policies = policy_metrics(logp_T, logp_T, mask_T, sequences=sequences)
    policies |= update_metrics(logp_T, logp_T, logp_T, mask_T, suffix="_live", sequences=sequences)
    names = {plain(name) for name in agreement.reduced() | policies}
    assert len(names) > 20 and names - documented_names() == set()


def test_every_metric_name_in_the_sources_is_documented():
    sources = [*(ROOT / "routing_replay").rglob("*.py"), *(ROOT / "recipes").rglob("*.py")]
    found = {name for path in sources for name in EMITTED.findall(path.read_text())}
    assert {"routing_replay/coverage", "objective/loss", "eval/reward"} <= found
    assert {plain(name) for name in found} - documented_names() - ONLY_READ == set()
