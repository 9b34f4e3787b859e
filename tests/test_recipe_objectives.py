"""Every objective in the recipe: real samples of a real server, real updates in Megatron."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron_worlds import run_world
from sglang_servers import MODEL

from routing_replay import objectives
from routing_replay.errors import ConfigError, DataError
from routing_replay.routes.batch import RolloutBatch

PROMPTS, GROUP, MINIBATCH, NEW_TOKENS = 4, 4, 8, 8
SIZES = ["--prompts-per-step", str(PROMPTS), "--samples-per-prompt", str(GROUP)]
SIZES += ["--minibatch-size", str(MINIBATCH), "--microbatch-size", "4", "--nproc", "1"]
SIZES += ["--max-new-tokens", str(NEW_TOKENS), "--topk-logprobs", "5"]
# The model is unsure: 100 of its 128 tokens hold nearly everything, and top-p is what cuts.
MASKED = ["--top-p", "0.6", "--top-k", "100"]
# Where a published default would choose none of so few tokens.
PARAMETERS = {
    "clip_cov": ["fraction=0.2", "cov_low=-1"],
    "kl_cov": ["fraction=0.2"],
}
MODES = ("disabled", "R2", "R3")
INNER_LAYER = 1


def configuration(*flags):
    from recipes.minirl.command_line import parse

    return parse([*SIZES, *flags])


def prompts_of(answers):
    from recipes.minirl.prompts import Prompt

    rng = np.random.default_rng(3)
    texts = [" ".join(f"t{n}" for n in rng.integers(3, 128, 6)) for _ in answers]
    return [
        Prompt(prompt=text, answer=answer, verifier="parity")
        for text, answer in zip(texts, answers, strict=True)
    ]


def parity(response, answer):
    """1 for an even sum of the tokens' numbers; "always" accepts every response."""
    even = sum(int(word.removeprefix("t")) for word in response.split()) % 2 == 0
    return float(even or answer == "always")


@pytest.fixture(scope="module")
def rollout_of(sglang_server):
    """Makes the recipe's Rollout for some flags, on the shared server with its first weights."""
    from recipes.minirl.rollout import Rollout
    from recipes.minirl.verifiers import VERIFIERS

    sglang_server.restore()
    VERIFIERS["parity"] = parity
    checkpoint = sglang_server.checkpoints[0]
    yield lambda *flags: Rollout(
        configuration(*flags), [sglang_server.server.url], checkpoint, MODEL
    )
    del VERIFIERS["parity"]


def save_step(rollout, folder):
    """One batch of the server's samples and its routes, as the first rank saves them."""
    from recipes.minirl.batch import Batch
    from routing_replay.routes.table import RouteTable

    samples = rollout.sample(prompts_of([""] * PROMPTS), GROUP, for_training=True)
    # The groups of a training step teach something; that of prompt 0 shall in any case.
    samples[0] = dataclasses.replace(samples[0], reward=1.0)
    samples[1] = dataclasses.replace(samples[1], reward=0.0)
    folder.mkdir()
    Batch.from_samples(samples, GROUP, 1).save(folder / "batch.safetensors")
    RouteTable.from_routes([s.routes for s in samples]).save(folder / "routes.safetensors")
    return samples


@pytest.fixture(scope="module")
def steps(rollout_of, sglang_server, tmp_path_factory):
    """What one trainer rank makes of two batches of the server: one plain, one under a mask."""
    folder = tmp_path_factory.mktemp("objectives")
    save_step(rollout_of("--objective", "dppo_topk"), folder / "plain")
    save_step(rollout_of(*MASKED), folder / "masked")
    checkpoints = [str(path) for path in sglang_server.checkpoints]
    (found,) = run_world(on_one_rank, 1, str(folder), checkpoints, timeout_s=600)
    return found


# --- in the trainer's process -------------------------------------------------------------------


def on_one_rank(rank, folder, checkpoints):
    folder = Path(folder)
    found = {"objectives": {}, "ratios": {}}
    for name in objectives.names():
        found["objectives"][name] = two_updates(folder / "plain", checkpoints[0], name)
    for mode in MODES:
        found["ratios"][mode] = ratios(folder / "plain", checkpoints[0], mode)
    found["masked"] = under_a_mask(folder / "masked", checkpoints[0])
    found["reference"] = with_a_reference(folder / "plain", checkpoints)
    found["inner"] = of_an_inner_layer(folder / "plain", checkpoints[0])
    found["shift"] = router_shift(folder / "plain", checkpoints[0])
    return found


