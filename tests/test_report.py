"""The report: what it reads, what it says, and how a real browser shows it."""

import html
import json
import math
import re
import shutil
import subprocess
from xml.etree import ElementTree

import pytest

from routing_replay.errors import ConfigError, DataError
from routing_replay.report.charts import Grid, Line, bar_chart, heat_map, line_chart, shared_bounds
from routing_replay.report.findings import diagnose, sentence
from routing_replay.report.page import write_report
from routing_replay.report.picture import write_picture
from routing_replay.report.run import read_run

LAYERS = range(8)
SVG = "{http://www.w3.org/2000/svg}"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
# A profile of its own, and nothing that reaches out on its own account.
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-sync",
    "--disable-background-networking",
    "--disable-component-update",
    "--virtual-time-budget=2000",
]


def healthy_row(step):
    row = {
        "step": step,
        "time_s": 10.0,
        "reward": 0.2 + 0.005 * step,
        "entropy": 1.0 - 0.002 * step,
        "train_infer/kl_k3": 1e-4 * (1.1 + math.sin(step)),
        "train_infer/kl_k3_live": 6e-4 * (1.1 + math.sin(step)),
        "train_infer/extreme_tau2": 1e-5,
        "train_infer/ess": 0.99,
        "staleness/kl_k3": 2e-4,
        "routing_replay/coverage": 1.0,
    }
    for name, value in (
        ("exact_match", 0.97),
        ("overlap", 0.99),
        ("margin", 0.3),
        ("router_kl_bound", 1e-4),
    ):
        row[f"routing_replay/{name}"] = of_layers(value)
    return row


def of_layers(value, **changes):
    """A metric of the layers: `value` in each, but for the changes, `layer_5=0.1`."""
    layers = {str(i): value for i in LAYERS}
    return {"mean": value, "layers": layers | {k[len("layer_") :]: v for k, v in changes.items()}}


def write_run(path, rows, config=None):
    path.mkdir()
    lines = [json.dumps(row) + "\n" for row in rows]
    (path / "metrics.jsonl").write_text("".join(lines))
    (path / "config.json").write_text(json.dumps(config or {"mode": "R3", "parallel": {"tp": 2}}))
    return path


@pytest.fixture
def healthy(tmp_path):
    return write_run(tmp_path / "healthy", [healthy_row(step) for step in range(40)])


def sick(tmp_path, name="sick", **changes):
    return write_run(tmp_path / name, [{**healthy_row(s), **changes} for s in range(40)])


def texts(path):
    return [f"{finding.level}: {sentence(finding)}" for finding in diagnose(read_run(path))]


def test_a_healthy_run_has_no_findings(healthy):
    assert diagnose(read_run(healthy)) == []


def sampled_ahead(row):
    """The row of a step whose responses are one version old, and far from the trained policy."""
    names = [n for n in row if n.startswith(("train_infer/kl", "train_infer/ex"))]
    names += ["routing_replay/exact_match", "routing_replay/overlap"]
    for name in names:
        row[f"{name}_lag_1"] = row.pop(name)
    return row | {"rollout/version_lag": 1.0, "train_infer/kl_k3_lag_1": 0.5}


