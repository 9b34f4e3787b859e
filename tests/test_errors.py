"""The shared foundations: errors, findings, atomic files, the shape of a model."""

import json
import os
import pickle

import pytest

from routing_replay.errors import (
    ConfigError,
    PreflightError,
    RoutesError,
    TableError,
    reading,
    unknown_name,
    writing,
)
from routing_replay.files import atomic_write
from routing_replay.findings import Finding
from routing_replay.routes.shape import MoEShape

SHAPE = MoEShape(layers=(1, 2, 5), num_experts=16, top_k=4)


def test_an_unknown_name_suggests_the_nearest_known_one():
    error = unknown_name("mode", "R33", ("R2", "R3", "disabled"))
    assert str(error) == (
        "unknown mode; expected one of R2, R3, disabled; got 'R33'. Did you mean 'R3'?"
    )


def test_an_unknown_name_that_resembles_nothing_gets_no_suggestion():
    assert unknown_name("mode", "xyz", ("R2", "R3")).fix is None


@pytest.mark.parametrize("content", [None, b"{", b"\xff"])
def test_reading_turns_what_files_raise_into_our_error(tmp_path, content):
    path = tmp_path / "settings.json"
    if content is not None:
        path.write_bytes(content)
    match = "the settings cannot be read; got .*settings.json"
    with pytest.raises(ConfigError, match=match), reading(path, "the settings", ConfigError):
        json.loads(path.read_text(encoding="utf-8"))


def test_reading_lets_our_own_errors_and_bugs_through(tmp_path):
    for error in (TableError("other"), KeyError("bug")):
        with pytest.raises(type(error)), reading(tmp_path, "the file", ConfigError):
            raise error


def test_writing_says_why_a_file_cannot_be_written(tmp_path):
    match = "the table cannot be written; got No such file"
    with pytest.raises(TableError, match=match), writing(tmp_path, "the table", TableError):
        (tmp_path / "missing" / "x").write_text("")


def test_an_atomic_write_replaces_the_file_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")
    with atomic_write(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["a.json"]


def test_a_failed_atomic_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_write(path) as partial:
        partial.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.json"]


def test_a_finding_reads_as_one_line_and_becomes_an_error():
    finding = Finding(
        level="error", name="fusion", what="fusion is on", cause="It bypasses replay", fix="Drop it"
    )
    assert str(finding) == "error   fusion: fusion is on. It bypasses replay. Drop it"
    error = finding.to_error(PreflightError)
    assert isinstance(error, PreflightError)
    assert str(error) == "fusion is on (fusion) [It bypasses replay]. Drop it"


def test_findings_sort_by_how_bad_they_are():
    levels = ["ok", "warning", "error", "note"]
    findings = sorted((Finding(level=x, what="x") for x in levels), key=lambda f: f.rank)
    assert [f.level for f in findings] == ["error", "warning", "note", "ok"]
    with pytest.raises(ConfigError, match="unknown level of a finding"):
        Finding(level="bad", what="x")


def test_errors_cross_processes_whole():
    error = pickle.loads(pickle.dumps(TableError("damaged", got=1, where="a", fix="Copy it")))
    assert str(error) == "damaged; got 1 [a]. Copy it" and isinstance(error, TableError)


def test_a_shape_is_refused_where_it_cannot_be_true():
    for wrong, named in (
        ({"layers": (2, 1)}, "the routed layers are out of order"),
        ({"layers": (-1, 1)}, "the routed layers are out of order"),
        ({"num_experts": 0}, "the number of experts is out of range"),
        ({"num_experts": 32769}, "the number of experts is out of range"),
        ({"top_k": 17}, r"top-k is out of range; expected 1\.\.16; got 17"),
        ({"top_k": 0}, "top-k is out of range"),
    ):
        with pytest.raises(RoutesError, match=named):
            MoEShape(**{"layers": (1, 2, 5), "num_experts": 16, "top_k": 4} | wrong)


def test_shapes_that_differ_name_the_fields_that_do():
    other = MoEShape(layers=(1, 2), num_experts=16, top_k=2)
    with pytest.raises(TableError) as caught:
        SHAPE.require_equal(other, "the server runs another model", TableError, where="here")
    assert str(caught.value) == (
        "the server runs another model: layers and top_k differ; expected 3 routed layers 1-2,5, "
        "16 experts, top-4; got 2 routed layers 1-2, 16 experts, top-2 [here]"
    )
    SHAPE.require_equal(MoEShape(layers=[1, 2, 5], num_experts=16, top_k=4), "never raised")
