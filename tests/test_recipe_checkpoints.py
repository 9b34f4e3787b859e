"""The recipe's checkpoints: what an interruption leaves behind never looks like a checkpoint."""

import functools
import itertools
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from megatron_worlds import run_world
from safetensors.torch import load_file, save_file
from tiny_models import tiny_qwen3_moe, write_tiny_glm4_moe

from recipes.minirl.job import checkpoints
from recipes.model.optimizer_shards import blocks, parse_key, require_resumable
from recipes.model.parallel import ParallelLayout
from recipes.model.weight_names import Piece
from recipes.model.weight_plan import Parameter
from routing_replay.errors import ConfigError
from routing_replay.megatron.expert_tensors import Shard


class Killed(BaseException):
    """Stands for the process that dies here."""


def folders(tmp_path):
    return sorted(path.name for path in (tmp_path / "checkpoints").iterdir())


def make(tmp_path, *steps):
    for step in steps:
        folder = checkpoints.checkpoint_of_step(tmp_path, step)
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_text("weights")


def test_a_run_killed_while_it_removes_a_checkpoint_keeps_the_others_and_clears_up_later(
    tmp_path, monkeypatch
):
    make(tmp_path, 1, 2)

    def die(*_, **__):
        raise Killed

    with monkeypatch.context() as patched, pytest.raises(Killed):
        # The first call clears what an earlier removal left, the second is the removal.
        calls = iter([lambda *_, **__: None, die])
        patched.setattr(shutil, "rmtree", lambda *a, **k: next(calls)(*a, **k))
        checkpoints._remove(checkpoints.checkpoint_of_step(tmp_path, 1))
    assert folders(tmp_path) == [".step_000001.removed", "step_000002"]
    assert checkpoints.newest(tmp_path) == checkpoints.checkpoint_of_step(tmp_path, 2)

    make(tmp_path, 3)
    checkpoints._remove(checkpoints.checkpoint_of_step(tmp_path, 2))
    assert folders(tmp_path) == ["step_000003"]


LAYOUTS = {
    1: {"one": ParallelLayout()},
    2: {
        "dp2": ParallelLayout(),
        "ep2": ParallelLayout(expert=2),
        "tp2": ParallelLayout(tensor=2),
        "pp2-vpp2": ParallelLayout(pipeline=2, virtual_pipeline=2),
        "pp2-first3": ParallelLayout(pipeline=2, first_stage_layers=3),
    },
    4: {
        "dp4": ParallelLayout(),
        "dp2-pp2": ParallelLayout(pipeline=2),
        "tp2-ep4": ParallelLayout(tensor=2, expert=4, expert_tensor=1),
    },
}
# Megatron has an optimizer class for each: whole or sharded, with main weights or without.
OPTIMIZERS = [(dtype, sharded) for dtype in ("float32", "bfloat16") for sharded in (True, False)]
# Where the layout is another, the two that differ most are enough.
TWO_OPTIMIZERS = [("float32", False), ("bfloat16", True)]
WHOLE = ("one", "dp2")
# Four ranks take a minute of processor time.
CASES = [
    pytest.param(ranks, layout, *optimizer, marks=[pytest.mark.slow] * (ranks > 2))
    for ranks, layouts in LAYOUTS.items()
    for layout in layouts
    for optimizer in (OPTIMIZERS if layout in WHOLE else TWO_OPTIMIZERS)
]
CROSSED = [(layout, *optimizer) for layout in LAYOUTS[2] for optimizer in TWO_OPTIMIZERS]


def cases(ranks):
    """What a world computes: (layout's name, layout, dtype, whether the state is sharded)."""
    names = [case.values[1:] for case in CASES if case.values[0] == ranks]
    return [(name, LAYOUTS[ranks][name], *optimizer) for name, *optimizer in names]


