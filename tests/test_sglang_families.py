"""The page on model families is that of the installed SGLang, and reads its classes rightly."""

import importlib.metadata
from importlib.util import find_spec
from pathlib import Path

import pytest

from tools import capture_families

pytestmark = pytest.mark.skipif(not find_spec("sglang"), reason="SGLang is not installed")


def test_the_page_is_current():
    sglang = importlib.metadata.distribution("sglang")
    expected = capture_families.page(Path(str(sglang.locate_file(""))), sglang.version)
    page = capture_families.PAGE.read_text(encoding="utf-8")
    if f"SGLang {sglang.version} " not in page:
        pytest.skip(f"the page is of another version than the installed {sglang.version}")
    assert page == expected


def test_routers_are_found_through_base_classes_and_other_files(tmp_path):
    models = tmp_path / "sglang" / "srt" / "models"
    models.mkdir(parents=True)
    (models / "one.py").write_text(
        "class Block:\n  def __init__(self): self.t = TopK(2, layer_id=0, use_grouped_topk=True)\n"
        "class One:\n  def __init__(self): self.b = Block()\n"
        "class Dense:\n  pass\n"
        "EntryClass = [One, Dense]\n"
    )
    (models / "two.py").write_text(
        "import sglang.srt.models.one as one\n"
        "from sglang.srt.models.one import Block as Base\n"
        "class Two(Base): pass\n"
        "class Three:\n  def __init__(self): self.b = one.Block()\n"
        "class Own:\n  def __init__(self): self.t = TopK(2, custom_routing_function=choose)\n"
        "EntryClass = [Two, Three, Own]\n"
    )
    choices = tmp_path / "sglang" / "srt" / "arg_groups" / "model_overrides"
    choices.mkdir(parents=True)
    (choices / "two.py").write_text(
        '@_register_for("Two", "Three")\n'
        'def choose(a): return {"moe_runner_backend": "triton_kernel" if a else "triton"}\n'
    )
    rows = capture_families.page(tmp_path, "1.0").splitlines()[-4:]
    assert rows == [
        "| One | ids, gates, logits | grouped | read |  |",
        "| Own | ids | its own function | read |  |",
        "| Three | ids, gates, logits | grouped | read | triton_kernel |",
        "| Two | ids, gates, logits | grouped | read | triton_kernel |",
    ]


def test_every_family_that_is_said_to_have_been_run_is_in_the_table():
    page = capture_families.PAGE.read_text(encoding="utf-8")
    assert page.count("| run |") == len(capture_families.WERE_RUN)
