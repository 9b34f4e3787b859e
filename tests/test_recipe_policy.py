"""recipes.minirl on real Megatron: a step is the same step under every layout, and can be saved."""

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron_worlds import run_world, selected
from tiny_models import tiny_qwen3_moe

LAYERS, EXPERTS, TOP_K = 2, 8, 2  # a step of four layers takes twice the time
LAYOUTS = {
    "tp2": {"tensor_parallel": 2},
    "pp2": {"pipeline_parallel": 2},
    "dp2": {},
    "ep2": {"expert_parallel": 2},
    "cp2": {"context_parallel": 2},
    # Packed: the longest sequence has 9 positions, so that two or three share a microbatch.
    "packed_tp2": {"tensor_parallel": 2, "microbatch_tokens": 16},
    "packed_pp2": {"pipeline_parallel": 2, "microbatch_tokens": 16},
    "packed_dp2": {"microbatch_tokens": 16},
    "packed_ep2": {"expert_parallel": 2, "microbatch_tokens": 16},
    "packed_cp2": {"context_parallel": 2, "microbatch_tokens": 24},
    # Experts and sequences change their rank; every scope compares what the experts get.
    "planned_ep2": {"expert_parallel": 2, "plan": "both", "placement_move_tokens": 0},
    "planned_packed_ep2": {
        "expert_parallel": 2,
        "microbatch_tokens": 16,
        "plan": "both",
        "placement_move_tokens": 0,
    },
}
# In the long matrix only.
LONG = ("packed_tp2", "packed_ep2")
# Objectives that look at the whole step, at routers, at a reference or at mu's likely tokens; the
# fractions choose some of the few tokens here.
SOME_COV = ["fraction=0.3", "cov_low=-1", "beta=1"]
WHOLE_STEP = {
    "rspo": ("R3", {"objective": "rspo"}),
    "rspo_R2": ("R2", {"objective": "rspo"}),
    "rspo_live": ("disabled", {"objective": "rspo"}),
    "m2po": ("R3", {"objective": "m2po", "objective_parameters": "threshold=0.5"}),
    "clip_cov": ("R3", {"objective": "clip_cov", "objective_parameters": SOME_COV[:2]}),
    "kl_cov": (
        "R3",
        {
            "objective": "kl_cov",
            "objective_parameters": [SOME_COV[0], SOME_COV[2], "kl_coefficient=0.1"],
        },
    ),
    "shaped": (
        "R3",
        {"reward_kl_coefficient": 0.1, "smoothing_correct": 0.2, "smoothing_wrong": 0.1},
    ),
    "dppo_topk": ("R3", {"objective": "dppo_topk", "objective_parameters": "delta=0.05"}),
}
WHOLE_STEP_ON = [
    *(("rspo", layout) for layout in ("tp2", "pp2", "cp2")),
    *(("rspo_R2", "pp2"), ("rspo_live", "dp2"), ("m2po", "cp2"), ("m2po", "dp2")),
    *(("clip_cov", "dp2"), ("clip_cov", "cp2"), ("kl_cov", "pp2"), ("kl_cov", "dp2")),
    ("dppo_topk", "tp2"),
    *(("shaped", layout) for layout in ("dp2", "cp2", "pp2")),
]
# With an epsilon far above every gradient Adam is gradient descent. With the usual one a gradient
# of nearly zero that turns its sign, as float32 sums in another order do, would move a weight by
# twice the learning rate.
ADAM = ["--learning-rate", "1", "--adam-eps", "10"]
# A sum of some hundred float32 products, in another order.
ATOL = 1e-6


def make_policy(checkpoint, mode="R3", **settings):
    from recipes.minirl.policy.policy import Policy
    from recipes.minirl.settings.command_line import parse

    flags = ["--routing-replay-mode", mode, *ADAM]
    flags += ["--prompts-per-step", "4", "--samples-per-prompt", "2", "--minibatch-size", "4"]
    flags += ["--microbatch-size", "2", "--nproc", os.environ.get("WORLD_SIZE", "2")]
    for name, value in settings.items():
        values = value if isinstance(value, list) else [value]
        flags += ["--" + name.replace("_", "-"), *map(str, values)]
    return Policy(parse(flags), Path(checkpoint))


