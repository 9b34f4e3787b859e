"""recipes.minirl.job.journal: what a run leaves behind."""

import pytest

from recipes.minirl.job import journal
from recipes.minirl.job.journal import Journal, check_telemetry, line, truncate, worst_layers
from recipes.minirl.settings.sections import TelemetrySettings
from routing_replay.errors import ConfigError
from routing_replay.metrics.typed import LayerValues


def write_steps(run_dir, first, last, num_steps=9, resumed_from=None):
    made = Journal(run_dir, first - 1 if resumed_from is None else resumed_from, num_steps)
    for step in range(first, last + 1):
        made.write(step, {"reward": step / 10, "time_s": float(first)})
    made.close()


def test_a_resumed_run_has_every_step_once_and_the_later_one_counts(tmp_path):
    write_steps(tmp_path, 0, 5)
    write_steps(tmp_path, 4, 7)  # the newest checkpoint was that of step 3
    records = journal.read(tmp_path / "metrics.jsonl")
    assert [r["step"] for r in records] == list(range(8))
    assert [r["time_s"] for r in records] == [0.0] * 4 + [4.0] * 4


def test_a_run_that_died_before_its_first_checkpoint_leaves_no_record_behind(tmp_path):
    write_steps(tmp_path, 0, 1)
    write_steps(tmp_path, 0, 2)  # resumed from nothing
    assert [r["step"] for r in journal.read(tmp_path / "metrics.jsonl")] == [0, 1, 2]


def test_a_line_that_a_crash_cut_short_is_dropped(tmp_path):
    write_steps(tmp_path, 0, 2)
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 3, "rew')
    truncate(path, 9)
    assert [r["step"] for r in journal.read(path)] == [0, 1, 2]
    assert path.read_text().endswith("}\n")


def test_values_that_are_not_finite_are_null_in_the_record_and_missing_in_the_line(tmp_path):
    made = Journal(tmp_path, 0, 1)
    values = {"reward": float("nan"), "kl": float("inf"), "entropy": 0.5, "time_s": 2.0}
    made.write(1, values)
    made.close()
    assert journal.read(tmp_path / "metrics.jsonl") == [
        {"step": 1, "reward": None, "kl": None, "entropy": 0.5, "time_s": 2.0}
    ]
    assert line(1, 1, values) == "step   1/1  entropy 0.500  2.0 s"


def test_a_resumed_run_shows_every_step_once_in_tensorboard_too(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write_steps(tmp_path, 0, 5)
    write_steps(tmp_path, 4, 7)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, round(e.value, 6)) for e in events.Scalars("reward")] == [
        (step, step / 10) for step in range(8)
    ]


def test_a_resumed_run_keeps_the_layers_of_its_metrics(tmp_path):
    overlap = LayerValues(mean=0.9, layers={0: 0.8, 3: float("nan")})
    for first in (0, 1):
        made = Journal(tmp_path, first - 1, 2)
        made.write(first, {"routing_replay/overlap": overlap})
        made.close()
    assert [r["routing_replay/overlap"] for r in journal.read(tmp_path / "metrics.jsonl")] == [
        {"mean": 0.9, "layers": {"0": 0.8, "3": None}}
    ] * 2


@pytest.mark.parametrize(
    ("telemetry", "message"),
    [
        (
            TelemetrySettings(sinks=("megatron",)),
            "expected jsonl, tensorboard or wandb in this recipe",
        ),
        (
            TelemetrySettings(metrics_dir="elsewhere"),
            "expected --run-dir; got --routing-replay-metrics",
        ),
    ],
)
def test_sinks_that_the_recipe_does_not_have_are_refused(telemetry, message):
    with pytest.raises(ConfigError, match=message):
        check_telemetry(telemetry)


def test_the_line_of_a_step_shows_reward_entropy_both_kls_and_the_worst_layers():
    metrics = {
        "reward": 0.25,
        "entropy": 0.5,
        "train_infer/kl_k3": 1e-4,
        "train_infer/kl_k3_live": 4e-4,
        "routing_replay/overlap": LayerValues(mean=0.9, layers={0: 0.99, 3: 0.9, 12: 0.95}),
    }
    assert worst_layers(metrics) == [(3, 0.9), (12, 0.95)]
    assert line(2, 30, metrics) == (
        "step   2/30  reward 0.250  entropy 0.500  KL 1.00e-04 (live 4.00e-04)  "
        "lowest overlap: layers 3 (0.900), 12 (0.950)"
    )


def test_the_line_of_a_step_sampled_ahead_shows_its_lag_with_the_kl_of_that_lag():
    values = {
        "rollout/version_lag": 1.0,
        "train_infer/kl_k3_lag_1": 2e-3,
        "train_infer/kl_k3_live_lag_1": 4e-3,
        "routing_replay/overlap_lag_1": LayerValues(mean=0.9, layers={0: 1.0, 3: 0.8}),
    }
    assert line(2, 3, values) == (
        "step   2/3  KL 2.00e-03 (live 4.00e-03) at version lag 1  "
        "lowest overlap: layers 3 (0.800), 0 (1.000)"
    )


def test_the_line_of_a_step_of_several_lags_shows_the_kl_of_the_lag_nearest_to_the_mean():
    values = {"rollout/version_lag": 1.3, "rollout/version_lag_max": 3.0}
    values |= {f"train_infer/kl_k3{s}": n * 1e-3 for n, s in enumerate(("", "_lag_1", "_lag_3"), 1)}
    values["routing_replay/overlap_lag_3"] = LayerValues(mean=0.9, layers={0: 0.75})
    assert line(2, 3, values) == (
        "step   2/3  KL 2.00e-03 at version lag 1  lowest overlap: layers 0 (0.750)"
    )
