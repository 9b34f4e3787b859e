"""Ranks that score a batch with `tools.score_arms`: killed, resumed, refused, disturbed."""

import os
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from megatron_worlds import megatron
from planted_engines import Engine

NUM_KEPT, NUM_PASSES = 3, 8
NOISY_LAYER, NOISE = 1, 0.03
SETTINGS = ("--precisions", "bfloat16", "--attentions", "math")


def score_until_killed(rank, folder, checkpoint):
    """A batch is sampled; the process dies once some of its arms are on the disk."""
    from recipes.model.parallel import ParallelLayout
    from tools.attribute_kl import load_model

    with megatron(layout := ParallelLayout()):
        flags = flags_of(folder, checkpoint)
        Engine(load_model(flags, layout)[0]).sample(32).save(Path(folder))
    threading.Thread(target=kill_after, args=(Path(folder) / "arms",), daemon=True).start()
    score(folder, checkpoint, *SETTINGS, "--again", "1")


def kill_after(arms):
    while len(list(arms.glob("[!.]*"))) < NUM_KEPT:
        time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGKILL)


def resume_and_refuse(rank, folder, checkpoint, others):
    """Times of the arms before and after a second run; refusals; noise; the mean of passes."""
    kept = times_of(folder)
    score(folder, checkpoint, *SETTINGS, "--again", "1")
    after = times_of(folder)
    refusals = {}
    for name, path in others.items():
        batch = shutil.copytree(
            folder, f"{folder}-{name}", ignore=shutil.ignore_patterns("arms", "live_routes*")
        )
        refusals[name] = refusal(batch, path), sorted(times_of(batch))
    os.utime(Path(checkpoint) / "model.safetensors")
    refusals["overwritten"] = refusal(folder, checkpoint), sorted(times_of(folder))
    noisy = shutil.copytree(folder, f"{folder}-noisy", ignore=shutil.ignore_patterns("arms"))
    score(noisy, checkpoint, "--again", str(NUM_PASSES - 1), is_noisy=True)
    return kept, after, refusals, mean_of_passes(checkpoint)


def times_of(batch):
    """When each arm was written."""
    files = Path(batch, "arms").glob("[!.]*")
    return {path.stem.replace("_", " "): path.stat().st_mtime_ns for path in files}


def refusal(batch, checkpoint):
    """What the tool says to the user."""
    from routing_replay.errors import RoutingReplayError

    with pytest.raises(RoutingReplayError) as caught:
        score(batch, checkpoint, *SETTINGS)
    return str(caught.value)


def flags_of(folder, checkpoint, *flags):
    from tools import score_arms

    argv = [str(folder), "--checkpoint", str(checkpoint), *flags]
    return score_arms.make_parser().parse_args(argv)


def score(folder, checkpoint, *flags, is_noisy=False):
    """One call of the tool, but for its process."""
    from tools import score_arms

    class NoisyArms(score_arms.Arms):
        def scorer(self, **changes):
            scorer = super().scorer(**changes)
            disturb(scorer.chunks[0])
            return scorer

    parsed = flags_of(folder, checkpoint, *flags)
    with megatron(score_arms.layout_of(parsed)):
        (NoisyArms if is_noisy else score_arms.Arms)(parsed).run()


def disturb(chunk):
    """A layer's experts do not repeat themselves, as kernels do not that add in any order."""
    generator = torch.Generator().manual_seed(0)

    def noisy(module, arguments, output):
        hidden, bias = output
        noise = torch.randn(hidden.shape, generator=generator)
        return hidden * (1 + NOISE * noise), bias

    modules = dict(chunk.named_modules())
    (name,) = (name for name in modules if name.endswith(f"layers.{NOISY_LAYER}.mlp"))
    modules[name].register_forward_hook(noisy)


def mean_of_passes(checkpoint):
    """Mean square error of pi_old's log-probs, of one noisy pass and of the mean of several."""
    from test_recipe_policy import make_policy, make_step

    from recipes.minirl.policy.old_pass import averaged, score_old
    from recipes.model import parallel

    policy = make_policy(checkpoint, logprob_passes=NUM_PASSES, nproc=1)
    batch, table = make_step(policy.model_config.num_layers)

    def logp(scores):
        return torch.cat([scores[key].logp_T for key in sorted(scores)])

    exact_T = logp(score_old(policy, batch, table).scores)
    disturb(policy.chunks[0])
    errors = []
    for _ in range(8):
        old = score_old(policy, batch, table)
        mean = averaged(policy, batch, old)
        errors.append([float((logp(o.scores) - exact_T).square().mean()) for o in (old, mean)])
    parallel.destroy(keep_world=True)
    return torch.tensor(errors).mean(0).tolist()
