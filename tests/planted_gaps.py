"""Batches of real engines that are one known factor apart, scored by `tools.score_arms`.

The rollout engine is a Megatron model that samples and records its routes and combine weights; the
trainer is Megatron, too, under the flags of a case. So the factor is the only difference.
"""

import dataclasses
from contextlib import nullcontext
from pathlib import Path

import torch
from planted_engines import Engine, permute_experts, to_14_bits, to_bfloat16, to_halves
from safetensors.torch import load_file, save_file
from tiny_models import write_tiny_qwen3_moe
from torch.nn.attention import SDPBackend, sdpa_kernel

NUM_HEALTHY, HEALTHY_SEQUENCES = 20, 12
FAULTY_LAYER, LAYERS = 1, (0, 1, 2)
SIZE = ("--microbatch-size", "64")
# Arms that no case needs but its own: what must not be named by mistake.
OTHERS = ("--dispatchers", "allgather", "--attentions", "math")
BFLOAT16 = ("--dtype", "bfloat16")
# A trainer in bfloat16 with all arms that are at hand.
ALL = (*BFLOAT16, "--precisions", "float32", *OTHERS)
# Ranks are a data-parallel pair where a layout names nothing else.
LAYOUTS = {
    "one": (),
    "tp2": ("--tensor-parallel", "2"),
    "ep2": ("--expert-parallel", "2"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One rollout and how it is scored.

    Args:
        rollout: Name of the rollout.
        calls: Flags of `tools.score_arms`, by layout.
        is_ahead: Whether the trainer's weights are one optimizer step ahead of the rollout's.
        has_unfused_attention: Whether the trainer's attention is torch's unfused one, which repeats
            the engine's bitwise in bfloat16 whatever the lengths.
    """

    rollout: str
    calls: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=lambda: {"one": ()})
    is_ahead: bool = False
    has_unfused_attention: bool = False


CASES = {
    "healthy": Case(
        rollout="14 bits",
        calls={
            "one": ("--precisions", "bfloat16", *OTHERS, "--layers"),
            "tp2": ("--layout-arm", "tp2"),
        },
    ),
    "routes": Case(rollout="broken router", calls={"one": ("--layers",)}),
    "routes of all layers": Case(rollout="bfloat16 weights", calls={"one": ("--layers",)}),
    "weights": Case(rollout="sharp weights"),
    "staleness": Case(rollout="float32", is_ahead=True),
    "top-p 0.9": Case(rollout="top-p 0.9"),
    "top-p 0.7": Case(rollout="top-p 0.7"),
    "precision": Case(
        rollout="float32", calls={"one": ALL, "tp2": (*BFLOAT16, "--layout-arm", "tp2")}
    ),
    "order": Case(rollout="allgather", calls={"ep2": ALL}, has_unfused_attention=True),
    "layout": Case(
        rollout="unfused",
        calls={"one": (*BFLOAT16, "--layout-arm", "tp1"), "tp2": ALL},
        has_unfused_attention=True,
    ),
    "kernels": Case(rollout="unfused", calls={"one": ALL}),
    "temperature": Case(rollout="cool"),
    "temperature that is known": Case(rollout="cool", calls={"one": ("--temperature", "0.8")}),
    "experts in another order": Case(rollout="misloaded"),
}


def write_sharp_model(path, **settings):
    """A tiny checkpoint whose logits are those of a trained model."""
    write_tiny_qwen3_moe(path, layers=len(LAYERS), **({"top_k": 4} | settings))
    sharpen(path)
    return path


def sharpen(checkpoint):
    """Larger logits: where they are flat, precision costs a tenth of what it costs otherwise."""
    file = checkpoint / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] *= 5
    save_file(tensors, file, {"format": "pt"})


def write_next_step(checkpoint, path, tokens_ST):
    """The weights after one optimizer step on these tokens."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(tokens_ST, labels=tokens_ST).loss.backward()
    optimizer.step()
    model.save_pretrained(path)
    return path


def score_cases(rank, folder, checkpoint, ahead, names):
    """The folders of some cases get their arms."""
    from megatron_worlds import megatron

    from tools import score_arms

    parser, cases = score_arms.make_parser(), {name: CASES[name] for name in names}
    for layout, layout_flags in LAYOUTS.items():
        flags = parser.parse_args(["", "--checkpoint", checkpoint, *layout_flags])
        with megatron(score_arms.layout_of(flags)):
            for name, make_rollout in rollouts_of(layout, flags).items():
                targets = [case for case in cases if cases[case].rollout == name]
                if targets:
                    save(make_rollout(), rank, [Path(folder, case) for case in targets])
            for name, case in cases.items():
                weights = ("--checkpoint", checkpoint)
                if case.is_ahead:
                    weights = ("--checkpoint", ahead, "--rollout-checkpoint", checkpoint)
                argv = [f"{folder}/{name}", *weights, *SIZE, *layout_flags]
                with unfused_attention() if case.has_unfused_attention else nullcontext():
                    if layout in case.calls:
                        score_arms.Arms(parser.parse_args([*argv, *case.calls[layout]])).run()


def save(rollout, rank, folders):
    """All ranks have sampled the same; rank 0 writes it."""
    for folder in folders if rank == 0 else []:
        rollout.save(folder)
    torch.distributed.barrier()


def unfused_attention():
    """The scope of torch's attention without a fused kernel."""
    return sdpa_kernel(SDPBackend.MATH)


def rollouts_of(layout, flags):
    """A function for each rollout of a layout."""
    from tools.attribute_kl import layout_of, load_model

    def engine(rounded=None, **settings):
        return Engine(load_model(flags, layout_of(flags), **settings)[0], rounded)

    def broken_router():
        broken = engine()
        broken.rounded_router(FAULTY_LAYER, to_halves)
        return broken.sample()

    def sharp_weights():
        sharp = engine()
        sharp.recorders[FAULTY_LAYER].power = 3.0
        return sharp.sample()

    def misloaded():
        other = engine()
        permute_experts(other.chunk, FAULTY_LAYER)
        return other.sample()

    def unfused(**settings):
        with unfused_attention():
            return engine(dtype=torch.bfloat16, **settings).sample()

    if layout == "ep2":
        return {"allgather": lambda: unfused(dispatcher="allgather")}
    if layout == "tp2":
        return {}
    return {
        "float32": lambda: engine().sample(),
        "top-p 0.9": lambda: engine().sample(top_p=0.9, is_silent=True),
        "top-p 0.7": lambda: engine().sample(top_p=0.7, is_silent=True),
        "cool": lambda: engine().sample(temperature=0.8),
        "14 bits": lambda: engine(to_14_bits).sample(NUM_HEALTHY * HEALTHY_SEQUENCES),
        "bfloat16 weights": lambda: engine(to_bfloat16).sample(),
        "broken router": broken_router,
        "sharp weights": sharp_weights,
        "misloaded": misloaded,
        "unfused": unfused,
    }