def test_a_run_sampled_ahead_is_shown_by_its_lag_and_judged_at_lag_0_alone(tmp_path):
    rows = [healthy_row(0), *(sampled_ahead(healthy_row(step)) for step in range(1, 40))]
    run_dir = write_run(tmp_path / "ahead", rows)
    assert diagnose(read_run(run_dir)) == []
    rows[-1]["train_infer/nonfinite_tokens_lag_1"] = 3
    assert texts(write_run(tmp_path / "nan", rows)) == [
        "error: Up to 3 tokens of a step have no finite log-prob."
    ]
    rows[-1]["train_infer/nonfinite_tokens_lag_3"] = 4
    assert texts(write_run(tmp_path / "several", rows)) == [
        "error: Up to 4 tokens of a step have no finite log-prob."
    ]
    write_report([run_dir], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "replayed, lag 1" in page and "live, lag 1" in page
    assert "Tokens whose expert set differs" in page and "Expert slots that differ" in page
    assert "<td>0.5</td>" in page  # of the summary


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {
                "routing_replay/exact_match": of_layers(0.97, layer_5=0.78),
                "routing_replay/margin": of_layers(0.3, layer_5=0.004),
            },
            "warning: Layer 5 differs on 22 % of tokens (the median layer on 3 %); its router's "
            "margin is small (0.004), so rounding decides.",
        ),
        (
            {"routing_replay/exact_match": of_layers(0.97, layer_5=0.78)},
            "warning: Layer 5 differs on 22 % of tokens (the median layer on 3 %); its router's "
            "margin is not small (0.3): compare what flows into this layer.",
        ),
        (
            {
                "routing_replay/exact_match": of_layers(0.97, layer_5=0.78),
                "routing_replay/router_kl_bound": of_layers(1e-4, layer_5=3e-3),
            },
            "warning: Layer 5 differs on 22 % of tokens (the median layer on 3 %); its router "
            "itself differs (router KL, at least 0.003 nats, the median layer 0.0001): compare "
            "this layer's precision and weights.",
        ),
        (
            # 0.2 nats over 40 % of the tokens: 0.5 where they differ. Layer 5 only follows.
            {
                "routing_replay/exact_match": of_layers(0.97, layer_2=0.6, layer_5=0.8),
                "routing_replay/replay_bias": of_layers(0.0, layer_2=0.2),
            },
            "error: Layer 2 differs on 40 % of tokens (the median layer on 3 %); its routes are of "
            "other tokens, of another layer, or number the experts otherwise: `routing-replay "
            "diff` says which.",
        ),
        (
            {"routing_replay/exact_match": of_layers(0.97, layer_2=0.01)},
            "error: Layer 2 differs on 99 % of tokens (the median layer on 3 %); its routes are of "
            "other tokens, of another layer, or number the experts otherwise: `routing-replay "
            "diff` says which.",
        ),
        (
            {"train_infer/kl_k3": 7e-4, "train_infer/kl_k3_live": 8e-4},
            "warning: Replay lowers the KL only 1.1x (k3 0.0008 live, 0.0007 replayed). Most of "
            "the gap is not routing but numerics, staleness or sampling. tools/attribute_kl.py "
            "tells them apart.",
        ),
        (
            {"train_infer/kl_k3": 9e-3, "train_infer/kl_k3_live": 8e-4},
            "error: Replay raises the KL (k3 0.0008 live, 0.009 replayed). The replayed routes are "
            "not the ones that the rollout took.",
        ),
        (
            {"train_infer/kl_k1": 0.03, "train_infer/kl_k3": 1e-3, "train_infer/kl_k3_live": 4e-3},
            "error: The mean of pi / mu is 0.971 instead of 1. The engine's log-probs are of a "
            "truncated distribution (top-p, top-k, min-p) that the trainer does not apply.",
        ),
        (
            {"routing_replay/coverage": 0.0},
            "error: Nothing was replayed: the server or a gateway dropped the routes. Run "
            "`routing-replay doctor --url URL`.",
        ),
        (
            {"train_infer/extreme_tau2": 0.2},
            "error: 20 % of tokens have probabilities a factor 2 apart.",
        ),
        (
            {"train_infer/nonfinite_tokens": 3},
            "error: Up to 3 tokens of a step have no finite log-prob.",
        ),
        (
            {
                "routing_replay/dead_experts": of_layers(0.0, layer_3=0.5),
                "routing_replay/max_load": of_layers(0.05, layer_3=0.39),
            },
            "warning: 50 % of the experts of layer 3 receive no token. The busiest expert of layer "
            "3 takes 39 % of its load.",
        ),
        (
            {
                "routing_replay/dead_experts": of_layers(0.0),
                "routing_replay/max_load": of_layers(0.05, layer_6=0.3),
            },
            "warning: The busiest expert of layer 6 takes 30 % of its load.",
        ),
        (
            {"train_infer/ess": 0.3},
            "warning: The weights of the discrepancy m leave 30 % of the samples effective.",
        ),
    ],
)
def test_a_symptom_is_said_in_words_and_nothing_else_is(tmp_path, changes, expected):
    assert texts(sick(tmp_path, **changes)) == [expected]