def make_step(num_layers=LAYERS):
    """Eight sequences of different lengths with random routes of the model's shape."""
    from recipes.minirl.rollout.batch import Batch, Sample
    from routing_replay.routes.routes import Routes
    from routing_replay.routes.table import RouteTable

    rng = np.random.default_rng(0)
    samples, routes = [], []
    for _ in range(8):
        prompt = rng.integers(0, 128, rng.integers(2, 6))
        response = rng.integers(0, 128, rng.integers(1, 6))
        samples.append(
            Sample(
                prompt_ids=tuple(prompt.tolist()),
                response_ids=tuple(response.tolist()),
                logp_mu=tuple((-3 - rng.random(len(response))).tolist()),
                reward=float(rng.random() < 0.5),
                **likely_tokens(rng, response),
            )
        )
        num_rows = len(prompt) + len(response) - 1
        ids_TLE = rng.permuted(np.tile(np.arange(EXPERTS), (num_rows, num_layers, 1)), axis=-1)
        routes.append(
            Routes(
                expert_ids_TLK=np.ascontiguousarray(ids_TLE[..., :TOP_K].astype(np.uint8)),
                layers=tuple(range(num_layers)),
                num_experts=EXPERTS,
            )
        )
    batch = Batch.from_samples(samples, 2)
    advantages_S = torch.tensor([1.0, -1.0, 0.5, -0.5, 0.0, 1.0, -0.25, 2.0])
    batch = dataclasses.replace(batch, advantages_S=advantages_S)
    return batch, RouteTable.from_routes(routes)


def likely_tokens(rng, response):
    """Two tokens of probability 0.2 and 0.1 at each position, and a support of eight and more."""
    ids = np.stack([rng.permutation(128)[:2] for _ in response])
    logp = np.log(np.tile([0.2, 0.1], (len(response), 1)))
    support = [sorted({*rng.permutation(128)[:8].tolist(), int(y)}) for y in response]
    return {"top_ids": ids, "top_logp_mu": logp, "support": support}


def take_step(policy, folder):
    """The old pass and both updates; the metrics over all ranks."""
    from recipes.minirl.policy.old_pass import replaying, score_old
    from recipes.minirl.policy.policy import FixedScores
    from recipes.minirl.policy.shaping import with_advantages
    from recipes.minirl.policy.step_choices import choose
    from routing_replay.metrics.typed import merge, to_floats

    batch, table = make_step(policy.model_config.num_layers)
    table = table if policy.config.replay.mode == "R3" else None
    if policy.config.training.plan != "none":
        policy.follow(policy.plan(batch, table))
        assert policy.placed.num_moved > 0
    old = score_old(policy, batch, table)
    live = policy.score(batch, None)
    metrics = policy.reduce(policy.discrepancy(batch, old.scores))
    reference = policy.score_reference(batch) if policy.reference else None
    if policy.config.objective.reward_kl_coefficient:
        batch, shaping = with_advantages(policy, batch, old.scores, reference)
        metrics |= policy.reduce(shaping)
    updates = {}
    for number in range(2):
        updates = merge(updates, policy.live_ratios(batch, live, number))
        chosen = choose(policy, batch, old.table, old.scores, number, (0, 1, number))
        fixed = FixedScores(old=old.scores, reference=reference, chosen=chosen)
        with replaying(policy, old.table, policy.planned_counts(number)):
            objective = policy.config.make_objective()
            updates = merge(updates, policy.update(batch, old.table, fixed, objective, number))
    return to_floats(metrics | policy.reduce(updates))


def weights_of(policy):
    from recipes.model.weights import named_hf_tensors

    return {n: t.clone() for n, t in named_hf_tensors(policy.chunks) if t is not None}


@dataclasses.dataclass
class Outcome:
    metrics: dict
    weights: dict


def steps_of_layouts(rank, checkpoint, folder, layouts):
    from recipes.model import parallel

    outcomes = {}
    for name, (mode, settings) in layouts.items():
        policy = make_policy(checkpoint, mode, nproc=torch.distributed.get_world_size(), **settings)
        place = Path(folder) / name
        place.mkdir(exist_ok=True)
        metrics = take_step(policy, place)
        outcomes[name] = Outcome(metrics, weights_of(policy))
        policy.replay.remove()
        parallel.destroy(keep_world=True)
    return outcomes


