"""docs/failures.md names a test for every failure; the tests exist, and no failure is missing."""

import re
from pathlib import Path

TESTS = Path(__file__).parent
DOCS = TESTS.parent / "docs"
FAILURES = (DOCS / "failures.md").read_text()
OTHERS = [DOCS / "replay.md", DOCS / "gpu.md", *(DOCS / "adopt").glob("*.md")]
PAGES = FAILURES + "".join(page.read_text() for page in OTHERS)
DEFINED = {
    name
    for path in [*TESTS.glob("*.py"), *TESTS.glob("frameworks/*.py")]
    for name in re.findall(r"^ *(?:def|class) (\w+)", path.read_text(), re.MULTILINE)
}


def failure_rows():
    rows = [line.strip("|").split("|") for line in FAILURES.splitlines() if line.startswith("| ")]
    return [row for row in rows[2:] if not row[0].strip().startswith("**")]


def test_every_failure_has_a_report_an_answer_and_a_test():
    rows = failure_rows()
    assert len(rows) >= 40  # the surveys list about forty that can happen on this side
    assert [row[0] for row in rows if len(row) != 4 or not all(cell.strip() for cell in row)] == []


def test_every_test_that_the_page_names_exists():
    cells = " ".join(row[3] for row in failure_rows())
    named = set(re.findall(r"`(\w+)`", cells)) | set(re.findall(r"`(test_\w+)`", PAGES))
    assert len(named) > 50
    assert named - DEFINED == set()


def test_every_provoked_failure_stands_on_the_page():
    source = (TESTS / "replay_failures.py").read_text()
    provoked = set(re.findall(r"@failure\ndef (\w+)", source))
    assert len(provoked) > 30
    assert provoked - set(re.findall(r"`(\w+)`", PAGES)) == set()
