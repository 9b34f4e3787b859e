"""Every objective in the recipe: real samples of a real server, real updates in Megatron.

One trainer process runs the jobs of all selected tests, and only these: `-k m2po` runs one.
"""

import contextlib
import dataclasses
import math
import traceback
from pathlib import Path

import pytest
import torch
from megatron_worlds import run_world, selected
from recipe_rollouts import (
    GROUP,
    MASKED,
    MINIBATCH,
    NEW_TOKENS,
    PROMPTS,
    configuration,
    rollout_of,
    samples_of,
)
from sglang_servers import MODEL

from routing_replay import objectives

__all__ = ["rollout_of"]  # a fixture

# Where a published default would choose none of so few tokens.
PARAMETERS = {
    "clip_cov": ["fraction=0.2", "cov_low=-1"],
    "kl_cov": ["fraction=0.2"],
}
MODES = ("disabled", "R2", "R3")
INNER_LAYER = 1


def save_step(rollout, folder):
    """One batch of the server's samples and its routes, as the first rank saves them."""
    from recipes.minirl.rollout.batch import Batch
    from routing_replay.routes.table import RouteTable

    samples = samples_of(rollout, [""] * PROMPTS, GROUP)
    # The groups of a training step teach something; that of prompt 0 shall in any case.
    samples[0] = dataclasses.replace(samples[0], reward=1.0)
    samples[1] = dataclasses.replace(samples[1], reward=0.0)
    folder.mkdir()
    Batch.from_samples(samples, GROUP).save(folder / "batch.safetensors")
    RouteTable.from_routes([s.routes for s in samples]).save(folder / "routes.safetensors")
    return samples


def needs(*jobs):
    """Parametrize a test with the outcomes of jobs: a function below and its argument."""
    return pytest.mark.parametrize("outcome", jobs, indirect=True, ids="-".join)


@pytest.fixture(scope="module")
def outcomes(request, rollout_of, sglang_server, tmp_path_factory):
    """What one trainer rank makes of two batches of the server: one plain, one under a mask."""
    folder = tmp_path_factory.mktemp("objectives")
    save_step(rollout_of("--objective", "dppo_topk"), folder / "plain")
    save_step(rollout_of(*MASKED), folder / "masked")
    checkpoints = [str(path) for path in sglang_server.checkpoints]
    arguments = str(folder), checkpoints, selected(request, "outcome")
    (by_job,) = run_world(on_one_rank, 1, *arguments, timeout_s=600)
    return by_job


@pytest.fixture
def outcome(request, outcomes):
    """The outcome of one job; an error in it fails this test alone."""
    error, value = outcomes[request.param]
    if error:
        pytest.fail(error, pytrace=False)
    return value


# --- in the trainer's process -------------------------------------------------------------------


def on_one_rank(rank, folder, checkpoints, jobs):
    by_job = {}
    for name, *arguments in jobs:
        try:
            value = globals()[name](Path(folder), checkpoints, *arguments)
            by_job[name, *arguments] = None, value
        except Exception:
            by_job[name, *arguments] = traceback.format_exc(), None
            close_policy()
    return by_job


def close_policy():
    from recipes.model import parallel

    with contextlib.suppress(Exception):
        parallel.destroy(keep_world=True)


class Step:
    """A policy, a saved batch, and the recipe's own way from one to the other."""

    def __init__(self, folder, checkpoint, *flags, mode="R3", reference=None):
        from recipes.minirl.policy.old_pass import score_old
        from recipes.minirl.policy.policy import Policy
        from recipes.minirl.policy.shaping import with_advantages
        from recipes.minirl.rollout.batch import Batch
        from routing_replay.routes.table import RouteTable

        config = configuration("--routing-replay-mode", mode, "--learning-rate", "1e-2", *flags)
        self.policy = Policy(config, Path(checkpoint), reference and Path(reference))
        batch = Batch.open(folder / "batch.safetensors")
        table = RouteTable.open(folder / "routes.safetensors") if mode == "R3" else None
        self.old = score_old(self.policy, batch, table)
        has_reference = self.policy.reference is not None
        self.reference = self.policy.score_reference(batch) if has_reference else None
        scores = self.old.scores
        self.batch, self.shaping = with_advantages(self.policy, batch, scores, self.reference)
        self.chosen = []

    def update(self, number, objective=None, old=None):
        from recipes.minirl.policy.old_pass import replaying
        from recipes.minirl.policy.policy import FixedScores
        from recipes.minirl.policy.step_choices import choose

        old = old or self.old.scores
        objective = objective or self.policy.config.make_objective()
        chosen = choose(self.policy, self.batch, self.old.table, old, number, (0, 1, number))
        self.chosen.append(chosen)
        fixed = FixedScores(old=old, reference=self.reference, chosen=chosen)
        with replaying(self.policy, self.old.table):
            return self.policy.update(self.batch, self.old.table, fixed, objective, number)

    def weights(self):
        from recipes.model.weights import named_hf_tensors

        tensors = named_hf_tensors(self.policy.chunks)
        return {name: tensor.clone() for name, tensor in tensors if tensor is not None}

    def close(self):
        self.policy.replay.remove()
        close_policy()