class Step:
    """A policy, a saved batch, and the recipe's own way from one to the other."""

    def __init__(self, folder, checkpoint, *flags, mode="R3", reference=None):
        from recipes.minirl.batch import Batch
        from recipes.minirl.policy import Policy
        from recipes.minirl.shaping import with_advantages
        from recipes.minirl.train import score_old
        from routing_replay.routes.table import RouteTable

        config = configuration("--routing-replay-mode", mode, "--learning-rate", "1e-2", *flags)
        self.policy = Policy(config, Path(checkpoint), reference and Path(reference))
        batch = Batch.open(folder / "batch.safetensors")
        table = RouteTable.open(folder / "routes.safetensors") if mode == "R3" else None
        self.old, self.replayed, self.rows_ST = score_old(self.policy, batch, table, folder)
        has_reference = self.policy.reference is not None
        self.reference = self.policy.score_reference(batch) if has_reference else None
        self.batch, self.shaping = with_advantages(self.policy, batch, self.old, self.reference)
        self.chosen = []

    def update(self, number, objective=None, old=None):
        from recipes.minirl.policy import Given
        from recipes.minirl.step_choices import choose
        from recipes.minirl.train import replaying

        old = old or self.old
        objective = objective or self.policy.config.make_objective()
        chosen = choose(self.policy, self.batch, self.replayed, old, number, (0, 1, number))
        self.chosen.append(chosen)
        given = Given(old=old, reference=self.reference, chosen=chosen)
        with replaying(self.policy, self.replayed):
            return self.policy.update(self.batch, self.rows_ST, given, objective, number)

    def weights(self):
        from recipes.model.weights import named_hf_tensors

        tensors = named_hf_tensors(self.policy.chunks)
        return {name: tensor.clone() for name, tensor in tensors if tensor is not None}

    def close(self):
        from recipes.model import parallel

        self.policy.replay.remove()
        parallel.destroy(keep_world=True)


def two_updates(folder, checkpoint, name):
    from routing_replay.metrics.typed import merge, to_floats

    flags = ["--objective", name]
    if name in PARAMETERS:
        flags += ["--objective-parameters", *PARAMETERS[name]]
    step = Step(folder, checkpoint, *flags)
    before = step.weights()
    metrics = merge(step.update(0), step.update(1))
    after = step.weights()
    moved = max((after[n] - before[n]).abs().max().item() for n in before)
    finite = all(torch.isfinite(tensor).all().item() for tensor in after.values())
    chosen = [{n: v[step.batch.mask_ST] for n, v in c.items()} for c in step.chosen]
    step.close()
    return to_floats(metrics), moved, finite, chosen


def ratios(folder, checkpoint, mode):
    """What an objective sees in both updates; the metrics; and transformers' own log-probs."""
    from routing_replay.metrics.typed import merge, to_floats
    from routing_replay.objectives.tokens import Tokens

    step = Step(folder, checkpoint, mode=mode)
    seen, objective = [], step.policy.config.make_objective()

    def watch(inputs):
        tokens, mask_T = Tokens(inputs), inputs.mask_T
        logs = (tokens.log_w_T, tokens.log_m_T, tokens.log_r_T, tokens.log_old_T)
        seen[-1].append(torch.stack([value_T.detach()[mask_T] for value_T in logs]))
        return objective(inputs)

    metrics = step.policy.discrepancy(step.batch, step.old)
    for number in range(2):
        seen.append([])
        metrics = merge(metrics, step.update(number, watch))
    step.close()
    live = transformers_logp(checkpoint, step.batch)
    return [torch.cat(of_update, dim=1) for of_update in seen], to_floats(metrics), live


