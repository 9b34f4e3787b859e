"""NeMo-RL's own replay and ours, in NeMo-RL's own batching, passes, loss and log-probs.

It is on no package index: ROUTING_REPLAY_NEMO_RL names a checkout.
"""

import checkouts
import pytest
import torch
from megatron_worlds import run_world, selected
from tiny_models import write_tiny_qwen3_moe

LENGTHS = (17, 30, 9, 23, 12, 40)
# (layer, token)s that were fed: 131 tokens, 6 of them the last ones; one has no route.
ROUTED = 4 * (131 - 6)
WITHOUT_ROUTE = 4
LAYOUTS = {
    "alone": {},
    "pipeline": {"pipeline": 2},
    "context": {"context": 2},
    "tensor": {"tensor": 2},
}

# No attention of a CPU takes NeMo-RL's mask of padded batches under context parallelism.
BATCHES = [
    (layout, batch)
    for layout in LAYOUTS
    for batch in ("packed", "padded")
    if (layout, batch) != ("context", "padded")
]


@pytest.fixture(scope="module")
def passes(request, tmp_path_factory):
    """Every pass of the layouts that are asked for, by name: one result of each rank."""
    checkouts.checkout_of("nemo_rl")
    checkpoint = str(tmp_path_factory.mktemp("checkpoint"))
    write_tiny_qwen3_moe(checkpoint, vocab=256)
    results = {"alone": run_world("nemo_step:run", 1, checkpoint, [{}])[0]}
    names = [name for name in selected(request, "layout") if name != "alone"]
    if names:
        ranks = run_world("nemo_step:run", 2, checkpoint, [LAYOUTS[name] for name in names])
        results |= {name: [rank[i] for rank in ranks] for i, name in enumerate(names)}
    return results


def counts(ranks, name, field):
    return sum(rank["seen"][name][field] for rank in ranks if name in rank["seen"])


def largest_difference(own, ours, name):
    """Of the log-probs of real tokens: padding takes other experts, and nobody reads it."""
    outputs = [torch.cat(passes[name]["outputs"] or [torch.zeros(0, 1)]) for passes in (own, ours)]
    difference = (outputs[0] - outputs[1]).abs()
    lengths = own[name]["lengths"][: len(difference), None]
    is_real = torch.arange(difference.shape[1]) < lengths
    return float((difference * is_real).max()) if difference.numel() else 0.0


@pytest.mark.parametrize(("layout", "batch"), BATCHES)
def test_the_log_probs_and_gradients_are_those_of_its_own_replay(passes, layout, batch):
    for rank in passes[layout]:
        own, ours = rank["own"], rank["ours"]
        assert largest_difference(own, ours, f"{batch} logprobs") < 1e-5
        gradients = zip(
            own[f"{batch} train"]["gradient"], ours[f"{batch} train"]["gradient"], strict=True
        )
        for a, b in gradients:
            assert (a is None) == (b is None)
            assert a is None or float((a - b).abs().max()) < 1e-5


@pytest.mark.parametrize(("layout", "batch"), BATCHES)
def test_every_router_dispatched_its_rows_and_the_reference_stayed_live(passes, layout, batch):
    ranks = passes[layout]
    for kind in ("logprobs", "train"):
        name = f"ours {batch} {kind}"
        assert counts(ranks, name, "rows") == ROUTED
        assert counts(ranks, name, "wrong") <= WITHOUT_ROUTE
    assert counts(ranks, f"ours {batch} reference", "wrong") > ROUTED / 2


def test_metrics_arrive_among_those_of_the_last_microbatch(passes):
    (rank,) = passes["alone"]
    outputs = rank["ours"]["packed train"]["outputs"]
    named = [name for name in outputs[-1] if name.startswith("routing_replay/")]
    assert "routing_replay/coverage" in named and "routing_replay/overlap_layer_3" in named
    assert not any(name.startswith("routing_replay/") for out in outputs[:-1] for name in out)