@pytest.fixture(scope="module")
def resumed_world(tmp_path_factory):
    """Folder, batch and results of a world of so many ranks, each started once."""
    generator = torch.Generator().manual_seed(0)
    batch = [[torch.randint(0, 128, (16,), generator=generator) for _ in range(2)]] * 2

    @functools.cache
    def results(ranks):
        out = tmp_path_factory.mktemp(f"ranks{ranks}")
        arguments = tiny_qwen3_moe(), str(out), cases(ranks), batch
        return out, batch, run_world("resume_checks:resume", ranks, *arguments)

    return results


@pytest.mark.parametrize(("ranks", "layout", "dtype", "is_distributed"), CASES)
def test_the_step_after_a_resume_is_the_uninterrupted_one_bit_for_bit(
    resumed_world, ranks, layout, dtype, is_distributed
):
    for result in resumed_world(ranks)[-1]:
        case = result[layout, dtype, is_distributed]
        assert case["loaded"]
        assert case["norms"][0] == case["norms"][1]
        assert case["moved"]
        assert case["resumed"]
        assert case["progress"] == checkpoints.Progress(step=1, prompts_consumed=2)
        # Where experts move, a run that was killed in mid-move resumes from what it had saved.
        assert case["is_newest"]
        if "ep" in layout:
            assert "a move of experts did not finish" in case["killed"]


@pytest.fixture(scope="module")
def crossed_world(resumed_world):
    """Folder of the runs of two ranks, resumed by one rank, and that by two again."""
    out, batch, _ = resumed_world(2)
    crossed = [case for case in cases(2) if case[2:] in TWO_OPTIMIZERS]
    alone = [(name, ParallelLayout(), *optimizer) for name, _, *optimizer in crossed]
    run_world("resume_checks:resume_elsewhere", 1, str(out), alone, batch, ".", "alone")
    run_world("resume_checks:resume_elsewhere", 2, str(out), crossed, batch, "alone", "back")
    return out


@pytest.mark.parametrize(("layout", "dtype", "is_distributed"), CROSSED)
def test_main_weights_and_moments_are_exact_from_two_ranks_to_one_and_back(
    crossed_world, layout, dtype, is_distributed
):
    case = crossed_world / f"{layout}-{dtype}-{is_distributed}"
    weights, states = contents(case)
    kinds = {"exp_avg", "exp_avg_sq"} | ({"param"} if dtype == "bfloat16" else set())
    assert states.keys() == {(kind, name) for kind in kinds for name in weights}
    for resumed in ("alone", "back"):
        resumed_weights, resumed_states = contents(case / resumed)
        assert all(torch.equal(resumed_weights[name], weights[name]) for name in weights)
        assert resumed_states.keys() == states.keys()
        for name, state in states.items():
            assert not state.isnan().any()  # what no rank has saved
            assert torch.equal(resumed_states[name], state), name


@pytest.mark.parametrize("layout", LAYOUTS[2])
def test_the_step_after_a_resume_on_other_ranks_is_the_uninterrupted_one(crossed_world, layout):
    case = crossed_world / f"{layout}-float32-False"
    expected, before = load_weights(case / "after"), contents(case)[0]
    for resumed in ("alone", "back"):
        after = load_weights(case / resumed / "after")
        for name, weight in expected.items():
            torch.testing.assert_close(after[name], weight, atol=1e-6, rtol=1e-5)
    moved = [name for name in before if (before[name] - expected[name]).abs().max() > 1e-4]
    assert len(moved) > len(before) / 2


def load_weights(folder):
    return {n: t for path in folder.glob("*.safetensors") for n, t in load_file(path).items()}


def contents(run_dir):
    """Weights by name, and states by (kind, name), of a run's newest checkpoint; nan: not saved."""
    folder = checkpoints.newest(run_dir)
    weights, states = load_weights(folder), {}
    for path in (folder / "trainer").glob("*.safetensors"):
        for key, values in load_file(path).items():
            kind, block = parse_key(key)
            weight = weights[block.name]
            empty = torch.full(weight.view(len(weight), -1).shape, torch.nan)
            whole = states.setdefault((kind, block.name), empty)
            rows = slice(block.row, block.row + block.height)
            whole[rows, block.column : block.column + block.width] = values
    return weights, states