def transformers_logp(checkpoint, batch, layer=None):
    """Log-probs of the response tokens by transformers; `layer`: of that layer's own policy."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    found = []
    for ids_T, labels_T, mask_T in zip(
        batch.input_ids_ST, batch.labels_ST, batch.mask_ST, strict=True
    ):
        with torch.no_grad():
            output = model(ids_T[None], output_hidden_states=layer is not None)
            logits_TV = output.logits[0]
            if layer is not None:
                # hidden_states[0] is the embedding, [l + 1] the output of layer l, before any norm.
                logits_TV = model.lm_head(output.hidden_states[layer + 1])[0]
        logp_T = logits_TV.log_softmax(-1).gather(1, labels_T[:, None])[:, 0]
        found.append(logp_T[mask_T])
    return torch.cat(found)


def under_a_mask(folder, checkpoint):
    """The first update's metrics with the rollout's mask applied to the trainer, and without."""
    from routing_replay.metrics.typed import to_floats

    found = {}
    for is_kept in (True, False):
        step = Step(folder, checkpoint, *MASKED)
        if not is_kept:
            bare = dict.fromkeys(("support_ids_N", "support_starts_ST", "support_counts_ST"))
            step.batch = dataclasses.replace(step.batch, **bare)
        metrics = step.policy.discrepancy(step.batch, step.old) if is_kept else {}
        found[is_kept] = to_floats(metrics | step.update(0))
        step.close()
    return found


def with_a_reference(folder, checkpoints):
    """KL terms to another checkpoint: its log-probs here and in transformers, and the metrics."""
    from routing_replay.metrics.typed import merge, to_floats

    flags = ["--objective-parameters", "kl_coefficient=0.1", "--reward-kl-coefficient", "0.5"]
    step = Step(folder, checkpoints[0], *flags, reference=checkpoints[1])
    shape, mask_ST = step.batch.mask_ST.shape, step.batch.mask_ST
    with step.policy.replay.replaying(step.replayed):
        # Even within a scope of the policy the reference is a stock model.
        again = step.policy.score_reference(step.batch)
        step.policy.score(step.batch, step.rows_ST)
    scores = [step.policy.dense(s, shape)[mask_ST] for s in (step.reference, again, step.old)]
    metrics = merge(step.update(0), step.update(1))
    step.close()
    expected = transformers_logp(checkpoints[1], step.batch)
    return scores, expected, to_floats(metrics), to_floats(step.shaping), step.batch


def of_an_inner_layer(folder, checkpoint):
    """BuPO's first step: the scores of an inner layer's policy, and which weights it moves."""
    from recipes.minirl.train import old_of_update

    flags = ["--objective", "grpo", "--internal-layer", str(INNER_LAYER)]
    step = Step(folder, checkpoint, *flags)
    before = step.weights()
    with step.policy.reading(INNER_LAYER):
        old = old_of_update(step.policy, step.batch, step.replayed, step.rows_ST, step.old, 1)
        logp_ST = step.policy.dense(old, step.batch.mask_ST.shape)
        step.update(0, old=old)
    after = step.weights()
    whole = step.policy.dense(
        step.policy.score(step.batch, step.batch.token_rows(None)), step.batch.mask_ST.shape
    )
    step.close()
    moved = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    expected = transformers_logp(checkpoint, step.batch, INNER_LAYER)
    mask_ST = step.batch.mask_ST
    return logp_ST[mask_ST], expected, whole[mask_ST], moved


def router_shift(folder, checkpoint):
    """gamma of the second minibatch after one update: the recipe's, and transformers'."""
    from recipes.model.weights import save_hf

    step = Step(folder, checkpoint, "--objective", "rspo", mode="disabled")
    step.update(0)
    save_hf(step.policy.chunks, folder / "updated", source=checkpoint)
    step.update(1)
    batch, gamma_ST = step.batch, step.chosen[1]["router_shift_T"]
    step.close()
    half = slice(MINIBATCH, None)
    ids_ST, mask_ST = batch.input_ids_ST[half], batch.mask_ST[half]
    old, new = (router_logs(path, ids_ST) for path in (checkpoint, folder / "updated"))
    moved = []
    for old_SXE, new_SXE in zip(old, new, strict=True):  # layer by layer
        experts = old_SXE.topk(MODEL.top_k, dim=-1).indices
        difference = new_SXE.gather(-1, experts) - old_SXE.gather(-1, experts)
        moved.append(difference.abs().mean(-1))
    return gamma_ST[half][mask_ST], (-torch.stack(moved).mean(0)).exp()[mask_ST]


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


# --- what was found -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", objectives.names())
def test_every_objective_takes_two_real_updates(steps, name):
    metrics, moved, finite, _ = steps["objectives"][name]
    assert finite
    assert moved > 1e-3  # Adam moves a weight by up to the learning rate, 0.01, per update
    assert metrics["grad_norm"] > 0
    assert metrics["objective/nonfinite_tokens"] == 0
    for metric in ("loss", "policy_loss", "clip_fraction", "drop_fraction", "weight_mean"):
        assert math.isfinite(metrics[f"objective/{metric}"]), metric
    assert metrics["staleness/logp_abs_diff_max"] > 0


@pytest.mark.parametrize("name", ["m2po", "clip_cov", "kl_cov", "rspo"])
def test_methods_of_the_whole_step_are_given_their_choice(steps, name):
    chosen = steps["objectives"][name][3]
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


def test_router_shift_is_that_of_transformers_routers(steps):
    found_T, expected_T = steps["shift"]
    assert expected_T.mean() < 0.999
    torch.testing.assert_close(found_T, expected_T, atol=1e-4, rtol=0)


@pytest.mark.parametrize("mode", MODES)
def test_log_w_is_log_m_plus_log_r_token_by_token(steps, mode):
    updates, metrics, live = steps["ratios"][mode]
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


def test_under_the_sampling_mask_w_is_one_on_the_first_update(steps):
    kept, dropped = (steps["masked"][is_kept] for is_kept in (True, False))
    assert kept["train_infer/kl_k3"] < 1e-8
    assert kept["off_policy/kl_k3"] < 1e-8
    assert kept["off_policy/logp_abs_diff_max"] < 1e-3
    # Over the whole vocabulary pi is smaller by the mass of the mask, for every token: w is just
    # above 0.6, so k1 = -log w is below -log 0.6 = 0.51, and k3 = w - 1 - log w below 0.11.
    assert 0.3 < dropped["off_policy/kl_k1"] < 0.51
    assert 0.03 < dropped["off_policy/kl_k3"] < 0.11


def test_the_reference_is_a_stock_model_without_replay(steps):
    (reference, again, old), expected, metrics, shaping, batch = steps["reference"]
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


def test_bupo_trains_the_layers_up_to_its_own_and_the_output(steps):
    logp, expected, whole, moved = steps["inner"]
    torch.testing.assert_close(logp, expected, atol=1e-4, rtol=1e-4)
    assert (whole - logp).abs().max() > 0.1  # after the scope the logits are the model's again
    layers = {int(name.split(".")[2]) for name in moved if name.startswith("model.layers.")}
    assert layers == set(range(INNER_LAYER + 1))
    assert {n for n in moved if ".layers." not in n} == {
        "model.embed_tokens.weight",
        "lm_head.weight",
    }


# --- sampling -----------------------------------------------------------------------------------


def test_a_mask_holds_every_sampled_token_and_most_of_the_probability(rollout_of):
    samples = rollout_of(*MASKED).sample(prompts_of([""] * 2), 4, for_training=True)
    for sample in samples:
        assert all(y in ids for y, ids in zip(sample.response_ids, sample.support, strict=True))
        assert all(1 <= len(ids) < 100 for ids in sample.support)
        # The smallest set with 0.6: its last token takes it beyond that.
        assert 0.6 < sample.support_mass < 0.75


def test_likely_tokens_are_log_probs_within_the_mask(rollout_of):
    rollout = rollout_of(*MASKED, "--objective", "dppo_topk")
    (sample,) = rollout.sample(prompts_of([""]), 1, for_training=True)
    assert sample.top_ids.shape == sample.top_logp_mu.shape == (NEW_TOKENS, 5)
    rows = zip(sample.response_ids, sample.logp_mu, sample.support, strict=True)
    for t, (token, logp, ids) in enumerate(rows):
        is_inside = np.isin(sample.top_ids[t], ids)
        assert (np.isfinite(sample.top_logp_mu[t]) == is_inside).all()
        assert np.exp(sample.top_logp_mu[t]).sum() < 1 + 1e-5
        if token in sample.top_ids[t]:
            (place,) = np.flatnonzero(sample.top_ids[t] == token)
            assert sample.top_logp_mu[t, place] == pytest.approx(logp, abs=1e-5)


def test_evaluation_asks_for_no_routes_and_no_mask(rollout_of):
    (sample,) = rollout_of(*MASKED).sample(prompts_of([""]), 1, for_training=False)
    assert sample.routes is None
    assert sample.support is None
    assert len(sample.response_ids) == NEW_TOKENS


def test_a_mask_larger_than_the_server_allows_is_an_error_at_the_start(rollout_of):
    with pytest.raises(Exception, match="top_k") as caught:
        rollout_of("--top-p", "0.9", "--top-k", "5000")
    assert type(caught.value).__module__ == "routing_replay.errors"


def test_more_likely_tokens_than_there_are_is_an_error_at_the_start(rollout_of):
    with pytest.raises(ConfigError, match="'topk_logprobs' asks for more.*at most 128; got 200"):
        rollout_of("--objective", "dppo_topk", "--topk-logprobs", "200")


def test_a_masked_batch_is_refused_where_mu_must_be_of_the_whole_vocabulary(tmp_path):
    batch = a_batch()
    batch.save(tmp_path / "plain.safetensors")
    assert RolloutBatch.open(tmp_path / "plain.safetensors").lengths_S.tolist() == [9, 8, 7, 5]
    masked = {name: torch.zeros(1, dtype=torch.int32) for name in ("support_ids_N",)}
    dataclasses.replace(batch, **masked).save(tmp_path / "masked.safetensors")
    with pytest.raises(DataError, match="sampled under a sampling mask.*without --top-p"):
        RolloutBatch.open(tmp_path / "masked.safetensors")


def test_dynamic_sampling_replaces_groups_of_equal_rewards(rollout_of):
    from recipes.minirl.rollout import sample_groups

    rollout = rollout_of()
    answers = ["always", "", "always", ""] + [""] * 20
    stream = prompts_of(answers)
    drawn = []

    def draw(offset, count):
        drawn.append((offset, count))
        return stream[offset : offset + count]

    groups = sample_groups(rollout, draw, PROMPTS, rounds=4)
    rewards_GS = torch.tensor([s.reward for s in groups.samples]).view(PROMPTS, GROUP)
    assert ((rewards_GS > 0).any(1) & (rewards_GS < 1).any(1)).all()
    # The first round misses the two that every response solves, and perhaps more.
    assert drawn[0] == (0, PROMPTS)
    assert drawn[1][0] == PROMPTS
    assert drawn[1][1] >= 2
    assert groups.num_rounds == len(drawn) <= 5
    assert groups.num_prompts == sum(count for _, count in drawn)
    # In the order of sampling: prompts' tokens identify them.
    encoded = [tuple(rollout.encode(p)) for p in stream]
    places = [encoded.index(s.prompt_ids) for s in groups.samples[::GROUP]]
    assert places == sorted(places)
    assert not {0, 2} & set(places)


def test_dynamic_sampling_gives_up_after_its_rounds_with_a_full_batch(rollout_of):
    from recipes.minirl.rollout import sample_groups

    stream = prompts_of(["always"] * 12)
    groups = sample_groups(rollout_of(), lambda o, c: stream[o : o + c], PROMPTS, rounds=2)
    assert (groups.num_rounds, groups.num_prompts) == (3, 12)
    assert len(groups.samples) == PROMPTS * GROUP
    assert all(sample.reward == 1 for sample in groups.samples)


def test_without_dynamic_sampling_a_batch_is_its_prompts_in_order(rollout_of):
    from recipes.minirl.rollout import sample_groups

    rollout = rollout_of()
    stream = prompts_of(["always", "", "always", ""])
    groups = sample_groups(rollout, lambda o, c: stream[o : o + c], PROMPTS, rounds=0)
    assert (groups.num_rounds, groups.num_prompts) == (1, PROMPTS)
    expected = [tuple(rollout.encode(p)) for p in stream for _ in range(GROUP)]
    assert [s.prompt_ids for s in groups.samples] == expected


# --- from rewards to advantages -----------------------------------------------------------------


class LastStage:
    """What `with_advantages` asks of a policy, with log-probs that are given."""

    is_last_stage = True

    def __init__(self, config):
        self.config = config

    def dense(self, scores, shape):
        return scores


def a_batch():
    from recipes.minirl.batch import Batch, Sample

    lengths, rewards = (8, 7, 6, 4), (1.0, 0.0, 0.0, 1.0)
    samples = [
        Sample(prompt_ids=(1,), response_ids=(2,) * n, logp_mu=(-1.0,) * n, reward=r)
        for n, r in zip(lengths, rewards, strict=True)
    ]
    return Batch.from_samples(samples, 4, 1)


def test_overlong_responses_lose_reward_on_the_slope_only():
    from recipes.minirl.shaping import with_advantages

    config = configuration("--overlong-cache", "4")
    batch, metrics = with_advantages(LastStage(config), a_batch(), None, None)
    # Longest 8, slope 4: lengths 8, 7, 6, 4 lose 1, 3/4, 1/2, 0.
    rewards = torch.tensor([1.0 - 1.0, 0.0 - 0.75, 0.0 - 0.5, 1.0])
    torch.testing.assert_close(batch.advantages_S, rewards - rewards.mean())
    assert metrics["reward/overlong_penalty"].value() == pytest.approx(-2.25 / 4)


def test_differential_smoothing_lifts_rare_right_answers_and_sinks_common_wrong_ones():
    from recipes.minirl.shaping import with_advantages

    config = configuration("--smoothing-correct", "0.1", "--smoothing-wrong", "0.2")
    batch = a_batch()
    logp_ST = torch.where(batch.mask_ST, -0.5, 99.0)
    shaped, _ = with_advantages(LastStage(config), batch, logp_ST, None)
    # log pi_old(y|x) = -0.5 * length: -4, -3.5, -3, -2. Group means are 0.5.
    expected = torch.tensor([0.5 + 0.4, -0.5 - 0.7, -0.5 - 0.6, 0.5 + 0.2])
    torch.testing.assert_close(shaped.advantages_S, expected)


def test_earlier_pipeline_stages_need_no_advantages():
    from recipes.minirl.shaping import with_advantages

    policy = LastStage(configuration())
    policy.is_last_stage = False
    batch = a_batch()
    assert with_advantages(policy, batch, None, None) == (batch, {})


# --- the whole recipe ---------------------------------------------------------------------------

RUNS = {
    "masked": [
        *("--objective", "dapo", "--top-p", "0.95", "--top-k", "12"),
        *("--objective-parameters", "kl_coefficient=0.01", "entropy_coefficient=0.001"),
        *("--dynamic-sampling", "1", "--overlong-cache", "2", "--reward-kl-coefficient", "0.01"),
    ],
    "bupo": ["--preset", "tiny_bupo", "--internal-steps", "1"],
}


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", RUNS)
def test_the_whole_recipe_runs(name, tmp_path):
    from test_recipe_end_to_end import SMALL, finish, records, start, write_prompts

    flags = [*SMALL, *RUNS[name], "--steps", "2", "--cache-dir", str(tmp_path / "cache")]
    output, status = finish(start(tmp_path / "run", *flags, *write_prompts(tmp_path)))
    assert status == 0, output
    steps = records(tmp_path / "run")[1:]
    assert [step["step"] for step in steps] == [1, 2]
    for step in steps:
        assert math.isfinite(step["objective/loss"])
        assert step["objective/nonfinite_tokens"] == 0
        if name == "bupo":
            # The inner layer's policy has no mu to be compared with.
            assert ("off_policy/kl_k3" in step) == (step["step"] == 2)
            continue
        assert step["train_infer/kl_k3"] < step["train_infer/kl_k3_live"]
        assert 0.9 < step["rollout/sampling_mask_mass"] < 1
        assert 1 <= step["rollout/sampling_rounds"] <= 2
        assert step["rollout/replaced_groups"] >= 0
        assert -1 <= step["reward/overlong_penalty"] <= 0
        assert "reward/kl_penalty" in step
    if name == "masked":
        # Before the first step the policy is the reference; afterwards it has moved away.
        assert abs(steps[0]["reward/kl_penalty"]) < 0.01
        assert steps[1]["objective/kl_ref"] > 0
        state = tmp_path / "run" / "checkpoints" / "step_000002" / "trainer" / "state.json"
        consumed = 16 + sum(step["rollout/replaced_groups"] for step in steps)
        assert json.loads(state.read_text())["prompts_consumed"] == consumed