def two_updates(folder, checkpoints, name):
    from routing_replay.metrics.typed import merge, to_floats

    flags = ["--objective", name]
    if name in PARAMETERS:
        flags += ["--objective-parameters", *PARAMETERS[name]]
    step = Step(folder / "plain", checkpoints[0], *flags)
    before = step.weights()
    metrics = merge(step.update(0), step.update(1))
    after = step.weights()
    moved = max((after[n] - before[n]).abs().max().item() for n in before)
    finite = all(torch.isfinite(tensor).all().item() for tensor in after.values())
    chosen = [{n: v[step.batch.mask_N] for n, v in c.items()} for c in step.chosen]
    step.close()
    return to_floats(metrics), moved, finite, chosen


def ratios(folder, checkpoints, mode):
    """What an objective sees in both updates; the metrics; and transformers' own log-probs."""
    from routing_replay.metrics.typed import merge, to_floats
    from routing_replay.objectives.tokens import Tokens

    step = Step(folder / "plain", checkpoints[0], mode=mode)
    seen, objective = [], step.policy.config.make_objective()

    def watch(inputs):
        tokens, mask_T = Tokens(inputs), inputs.mask_T
        logs = (tokens.log_w_T, tokens.log_m_T, tokens.log_r_T, tokens.log_old_T)
        seen[-1].append(torch.stack([value_T.detach()[mask_T] for value_T in logs]))
        return objective(inputs)

    metrics = step.policy.discrepancy(step.batch, step.old.scores)
    for number in range(2):
        seen.append([])
        metrics = merge(metrics, step.update(number, watch))
    step.close()
    live = transformers_logp(checkpoints[0], step.batch)
    return [torch.cat(of_update, dim=1) for of_update in seen], to_floats(metrics), live