def test_an_entropy_collapse_is_said(tmp_path):
    rows = [{**healthy_row(s), "entropy": 1.0 if s < 20 else 0.05} for s in range(40)]
    assert texts(write_run(tmp_path / "run", rows)) == ["warning: The entropy fell from 1 to 0.05."]


def test_a_gradient_norm_far_above_the_others_is_named_by_its_step(tmp_path):
    rows = [healthy_row(s) | {"grad_norm": 9000.0 if s == 1 else 1 + s / 40} for s in range(40)]
    # The lower median of the 40 values: 1 + s / 40 without s = 1; the 20th is that of s = 20.
    assert texts(write_run(tmp_path / "run", rows)) == [
        "warning: The gradient norm of step 1 is 9000, the median 1.5."
    ]


def test_the_load_of_the_ranks_is_drawn_planned_and_natural_where_a_step_was_planned(tmp_path):
    plain = write_report([write_run(tmp_path / "plain", [healthy_row(1)])], tmp_path / "p.html")
    assert "expert-parallel rank" not in plain.read_text()
    loads = {
        "ep_peak_over_mean": of_layers(1.02),
        "ep_peak_over_mean_natural": of_layers(1.3),
        "ep_load_rank_0": of_layers(1.01),
        "ep_load_rank_0_natural": of_layers(1.2),
    }
    row = healthy_row(1) | {f"routing_replay/{name}": value for name, value in loads.items()}
    page = write_report([write_run(tmp_path / "run", [row])], tmp_path / "r.html").read_text()
    for title in (
        "Busiest expert-parallel rank, as planned",
        "Busiest expert-parallel rank, in natural order",
        "Load of expert-parallel rank 0, as planned",
        "Load of expert-parallel rank 0, in natural order",
    ):
        assert title in page
    assert "Load of expert-parallel rank 1" not in page


def test_a_run_without_replay_is_not_blamed_for_it(tmp_path):
    rows = [healthy_row(s) | {"train_infer/kl_k3": 6e-4} for s in range(8)]
    rows = [row | {"train_infer/kl_k3_live": 6e-4} for row in rows]
    path = write_run(tmp_path / "run", rows, {"routing_replay": {"mode": "disabled"}})
    assert texts(path) == []