@pytest.mark.parametrize("width", [1, 3, 8])
def test_ranges_that_cut_rows_become_blocks_that_tile_the_tensors(width):
    # Two pieces, rows 2:5 and 0:4 of two tensors, one below the other: 7 rows of the parameter.
    shapes = {"a": (9, width), "b": (4, width)}
    pieces = [
        Piece(name="a", shape=shapes["a"], axis=0, start=2, stop=5),
        Piece(name="b", shape=shapes["b"], axis=0, start=0, stop=4),
    ]
    check_tiles(pieces, torch.arange(7.0 * width).view(7, width), shapes)


def test_ranges_of_columns_become_blocks_that_tile_the_tensor():
    # Columns 3:7 of ten: a row-parallel weight.
    pieces = [Piece(name="a", shape=(5, 10), axis=1, start=3, stop=7)]
    check_tiles(pieces, torch.arange(20.0).view(5, 4), {"a": (5, 10)})


def check_tiles(pieces, values, shapes):
    """Every pair of cuts of the flattened parameter gives back each value at its place."""
    parameter = Parameter(name="p", stored=values, pieces=pieces, is_own_shard=True, copies=(0,))
    wholes = {name: torch.full(shape, torch.nan) for name, shape in shapes.items()}
    offset = 0
    for piece in pieces:
        part = values[offset : offset + piece.length] if piece.axis == 0 else values
        wholes[piece.name].narrow(piece.axis, piece.start, piece.length).copy_(part)
        offset += piece.length
    for start, stop in itertools.combinations(range(values.numel() + 1), 2):
        found = {name: torch.full(shape, torch.nan) for name, shape in shapes.items()}
        shard = Shard(values_N=values.view(-1)[start:stop], start=start)
        size = 0
        for block, values_HW in blocks(parameter, shard):
            rows = slice(block.row, block.row + block.height)
            found[block.name][rows, block.column : block.column + block.width] = values_HW
            size += values_HW.numel()
        assert size == stop - start
        for name, whole in found.items():
            is_found = ~whole.isnan()
            assert torch.equal(whole[is_found], wholes[name][is_found])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("removed", r"lacks a part of the optimizer's state; expected \d+ values of exp_avg"),
        ("overwritten", r"optimizer state cannot be read.*rank_00000_000\.safetensors"),
        ("type", r"parameters of another type; expected bfloat16; got float32"),
    ],
)
def test_a_state_that_cannot_be_restored_is_one_error(damaged_world, damage, message):
    assert re.search(message, damaged_world[damage])


@pytest.fixture(scope="module")
def damaged_world(resumed_world, tmp_path_factory):
    """By what was done to a checkpoint: the error of its resume."""
    folder = tmp_path_factory.mktemp("damaged")
    for name in ("removed", "overwritten", "type"):
        shutil.copytree(resumed_world(1)[0] / "one-float32-True", folder / name)
    arguments = tiny_qwen3_moe(), str(folder), "rank_00000_000.safetensors"
    return run_world("resume_checks:damaged", 1, *arguments)[0]


def test_routing_biases_stay_float32_in_a_bfloat16_model_and_what_it_publishes(tmp_path):
    source = write_tiny_glm4_moe(tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    # bfloat16 has steps of 1/32 near 5: all eight biases would be 5.0 or 5.03125.
    bias = 5.0 + torch.arange(8) / 256
    names = [name for name in tensors if name.endswith("e_score_correction_bias")]
    assert len(names) == 2  # the first of three layers is dense
    save_file(tensors | {n: bias.clone() for n in names}, source / "model.safetensors")
    run_world("resume_checks:routing_biases", 1, source, str(tmp_path))
    for folder in ("saved", "published"):
        written = load_file(tmp_path / folder / "model.safetensors")
        assert all(torch.equal(written[name], bias) for name in names)
        assert written["model.norm.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("option", ["use_precision_aware_optimizer", "optimizer_cpu_offload"])
def test_an_optimizer_whose_state_cannot_be_restored_is_refused(option):
    with pytest.raises(ConfigError, match=rf"a run with {option} cannot be resumed.*Turn the"):
        require_resumable(SimpleNamespace(**{option: True}))