def transformers_logp(checkpoint, batch, layer=None):
    """Log-probs of the response tokens by transformers; `layer`: of that layer's own policy."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    found = []
    columns = (batch.input_ids_N, batch.labels_N, batch.mask_N)
    for ids_T, labels_T, mask_T in by_sequence(batch, *columns):
        with torch.no_grad():
            output = model(ids_T[None], output_hidden_states=layer is not None)
            logits_TV = output.logits[0]
            if layer is not None:
                # hidden_states[0] is the embedding, [l + 1] the output of layer l, before any norm.
                logits_TV = model.lm_head(output.hidden_states[layer + 1])[0]
        logp_T = logits_TV.log_softmax(-1).gather(1, labels_T[:, None])[:, 0]
        found.append(logp_T[mask_T])
    return torch.cat(found)


def by_sequence(batch, *columns):
    """The parts of some columns, sequence after sequence."""
    return zip(*(c.split((batch.lengths_S - 1).tolist()) for c in columns), strict=True)


def under_a_mask(folder, checkpoints):
    """The first update's metrics with the rollout's mask applied to the trainer, and without."""
    from routing_replay.metrics.typed import to_floats

    metrics_of = {}
    for is_kept in (True, False):
        step = Step(folder / "masked", checkpoints[0], *MASKED)
        if not is_kept:
            bare = dict.fromkeys(("support_ids_C", "support_offsets_N1"))
            step.batch = dataclasses.replace(step.batch, **bare)
        metrics = step.policy.discrepancy(step.batch, step.old.scores) if is_kept else {}
        metrics_of[is_kept] = to_floats(metrics | step.update(0))
        step.close()
    return metrics_of


def with_a_reference(folder, checkpoints):
    """KL terms to another checkpoint: its log-probs here and in transformers, and the metrics."""
    from routing_replay.metrics.typed import merge, to_floats

    flags = ["--objective-parameters", "kl_coefficient=0.1", "--reward-kl-coefficient", "0.5"]
    step = Step(folder / "plain", checkpoints[0], *flags, reference=checkpoints[1])
    mask_N = step.batch.mask_N
    with step.policy.replay.replaying(step.old.table):
        # Even within a scope of the policy the reference is a stock model.
        again = step.policy.score_reference(step.batch)
        step.policy.score(step.batch, step.old.table)
    passes = step.reference, again, step.old.scores
    scores = [step.policy.dense(s, step.batch)[mask_N] for s in passes]
    metrics = merge(step.update(0), step.update(1))
    step.close()
    expected = transformers_logp(checkpoints[1], step.batch)
    return scores, expected, to_floats(metrics), to_floats(step.shaping), step.batch


def of_an_inner_layer(folder, checkpoints):
    """BuPO's first step: the scores of an inner layer's policy, and which weights it moves."""
    from recipes.minirl.policy.old_pass import score_replayed

    flags = ["--objective", "grpo", "--internal-layer", str(INNER_LAYER)]
    step = Step(folder / "plain", checkpoints[0], *flags)
    before = step.weights()
    with step.policy.logits_from_layer(INNER_LAYER):
        old = score_replayed(step.policy, step.batch, step.old)
        logp_N = step.policy.dense(old, step.batch)
        step.update(0, old=old)
    after = step.weights()
    live = step.policy.score(step.batch, None)
    whole = step.policy.dense(live, step.batch)
    step.close()
    moved = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    expected = transformers_logp(checkpoints[0], step.batch, INNER_LAYER)
    mask_N = step.batch.mask_N
    return logp_N[mask_N], expected, whole[mask_N], moved


def router_shift(folder, checkpoints):
    """gamma of the second minibatch after one update: the recipe's, and transformers'."""
    from recipes.model.saving import save_hf

    step = Step(folder / "plain", checkpoints[0], "--objective", "rspo", mode="disabled")
    step.update(0)
    save_hf(step.policy.chunks, folder / "updated", source=checkpoints[0])
    step.update(1)
    batch, gamma_N = step.batch, step.chosen[1]["router_shift_T"]
    step.close()
    columns = (batch.input_ids_N, batch.mask_N, gamma_N)
    rows = list(by_sequence(batch, *columns))[MINIBATCH:]
    ids_ST, mask_ST, gamma_ST = (
        torch.nn.utils.rnn.pad_sequence(column, batch_first=True)
        for column in zip(*rows, strict=True)
    )
    old, new = (router_logs(path, ids_ST) for path in (checkpoints[0], folder / "updated"))
    moved = []
    for old_SXE, new_SXE in zip(old, new, strict=True):  # layer by layer
        experts = old_SXE.topk(MODEL.top_k, dim=-1).indices
        difference = new_SXE.gather(-1, experts) - old_SXE.gather(-1, experts)
        moved.append(difference.abs().mean(-1))
    return gamma_ST[mask_ST], (-torch.stack(moved).mean(0)).exp()[mask_ST]


def router_logs(checkpoint, ids_ST):
    """log softmax of every router in transformers, a [S, T, E] for each layer."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    found = []

    def note(gate, arguments, output):
        logits = torch.nn.functional.linear(arguments[0].detach(), gate.weight)
        found.append(logits.view(*ids_ST.shape, -1).log_softmax(-1).detach())

    for name, module in model.named_modules():
        if name.endswith("mlp.gate"):
            module.register_forward_hook(note)
    with torch.no_grad():
        model(ids_ST)  # padding is behind every sequence, and attention is causal
    return found


# --- the outcomes ------------------------------------------------------------------------------


@needs(*(("two_updates", name) for name in objectives.names()))
def test_an_objective_takes_two_real_updates(outcome):
    metrics, moved, finite, _ = outcome
    assert finite
    assert moved > 1e-3  # Adam moves a weight by up to the learning rate, 0.01, per update
    assert metrics["grad_norm"] > 0
    assert metrics["objective/nonfinite_tokens"] == 0
    for metric in ("loss", "policy_loss", "clip_fraction", "drop_fraction", "weight_mean"):
        assert math.isfinite(metrics[f"objective/{metric}"]), metric
    assert metrics["staleness/logp_abs_diff_max"] > 0


