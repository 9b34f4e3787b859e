"""The README: what runs without an engine, and that its commands, times and links are true."""

import re
import subprocess

import pytest
from readme_blocks import BLOCKS, README, ROOT, block, run

COMMANDS = re.findall(r"^\| `make (\S+)` \|.*\| ([^|]+) \|$", README, re.MULTILINE)


def test_every_block_is_run_by_a_test():
    sources = [(ROOT / "tests" / f"test_{name}readme.py").read_text() for name in RUNNERS]
    markers = re.findall(r'block\("([^"]+)"\)', "".join(sources))
    assert sorted(BLOCKS) == sorted(block(marker) for marker in markers)


RUNNERS = ("", "megatron_", "sglang_")


def test_the_block_without_an_engine_prints_what_its_comment_says(capsys):
    run(block("expert_ids_TLK"))
    assert capsys.readouterr().out == "[[0, 1, 2, 3, 4, -1, -1, -1]]\n"


def test_the_readme_names_the_commands():
    assert [name for name, _ in COMMANDS] == ["recipe", "test", "test-frameworks"]


@pytest.mark.parametrize(("name", "time"), COMMANDS)
def test_the_makefile_says_the_same_time(name, time):
    makefile = (ROOT / "Makefile").read_text()
    (help_text,) = re.findall(rf"^{name}: .*## (.+)$", makefile, re.MULTILINE)
    assert help_text.endswith(f"; {time}")


def test_every_file_that_a_page_links_to_exists():
    pages = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")
    for page in pages:
        text = (ROOT / page).read_text()
        targets = re.findall(r"\]\((?!http)([^)#]+)", text)
        assert [target for target in targets if not (ROOT / target).exists()] == [], page


def test_every_module_that_the_readme_runs_exists():
    modules = re.findall(r"python -m ((?:tools|recipes)[\w.]*)", README)
    assert len(modules) >= 2
    for module in modules:
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module


def test_every_make_target_of_the_readme_exists():
    targets = set(re.findall(r"`make ([a-z-]+)", README))
    listed = subprocess.run(
        ["make", "-s", "help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert targets - set(re.findall(r"make ([a-z-]+)", listed)) == set()
