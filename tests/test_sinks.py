"""Sinks: what a step's metrics look like where they arrive."""

import json
import math
import re
from pathlib import Path

import pytest
import torch

from routing_replay.errors import ConfigError
from routing_replay.metrics.agreement import LayerAgreement
from routing_replay.metrics.policy_kl import Sequences, policy_metrics, update_metrics
from routing_replay.metrics.sinks import (
    JsonLinesSink,
    TensorBoardSink,
    WandbSink,
    open_sinks,
)
from routing_replay.metrics.typed import LayerValues

ROOT = Path(__file__).parents[1]


class Writer:
    """Stands for a SummaryWriter: keeps what it is given."""

    def __init__(self):
        self.scalars = []

    def add_scalar(self, name, value, step):
        self.scalars.append((name, value, step))

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


OVERLAP = LayerValues(mean=0.9, layers={0: 1.0, 3: 0.8, 4: math.nan})


def test_a_metric_of_the_layers_is_one_object_in_the_file(tmp_path):
    firsts = LayerValues(mean=None, layers={0: 0.25})
    JsonLinesSink(tmp_path).write(0, {"overlap": OVERLAP, "first_difference": firsts})
    row = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert row["overlap"] == {"mean": 0.9, "layers": {"0": 1.0, "3": 0.8, "4": None}}
    assert row["first_difference"] == {"layers": {"0": 0.25}}


def test_tensorboard_gets_finite_scalars_and_one_name_per_layer():
    writer = Writer()
    TensorBoardSink(writer).write(1, {"routing_replay/overlap": OVERLAP, "x": math.nan})
    assert writer.scalars == [
        ("routing_replay/overlap", 0.9, 1),
        ("routing_replay/overlap_layer_0", 1.0, 1),
        ("routing_replay/overlap_layer_3", 0.8, 1),
    ]


def test_wandb_gets_one_log_call_per_step():
    calls = []
    run = type("Run", (), {"log": lambda self, values, step: calls.append((values, step))})()
    values = LayerValues(mean=None, layers={0: 0.5})
    WandbSink(run).write(5, {"routing_replay/first_difference": values, "nothing": math.inf})
    assert calls == [({"routing_replay/first_difference_layer_0": 0.5}, 5)]


def test_sinks_are_opened_by_name_each_once(tmp_path):
    writer = Writer()
    names = ("jsonl", "megatron", "jsonl")
    sinks = open_sinks(names, tmp_path, megatron_writers=[writer, None])
    for sink in sinks:
        sink.write(0, {"a": 1.0})
        sink.close()
    assert writer.scalars == [("a", 1.0, 0)]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1


def test_a_sink_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="sink of metrics.*got 'tensorbord'.*'tensorboard'"):
        open_sinks(["tensorbord"], tmp_path)


def test_megatron_without_an_open_writer_is_refused_with_the_fix():
    with pytest.raises(ConfigError, match="no writer of Megatron.*expected --tensorboard-dir"):
        open_sinks(["megatron"], megatron_writers=[None, None])


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
    assert len(names) >= 20 and names - documented_names() == set()


def test_every_metric_name_in_the_sources_is_documented():
    sources = [*(ROOT / "routing_replay").rglob("*.py"), *(ROOT / "recipes").rglob("*.py")]
    emitted = {name for path in sources for name in EMITTED.findall(path.read_text())}
    assert {"routing_replay/coverage", "objective/loss", "eval/reward"} <= emitted
    assert {plain(name) for name in emitted} - documented_names() - ONLY_READ == set()