@needs(*(("two_updates", name) for name in ("m2po", "clip_cov", "kl_cov", "rspo")))
def test_methods_of_the_whole_step_are_given_their_choice(outcome, request):
    name = request.node.callspec.params["outcome"][1]
    chosen = outcome[3]
    field = {"kl_cov": "penalised_T", "rspo": "router_shift_T"}.get(name, "keep_T")
    assert [list(of_update) for of_update in chosen] == [[field]] * 2
    first, second = (of_update[field] for of_update in chosen)
    num_tokens = MINIBATCH * NEW_TOKENS
    if name == "rspo":
        # Each update's tokens are its own half; the other half has not been looked at again.
        assert torch.isfinite(first).sum() == torch.isfinite(second).sum() == num_tokens
        # gamma is 1 before the first update; afterwards the router has moved.
        torch.testing.assert_close(first[:num_tokens], torch.ones(num_tokens))
        assert 0.01 < second[num_tokens:].mean() < 0.999
    if name == "kl_cov":
        # The fifth with the highest covariance, of the tokens of the minibatch.
        assert first[:num_tokens].sum() == second[num_tokens:].sum() == int(0.2 * num_tokens)
    if name == "clip_cov":
        assert 0.6 < first[:num_tokens].double().mean() < 0.95


@needs(("router_shift",))
def test_router_shift_is_that_of_transformers_routers(outcome):
    gamma_T, expected_T = outcome
    assert expected_T.mean() < 0.999
    torch.testing.assert_close(gamma_T, expected_T, atol=1e-4, rtol=0)


@needs(*(("ratios", mode) for mode in MODES))
def test_log_w_is_log_m_plus_log_r_token_by_token(outcome):
    updates, metrics, live = outcome
    for log_w_T, log_m_T, log_r_T, _ in updates:
        torch.testing.assert_close(log_w_T, log_m_T + log_r_T, atol=2e-6, rtol=0)
    # The old pass took the routes of the update: before the first one pi_theta is pi_old.
    assert updates[0][2].abs().max() < 1e-5
    assert updates[1][2].abs().max() > 1e-2
    # Without replay, and where R2 records, pi_old routes live: as transformers does.
    old_T = torch.cat([of_update[3] for of_update in updates])
    torch.testing.assert_close(old_T, live, atol=1e-4, rtol=0)
    # k1 is linear in the log-ratio, so the means over the same tokens add up as well.
    parts = metrics["train_infer/kl_k1"] + metrics["staleness/kl_k1"]
    assert metrics["off_policy/kl_k1"] == pytest.approx(parts, abs=1e-6)
    # Both engines hold float32 weights.
    assert metrics["train_infer/kl_k3"] < 1e-8


@needs(("under_a_mask",))
def test_under_the_sampling_mask_w_is_one_on_the_first_update(outcome):
    kept, dropped = (outcome[is_kept] for is_kept in (True, False))
    assert kept["train_infer/kl_k3"] < 1e-8
    assert kept["off_policy/kl_k3"] < 1e-8
    assert kept["off_policy/logp_abs_diff_max"] < 1e-3
    # Over the whole vocabulary pi is smaller by the mass of the mask, for every token: w is just
    # above 0.6, so k1 = -log w is below -log 0.6 = 0.51, and k3 = w - 1 - log w below 0.11.
    assert 0.3 < dropped["off_policy/kl_k1"] < 0.51
    assert 0.03 < dropped["off_policy/kl_k3"] < 0.11


@needs(("with_a_reference",))
def test_the_reference_is_a_stock_model_without_replay(outcome):
    (reference, again, old), expected, metrics, shaping, batch = outcome
    torch.testing.assert_close(reference, expected, atol=1e-4, rtol=0)
    assert torch.equal(reference, again)
    assert (reference - old).abs().max() > 0.1  # other weights
    assert metrics["objective/kl_ref"] > 0
    # In the reward: - 0.5 * sum of log pi_old - log pi_ref, response by response.
    differences = (old - reference).double().split(NEW_TOKENS)
    penalty_S = -0.5 * torch.stack([d.sum() for d in differences])
    assert shaping["reward/kl_penalty"] == pytest.approx(penalty_S.mean().item(), rel=1e-5)
    rewards_S = batch.rewards_S + penalty_S
    centred_S = rewards_S - rewards_S.view(-1, GROUP).mean(1).repeat_interleave(GROUP)
    torch.testing.assert_close(batch.advantages_S.double(), centred_S, atol=1e-4, rtol=1e-4)


@needs(("of_an_inner_layer",))
def test_bupo_trains_the_layers_up_to_its_own_and_the_output(outcome):
    logp, expected, whole, moved = outcome
    torch.testing.assert_close(logp, expected, atol=1e-4, rtol=1e-4)
    assert (whole - logp).abs().max() > 0.1  # after the scope the logits are the model's again
    layers = {int(name.split(".")[2]) for name in moved if name.startswith("model.layers.")}
    assert layers == set(range(INNER_LAYER + 1))
    assert {n for n in moved if ".layers." not in n} == {
        "model.embed_tokens.weight",
        "lm_head.weight",
    }