def test_a_resumed_run_counts_each_step_once_and_a_cut_line_is_left_out(tmp_path):
    path = write_run(tmp_path / "run", [{"step": s, "reward": s} for s in (0, 1, 2, 1, 2, 3)])
    with open(path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "rew')
    run = read_run(path)
    assert run.steps == (0, 1, 2, 3)
    assert run.series["reward"] == [0, 1, 2, 3]
    assert run.notes == (
        "The last line of metrics.jsonl was cut short and is left out.",
        "2 steps were written twice (a resumed run); the later ones count.",
    )


def test_a_broken_line_in_the_middle_is_an_error_that_names_it(tmp_path):
    path = write_run(tmp_path / "run", [{"step": 0}])
    with open(path / "metrics.jsonl", "a") as file:
        file.write('{"reward": 1}\n{"step": 2}\n')
    with pytest.raises(DataError, match=r'integer "step"; got \{"reward": 1\} .*line 2'):
        read_run(path)


def test_the_layers_of_a_metric_are_series_of_their_own(tmp_path):
    cells = ({"0": 0.5, "3": None}, {"0": 0.75, "3": 1.0})
    rows = [{"step": s, "m": {"mean": s, "layers": cell}} for s, cell in enumerate(cells)]
    run = read_run(write_run(tmp_path / "run", [*rows, {"step": 2}]))
    assert run.series["m"] == [0, 1, None]
    assert run.layers == {"m": {0: [0.5, 0.75, None], 3: [None, 1.0, None]}}
    assert run.recent_by_layer("m") == {0: 0.75, 3: 1.0}


def test_a_file_with_one_name_per_layer_is_refused_as_old(tmp_path):
    path = write_run(tmp_path / "run", [{"step": 0, "routing_replay/overlap_layer_3": 0.9}])
    with pytest.raises(
        DataError, match="older version.*one object per metric.*got.*overlap_layer_3"
    ):
        read_run(path)


def test_a_directory_without_metrics_is_refused(tmp_path):
    with pytest.raises(DataError, match="metrics.jsonl .one JSON object per step. cannot be read"):
        write_report([tmp_path], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_values_that_are_not_finite_are_gaps_not_points(tmp_path):
    (tmp_path / "run").mkdir()
    text = '{"step": 0, "x": NaN}\n{"step": 1, "x": 2}\n{"step": 2, "x": null}\n'
    (tmp_path / "run" / "metrics.jsonl").write_text(text)
    run = read_run(tmp_path / "run")
    assert run.series["x"] == [None, 2.0, None]
    assert run.recent("x") == 2.0 and run.recent("y") is None
    assert run.notes == ("The run has no config.json.",)


def test_a_line_is_drawn_where_its_values_are():
    line = Line(label="a", steps=[0, 1, 2, 4], values=[0.0, 1.0, None, 0.5])
    text = line_chart("t", "c", [line])
    # Scale 0..1 (ticks each 0.25), steps 0..4: (0, 100), (25, 0), a gap, and (100, 50).
    assert 'd="M0.00 100.00h0L25.00 0.00M100.00 50.00h0"' in text
    assert line_chart("t", "c", [Line(label="a", steps=[0], values=[None])]) == ""


def test_values_that_span_decades_are_drawn_on_a_logarithmic_scale():
    # A zero norm (no informative group) stands at the bottom; 1 to 9,000 take four decades.
    line = Line(label="a", steps=[0, 1, 2, 3], values=[9000.0, 1.0, 100.0, 0.0])
    text = line_chart("t", "c", [line], "auto")
    assert "L33.33 100.00L66.67 50.00L100.00 100.00" in text and "Logarithmic scale" in text
    assert set(re.findall(r"%\">([\d.]+)<", text)) == {"1", "10", "100", "1000", "10000"}
    narrow = line_chart("t", "c", [Line(label="a", steps=[0, 1], values=[1.0, 3.0])], "auto")
    below = line_chart("t", "c", [Line(label="a", steps=[0, 1], values=[-1.0, 1e4])], "auto")
    assert "Logarithmic" not in narrow + below


def test_ticks_are_told_apart_and_a_constant_zero_stays_at_the_bottom():
    close = line_chart("t", "c", [Line(label="a", steps=[0, 1], values=[0.9998, 0.9999])])
    assert {"0.999800", "0.999825"} <= set(re.findall(r"%\">([\d.]+)<", close))
    zero = line_chart("t", "c", [Line(label="a", steps=[0, 1], values=[0.0, 0.0])])
    assert 'd="M0.00 100.00h0L100.00 100.00"' in zero


def test_evaluations_are_connected_across_the_steps_without_one(tmp_path):
    rows = [{"step": s, **({"eval/reward": s / 8} if s % 4 == 0 else {})} for s in range(9)]
    page = write_report([write_run(tmp_path / "run", rows)], tmp_path / "r.html").read_text()
    assert 'd="M0.00 100.00h0L50.00 50.00L100.00 0.00"' in page


def test_a_long_run_is_averaged_into_few_points():
    line = Line(label="a", steps=range(4000), values=[float(s % 10) for s in range(4000)])
    data = json.loads(re.search(r"json\">(.*)</script>", line_chart("t", "c", [line]))[1])
    assert data["lines"][0]["steps"][:2] == [0, 10]
    assert set(data["lines"][0]["values"]) == {4.5}  # the mean of 0..9


def test_the_pixels_of_a_heat_map_are_the_values(tmp_path):
    import base64
    import struct
    import zlib

    values = [[0.0, 0.5], [1.0, None]]
    bounds = shared_bounds([v for row in values for v in row], is_log=False)
    text = heat_map(
        "t", "c", Grid(label="x", rows=[0, 1], steps=[0, 1], values=values, bounds=bounds)
    )
    png = base64.b64decode(re.search(r"base64,([^\"]+)", text)[1])
    assert struct.unpack(">II", png[16:24]) == (2, 2)
    at = png.index(b"IDAT")
    size = struct.unpack(">I", png[at - 4 : at])[0]
    # Each row starts with filter type 0; 254 is full, 255 is the grey of a missing value.
    assert list(zlib.decompress(png[at + 4 : at + 4 + size])) == [0, 0, 127, 0, 254, 255]


def test_a_picture_has_one_rectangle_for_each_run_of_equal_cells(tmp_path):
    cells = [{"0": 1.0, "2": 0.0}, {"0": 1.0, "2": None}, {"0": 0.5, "2": None}]
    # Step 0, an evaluation, has no layers: the picture starts with step 1.
    rows = [{"step": 0, "eval/reward": 0.5}]
    rows += [
        {"step": s, "routing_replay/exact_match": {"mean": 0.9, "layers": cell}}
        for s, cell in enumerate(cells, 1)
    ]
    path = write_picture(write_run(tmp_path / "run", rows), tmp_path / "map.svg")
    root = ElementTree.parse(path).getroot()
    filled = [rect for rect in root.iter(SVG + "rect") if "x" in rect.attrib][1:-1]
    # Steps across 640 pixels from x = 64. Layer 0 shows 1 - 1.0 = 0 twice, white, then 0.5, half of
    # the hue (214, 69, 28); layer 2 shows 1 - 0 = 1, the full hue, then two missing values.
    assert [(r.get("x"), r.get("width"), r.get("fill")) for r in filled] == [
        ("64.0", "427.0", "#ffffff"),
        ("490.7", "213.6", "#eaa28e"),
        ("64.0", "213.6", "#d6451c"),
        ("277.3", "427.0", "#d5d5d5"),
    ]
    assert {"layer 0", "layer 2", "step 1", "3"} <= {text.text for text in root.iter(SVG + "text")}


def test_a_picture_of_nothing_is_refused(healthy, tmp_path):
    with pytest.raises(
        DataError, match="no values of this metric; expected routing_replay/router_kl"
    ):
        write_picture(healthy, tmp_path / "map.svg", "router_kl")
    with pytest.raises(ConfigError, match="unknown metric with a heat map.*got 'overlapp'"):
        write_picture(healthy, tmp_path / "map.svg", "overlapp")
    assert not (tmp_path / "map.svg").exists()


def test_a_share_that_is_zero_everywhere_looks_empty():
    assert shared_bounds([0.0, None, 0.0], is_log=False) == (0.0, 1e-9)


def test_bars_show_their_intervals():
    text = bar_chart("t", "c", [("layer 3", 2.0, 1.0, 4.0)])
    assert "layer 3" in text and "left:25.00%;width:75.00%" in text  # 1..4 of 0..4


def test_several_runs_are_compared_and_their_differing_settings_come_first(healthy, tmp_path):
    other = write_run(
        tmp_path / "other",
        [healthy_row(s) for s in range(20)],
        {"mode": "R2", "parallel": {"tp": 2}},
    )
    page = write_report([healthy, other], tmp_path / "report.html").read_text()
    assert page.count('class="line series-1"') >= 5
    settings = re.findall(r"<tr><th>(mode|parallel.tp)</th>(.*?)</tr>", page)
    assert [name for name, _ in settings] == ["mode", "parallel.tp"]
    assert "differs" in settings[0][1] and "differs" not in settings[1][1]
    assert "other: nothing stands out." in page


def test_runs_share_the_scale_of_a_map_and_one_without_values_does_not_move_it(tmp_path):
    kl = {"routing_replay/router_kl_bound": {"mean": 1e-3, "layers": {"0": 1e-3, "1": 1e-4}}}
    measured = write_run(tmp_path / "measured", [{"step": 0, **kl}])
    live = write_run(tmp_path / "live", [{"step": 0, "reward": 0.5}])
    page = write_report([measured, live], tmp_path / "report.html").read_text()
    legends = re.findall(
        r'legend"><span>([^<]+)</span><span class="ramp"></span><span>([^<]+)', page
    )
    assert legends == [("0.0001", "0.001")]


def test_attribution_and_receipts_are_shown_where_a_run_has_them(tmp_path):
    path = sick(tmp_path, **{"routing_replay/fallback_fraction": 0.0125})
    part = {"name": "routing", "kl": 5e-4, "interval": [4e-4, 6e-4]}
    layer = {"layer": 3, "leave_out": 1e-4, "leave_out_interval": [0.5e-4, 1.5e-4]}
    (path / "attribution.json").write_text(json.dumps({"parts": [part], "layers": [layer]}))
    page = write_report([path], tmp_path / "report.html").read_text()
    assert "Where the KL comes from" in page and "Cost of each layer&#x27;s routing" in page
    assert "<td>routing_replay/fallback_fraction</td><td>0.0125</td>" in page


def test_the_page_needs_no_network_and_escapes_what_it_shows(tmp_path):
    path = write_run(tmp_path / "run", [healthy_row(0)], {"name": "</script><img src=//evil>"})
    page = write_report([path], tmp_path / "report.html", title="<b>a & b</b>").read_text()
    assert "<img src=//evil>" not in page and html.escape("<b>a & b</b>") in page
    assert not re.search(r"(src|href)=\"(?!data:)", page)
    assert "http" not in page.replace("http-equiv", "")


def in_browser(page, probe, width, dark, folder):
    """Open a copy of the page with a script that leaves its result in the title; return that."""
    copy = folder / "page.html"
    script = f"<script>document.title = JSON.stringify((() => {{ {probe} }})())</script></body>"
    copy.write_text(page.read_text().replace("</body>", script))
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    command = [CHROMIUM, *FLAGS, scheme, f"--user-data-dir={folder / 'profile'}"]
    command += [f"--window-size={width},1000", "--dump-dom", copy.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    return json.loads(html.unescape(re.search("<title>(.*?)</title>", done.stdout)[1]))


PROBE = """
const area = document.querySelector(".area");
const box = area.getBoundingClientRect();
area.dispatchEvent(new PointerEvent("pointermove", {clientX: box.left + box.width / 2}));
return {
  overflow: document.documentElement.scrollWidth - window.innerWidth,
  background: getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number),
  columns: getComputedStyle(document.querySelector(".cards")).gridTemplateColumns.split(" ").length,
  narrowest: Math.min(...[...document.querySelectorAll(".area")].map((a) => a.clientWidth)),
  images: [...document.images].every((image) => image.complete && image.naturalWidth > 0),
  readout: document.querySelector(".readout").textContent,
};
"""


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
@pytest.mark.parametrize(("width", "dark", "columns"), [(500, True, 1), (1280, False, 3)])
def test_a_browser_shows_it_on_a_phone_and_a_desk_dark_and_light(
    healthy, tmp_path, width, dark, columns
):
    # 500 is the least width that headless Chromium opens; the layout has one column below 800.
    page = write_report([healthy], tmp_path / "report.html")
    seen = in_browser(page, PROBE, width, dark, tmp_path)
    assert seen["overflow"] <= 0
    assert (max(seen["background"]) < 64) == dark
    assert seen["columns"] == columns
    assert seen["narrowest"] > 200
    assert seen["images"]
    # The middle of steps 0..39 is 19.5; the first of the two nearest steps is read.
    assert seen["readout"] == "step 19 · healthy: 0.295"