@pytest.fixture(scope="module")
def checkpoint():
    return str(tiny_qwen3_moe(layers=LAYERS, experts=EXPERTS, top_k=TOP_K))


def on_two_ranks(rank, checkpoint, folder, layouts):
    steps = steps_of_layouts(rank, checkpoint, folder, layouts)
    return steps, save_and_resume(rank, checkpoint, folder)


@pytest.fixture(scope="module")
def worlds(request, checkpoint, tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("steps"))
    single = {f"single_{mode}": (mode, {}) for mode in ("R3", "R2", "disabled")} | WHOLE_STEP
    for mode in ("R3", "R2"):
        single[f"packed_{mode}"] = (mode, {"microbatch_tokens": 16})
    for name in ("rspo", "dppo_topk", "kl_cov", "shaped"):
        mode, settings = WHOLE_STEP[name]
        single[f"packed_{name}"] = (mode, settings | {"microbatch_tokens": 16})
    double = {layout: ("R3", LAYOUTS[layout]) for layout in selected(request, "layout")}
    double["pp2_R2"] = ("R2", {"pipeline_parallel": 2})
    for name, layout in selected(request, "choice"):
        mode, settings = WHOLE_STEP[name]
        double[f"{name}_{layout}"] = (mode, settings | LAYOUTS[layout])
    (alone,) = run_world(steps_of_layouts, 1, checkpoint, folder, single)
    # One world of two ranks for everything: starting one costs more than any test here.
    together = run_world(on_two_ranks, 2, checkpoint, folder, double)
    steps, resumptions = zip(*together, strict=True)
    return alone | steps[0], folder, resumptions


@pytest.fixture(scope="module")
def outcomes(worlds):
    return worlds[0]


@pytest.fixture(scope="module")
def resumption(worlds):
    return Path(worlds[1]), worlds[2]


