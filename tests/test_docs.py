"""The documentation site: it builds in strict mode, and its pages hold what they promise."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def build(config: Path, site: Path) -> subprocess.CompletedProcess[str]:
    """Build as `make docs` does, into another folder."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict"]
    return subprocess.run(
        [*command, "--config-file", config, "--site-dir", site],
        cwd=config.parent,
        capture_output=True,
        text=True,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("mkdocs", reason="mkdocs is not installed: make env installs it")
    folder = tmp_path_factory.mktemp("site")
    result = build(ROOT / "mkdocs.yml", folder)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


def test_the_site_holds_every_page_of_docs(site):
    for page in (ROOT / "docs").rglob("*.md"):
        name = page.relative_to(ROOT / "docs").with_suffix("")
        parts = name.parent if name.name in ("index", "README") else name
        assert (site / parts / "index.html").is_file(), name


@pytest.mark.parametrize(
    ("page", "signature"),
    [
        ("routes", r"token_rows.*cu_seqlens"),
        ("megatron", r"attach.*model_chunks"),
        ("rollout", r"RolloutClient"),
        ("errors", r"PreflightError"),
    ],
)
def test_the_api_reference_shows_the_signatures_of_the_source(site, page, signature):
    html = (site / "api" / page / "index.html").read_text()
    text = re.sub(r"<[^>]+>", "", html)
    assert re.search(signature, text, re.DOTALL)


def test_strict_mode_refuses_a_broken_link(tmp_path):
    pytest.importorskip("mkdocs", reason="mkdocs is not installed: make env installs it")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text("[gone](nowhere.md)\n")
    settings = "site_name: x\nvalidation: {links: {not_found: warn}}\n"
    (tmp_path / "mkdocs.yml").write_text(settings)
    result = build(tmp_path / "mkdocs.yml", tmp_path / "site")
    assert result.returncode != 0
    assert "nowhere.md" in result.stderr


def test_the_architecture_page_names_every_folder_and_no_other():
    page = (ROOT / "docs" / "architecture.md").read_text()
    tree = page.split("## The tree")[1].split("\n## ")[0]
    named = set(re.findall(r"^\| `([\w/]+)/` \|", tree, re.MULTILINE))
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py", "patches"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    ).stdout
    if not listed:
        pytest.skip("not a git checkout: the tree of the folder may hold other files")
    folders = {str(Path(name).parent) for name in listed.splitlines()} - {"."}
    # Stubs of packages that SGLang misses on a CPU: data of recipes/serving.
    folders = {folder for folder in folders if "stubs" not in folder}
    assert folders - named <= {"recipes"}
    assert named - folders == set()


@pytest.mark.parametrize("page", ["gpu.md", "gpu_points.md"])
def test_the_evidence_that_the_pages_of_gpus_name_exists(page):
    text = (ROOT / "docs" / page).read_text()
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    names = set(re.findall(r"`(test_\w+)`", text))
    assert names and {name for name in names if f"def {name}(" not in tests} == set()
    files = re.findall(r"`(tests/\w+\.py)`", text)
    files += [name.replace(".", "/") + ".py" for name in re.findall(r"`(tools\.bench\.\w+)`", text)]
    assert [name for name in files if not (ROOT / name).is_file()] == []
