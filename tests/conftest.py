"""Lanes: a test's file name says which engines it needs, and nothing is loaded for other lanes.

test_megatron_*     megatron-core, on the CPU
test_sglang_*       SGLang, on the CPU
test_recipe_*       both
test_gpu_*, gpu/     a CUDA device
frameworks/          the environment of `make test-frameworks`; collected only if named
any other name      neither engine: the core lane, `make test-fast`
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from sglang_checks import Reference
    from sglang_servers import RunningServer

NEEDS = {"recipe": "both", "sglang": "sglang", "megatron": "megatron", "gpu": "gpu"}
ENGINES = {"megatron", "sglang"}


def need_of(path: Path) -> str:
    """Return the lane of a test file: "core", "megatron", "sglang", "both", "gpu", "frameworks"."""
    if path.parent.name in ("gpu", "frameworks"):
        return path.parent.name
    return NEEDS.get(path.stem.split("_")[1], "core")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--lane",
        choices=["core"],
        help="core: collect only the files that need no engine; a test that imports one fails",
    )


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Skip the files of other lanes before they are imported."""
    is_test = collection_path.name.startswith("test_") and collection_path.is_file()
    if config.getoption("lane") and is_test and need_of(collection_path) != "core":
        return True
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark each test with its need; sort the slow lanes first, so that workers end together."""
    lanes = [*NEEDS.values(), "frameworks", "core"]
    items.sort(key=lambda item: lanes.index(need_of(item.path)))
    for item in items:
        item.add_marker(need_of(item.path))


@pytest.fixture(autouse=True)
def no_engine_in_the_core_lane(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail the first test after whose run an engine is imported in this process."""
    yield
    if request.config.getoption("lane"):
        loaded = sorted(ENGINES & sys.modules.keys())
        assert not loaded, f"the core lane imports no engine: expected none, got {loaded}"


# One server for the session: it costs many seconds to start. Its module is loaded on first use.
@pytest.fixture(scope="session")
def sglang_server() -> Iterator[RunningServer]:
    from sglang_servers import running

    with running("logits", "--enable-mixed-chunk") as server:
        yield server


@pytest.fixture
def server(sglang_server: RunningServer) -> RunningServer:
    """Return the shared server with the weights and the cache that it had at the start."""
    sglang_server.restore()
    return sglang_server


@pytest.fixture(scope="module")
def references(sglang_server: RunningServer) -> list[Reference]:
    """Return each checkpoint as transformers runs it."""
    from sglang_checks import Reference

    return [Reference(path) for path in sglang_server.checkpoints]
