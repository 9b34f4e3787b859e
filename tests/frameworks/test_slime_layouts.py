"""Row numbers through slime's and miles' own get_batch land where their tokens do."""

import importlib
import sys
from types import SimpleNamespace

import pytest
import stand_ins
import torch
from checkouts import MISSING, checkout_of

stand_ins.prepare(*MISSING["miles"])

from megatron.core import parallel_state  # noqa: E402

from routing_replay.adapters import slime  # noqa: E402
from routing_replay.adapters.batch import StepBatch  # noqa: E402

LENGTHS = (17, 30, 9, 23)
MICROBATCHES = [[2, 0], [1, 3]]


def tokens_of(lengths):
    return list(torch.arange(1, 1 + sum(lengths)).split(list(lengths)))


def data_module(package, monkeypatch):
    monkeypatch.syspath_prepend(checkout_of(package))
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    folder = "megatron_utils" if package == "slime" else "training_utils"
    return importlib.import_module(f"{package}.backends.{folder}.data")


def use_layout(package, data, monkeypatch, rank, size):
    """One rank of a context-parallel group, without processes."""
    values = {
        "get_tensor_model_parallel_world_size": 1,
        "get_context_parallel_world_size": size,
        "get_context_parallel_rank": rank,
    }
    for name, value in values.items():
        monkeypatch.setattr(parallel_state, name, lambda value=value: value)
    if package == "miles":
        state = SimpleNamespace(
            tp=SimpleNamespace(size=1, rank=0), cp=SimpleNamespace(size=size, rank=rank)
        )
        modules = [m for n, m in sys.modules.items() if n.startswith("miles.backends.training_")]
        for module in modules:
            if hasattr(module, "get_parallel_state"):
                monkeypatch.setattr(module, "get_parallel_state", lambda: state)
    else:
        accelerator = importlib.import_module("slime.utils.accelerator")
        monkeypatch.setattr(accelerator, "device", lambda *_: torch.device("cpu"))
        monkeypatch.setattr(accelerator, "current_device", lambda *_: torch.device("cpu"))


def rollout_of(tokens):
    responses = [len(t) - 4 for t in tokens]
    return {
        "tokens": tokens,
        "total_lengths": [len(t) for t in tokens],
        "response_lengths": responses,
        "loss_masks": [torch.ones(n, dtype=torch.int) for n in responses],
        "max_seq_lens": [32] * len(tokens),
    }


CASES = [
    ("slime", 1, {"allgather_cp": False}),
    ("slime", 2, {"allgather_cp": False}),
    ("slime", 2, {"allgather_cp": True}),
    ("miles", 1, {"qkv_format": "thd", "allgather_cp": False}),
    ("miles", 2, {"qkv_format": "thd", "allgather_cp": False}),
    ("miles", 2, {"qkv_format": "thd", "allgather_cp": True}),
    ("miles", 1, {"qkv_format": "bshd", "allgather_cp": False}),
    ("miles", 2, {"qkv_format": "bshd", "allgather_cp": False}),
    ("miles", 2, {"qkv_format": "bshd", "allgather_cp": True}),
]


@pytest.mark.parametrize(("package", "size", "layout"), CASES)
def test_every_token_gets_its_own_row(monkeypatch, package, size, layout):
    data = data_module(package, monkeypatch)
    tokens = tokens_of(LENGTHS)
    numbers = StepBatch(tokens).numbers()
    row_of = torch.zeros(1 + sum(LENGTHS), dtype=torch.int64)
    row_of[torch.cat(tokens)] = torch.cat(numbers)
    found = []
    for rank in range(size):
        use_layout(package, data, monkeypatch, rank, size)
        trainer = object.__new__(slime._Trainer)
        trainer._args = SimpleNamespace(data_pad_size_multiplier=8, **layout)
        trainer._get_batch = data.get_batch
        iterator = data.DataIterator(rollout_of(tokens), micro_batch_indices=MICROBATCHES)
        for _ in MICROBATCHES:
            rows = trainer._lay_out(iterator, numbers)
            stock = data.get_batch(iterator, slime.LAYOUT_KEYS, 8, **layout)["tokens"]
            assert torch.equal(rows, row_of[stock])
            found += rows[rows > 0].tolist()
    # Every row is on exactly one rank.
    assert sorted(found) == list(range(1, 1 + sum(LENGTHS) - len(LENGTHS)))