def assert_same_step(outcome, reference):
    assert outcome.weights.keys() == reference.weights.keys()
    for name, weight in reference.weights.items():
        torch.testing.assert_close(
            outcome.weights[name], weight, atol=ATOL, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
    for name in (
        "grad_norm",
        "train_infer/kl_k3",
        "entropy",
        "staleness/kl_k3",
        "objective/clip_fraction",
    ):
        assert outcome.metrics[name] == pytest.approx(reference.metrics[name], rel=1e-4, abs=1e-9)
    shaping = [name for name in reference.metrics if name.startswith("reward/")]
    for name in shaping:
        assert outcome.metrics[name] == pytest.approx(reference.metrics[name], rel=1e-4)


@pytest.mark.parametrize(
    "layout",
    [pytest.param(name, marks=pytest.mark.slow if name in LONG else ()) for name in LAYOUTS],
)
def test_two_ranks_take_the_step_of_one(outcomes, layout):
    assert_same_step(outcomes[layout], outcomes["single_R3"])


@pytest.mark.slow
def test_virtual_stages_take_the_step_of_one_rank(tmp_path):
    checkpoint = str(tiny_qwen3_moe(layers=4, experts=EXPERTS, top_k=TOP_K))  # one for each stage
    layout = {"pipeline_parallel": 2, "virtual_pipeline": 2}
    (alone,) = run_world(steps_of_layouts, 1, checkpoint, str(tmp_path), {"one": ("R3", {})})
    ranks = run_world(steps_of_layouts, 2, checkpoint, str(tmp_path), {"vp2": ("R3", layout)})
    assert_same_step(ranks[0]["vp2"], alone["one"])


@pytest.mark.parametrize("name", ["rspo", "dppo_topk", "kl_cov", "shaped", "R3", "R2"])
def test_a_step_of_packed_sequences_is_that_of_padded_ones(outcomes, name):
    padded = outcomes[f"single_{name}" if name in ("R2", "R3") else name]
    assert_same_step(outcomes[f"packed_{name}"], padded)


@pytest.mark.parametrize("choice", WHOLE_STEP_ON, ids="-".join)
def test_choices_over_the_whole_step_are_those_of_one_rank(outcomes, choice):
    name, layout = choice
    assert_same_step(outcomes[f"{name}_{layout}"], outcomes[name])


def test_choices_over_the_whole_step_drop_some_tokens(outcomes):
    for name in ("m2po", "clip_cov", "dppo_topk"):
        assert 0.02 < outcomes[name].metrics["objective/clip_fraction"] < 0.9, name
    assert outcomes["kl_cov"].metrics["objective/kl_ref"] > 0
    assert outcomes["shaped"].metrics["reward/kl_penalty"] != 0
    assert outcomes["shaped"].metrics["reward/smoothing"] != 0


def test_recording_and_replaying_works_over_pipeline_stages(outcomes):
    assert_same_step(outcomes["pp2_R2"], outcomes["single_R2"])


def test_random_routes_change_the_scores_and_recorded_ones_do_not(outcomes):
    r3, r2, live = (outcomes[f"single_{mode}"].metrics for mode in ("R3", "R2", "disabled"))
    # Without replay the live ratios are the ratios.
    for name in ("kl_k3", "chi2", "perplexity_ratio", "logp_abs_diff_max"):
        for prefix in ("staleness", "off_policy"):
            assert live[f"{prefix}/{name}_live"] == pytest.approx(live[f"{prefix}/{name}"])
    # R2's old pass routes live, as that of the disabled mode; R3 was given random experts.
    assert r2["train_infer/kl_k3"] == live["train_infer/kl_k3"]
    assert r3["train_infer/kl_k3"] != pytest.approx(live["train_infer/kl_k3"], rel=1e-3)


def scores_in_bf16(rank, checkpoint):
    """Log-probs of a bf16 policy, those from an fp32 copy of the logits, and the logits' dtypes."""
    from recipes.minirl.policy import scoring as module

    policy = make_policy(checkpoint, "disabled", nproc=1, trainer_dtype="bfloat16")
    dtypes, token_logprobs = [], module.token_logprobs

    def watch(logits_TV, *args, **kwargs):
        dtypes.append(logits_TV.dtype)
        return token_logprobs(logits_TV, *args, **kwargs)

    module.token_logprobs = watch
    batch, _ = make_step()
    ours = policy.dense(policy.score(batch, None, 0), batch)
    policy._forward_options = lambda m: {}
    from_fp32_copy = policy.dense(policy.score(batch, None, 0), batch)
    return ours, from_fp32_copy, dtypes


def test_logits_of_a_bf16_policy_are_not_copied_to_fp32_as_a_whole(checkpoint):
    ((ours, from_fp32_copy, dtypes),) = run_world(scores_in_bf16, 1, checkpoint)
    assert dtypes == [torch.bfloat16] * 2 + [torch.float32] * 2
    assert torch.equal(ours, from_fp32_copy)


def test_the_updates_moved_the_policy(outcomes):
    metrics = outcomes["single_R3"].metrics
    assert metrics["staleness/logp_abs_diff_max"] > 1e-3
    assert metrics["grad_norm"] > 0


def save_and_resume(rank, checkpoint, folder):
    from recipes.minirl.job import checkpoints
    from recipes.model import parallel

    folder = Path(folder)
    settings = {"pipeline_parallel": 2, "nproc": 2}
    policy = make_policy(checkpoint, **settings)
    take_step(policy, folder)
    saved = []
    for step in (1, 2, 3):
        progress = checkpoints.Progress(step=step, prompts_consumed=4 * step)
        saved.append(checkpoints.save(policy, folder, progress, Path(checkpoint)))
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    take_step(policy, folder)
    straight = weights_of(policy)
    policy.replay.remove()
    parallel.destroy(keep_world=True)

    newest = checkpoints.newest(folder)
    policy = make_policy(newest, **settings)
    checkpoints.load_trainer(policy, newest)
    progress = checkpoints.read_progress(newest)
    take_step(policy, folder)
    resumed = weights_of(policy)
    policy.replay.remove()
    parallel.destroy(keep_world=True)

    policy = make_policy(newest, tensor_parallel=2, nproc=2, distributed_optimizer=[])
    checkpoints.load_trainer(policy, newest)
    take_step(policy, folder)
    elsewhere = weights_of(policy)
    policy.replay.remove()
    parallel.destroy(keep_world=True)
    return names, straight, resumed, dataclasses.asdict(progress), elsewhere


def test_a_resumed_trainer_takes_the_next_step_bitwise(resumption):
    _, straight, resumed, progress, _ = resumption[1][0]
    assert progress == {"step": 3, "prompts_consumed": 12}
    for name, weight in straight.items():
        assert torch.equal(resumed[name], weight), name


def test_only_the_newest_checkpoints_are_kept_and_nothing_unfinished(resumption):
    assert resumption[1][0][0] == ["step_000002", "step_000003"]


def test_a_checkpoint_is_a_hugging_face_model(resumption):
    from transformers import AutoModelForCausalLM

    folder = resumption[0] / "checkpoints" / "step_000003"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert model.config.num_experts == EXPERTS
    assert json.loads((folder / "trainer" / "state.json").read_text())["step"] == 3


def test_a_trainer_that_resumes_in_another_layout_takes_the_next_step(resumption):
    _, straight, _, _, elsewhere = resumption[1][0]
    assert elsewhere.keys() == straight.keys()
    for name, weight in straight.items():
        torch.testing.assert_close(elsewhere[name], weight, atol=ATOL, rtol=1e-5)


def test_the_mean_of_passes_is_of_their_log_probs():
    from recipes.minirl.policy.scoring import mean_scores
    from routing_replay.objectives.logprobs import TokenScores

    values = [torch.tensor([-1.0, -2.0]), torch.tensor([-3.0, -2.5])]
    passes = [{(0, 1): TokenScores(logp_T=logp_T, entropy_T=logp_T)} for logp_T in values]
    [(sequences, scores)] = mean_scores(passes).items()
    assert sequences == (0, 1)
    assert scores.logp_T.tolist() == [-2.0, -2.25] and scores.entropy_T.tolist() == [-1.0, -2.0]


def by_version_lag(rank, checkpoint):
    """Metrics of batches by their versions, and slots that soft replay filled live, by age."""
    from recipes.minirl.policy.old_pass import score_old
    from routing_replay.metrics.typed import to_floats

    soft = {"routing_replay_soft_ratio": 0.1, "routing_replay_soft_decay": 0.2}
    policy = make_policy(checkpoint, nproc=1, **soft)
    batch, table = make_step()
    table.weight_version_T[:] = 0
    replaced, metrics = [], []
    for version in (0, 1):
        policy.weight_version = version
        old = score_old(policy, batch, table)
        replaced.append(to_floats(policy.replay.metrics())["routing_replay/replace_rate"].mean)
    # Weights come in the middle of responses: every third token is older.
    is_older_N = torch.arange(len(batch.mask_N)) % 3 == 0
    for version_N in (torch.ones_like(is_older_N), torch.zeros_like(is_older_N), ~is_older_N):
        of_versions = dataclasses.replace(batch, version_N=version_N.int())
        metrics.append(to_floats(policy.reduce(policy.discrepancy(of_versions, old.scores))))
    return replaced, metrics, int(batch.mask_N[is_older_N].sum()) / int(batch.mask_N.sum())


def test_gaps_are_kept_apart_by_version_lag_and_soft_replay_counts_it(checkpoint):
    (outcome,) = run_world(by_version_lag, 1, checkpoint)
    (fresh, older), (now, before, both), share = outcome
    # At age 1 the ratio is 0.1 ** 0.2 = 0.63 in place of 0.1: fewer replayed experts stay.
    assert 0 < fresh < older < 1
    assert "train_infer/kl_k1_lag_1" not in now and "train_infer/kl_k1" not in before
    assert before["train_infer/kl_k1_lag_1"] == now["train_infer/kl_k1"]
    parts = share * both["train_infer/kl_k1_lag_1"] + (1 - share) * both["train_infer/kl_k1"]
    assert parts == pytest.approx(now["train_infer/kl_k1"])
    assert both["train_infer/kl_k1_lag_1"] != pytest.approx(both["train_infer/kl_k1"])
    assert both["entropy"] == now["entropy"]
