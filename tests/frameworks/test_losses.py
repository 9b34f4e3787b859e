"""Our objectives by the frameworks' registries: their aggregation, our gradients."""

import types

import pytest
import stand_ins
import torch

from routing_replay.errors import ObjectiveError

stand_ins.prepare()

# isort: split
from skyrl.backends.skyrl_train.utils import ppo_utils  # noqa: E402
from verl.trainer.ppo import core_algos  # noqa: E402

from routing_replay.adapters import skyrl_losses, verl_losses  # noqa: E402

verl_losses.register(core_algos)
skyrl_losses.register(ppo_utils)
AGGREGATIONS = [
    "token-mean",
    "token-sum",
    "seq-mean-token-sum",
    "seq-mean-token-mean",
    "seq-mean-token-sum-norm",
]
EPS_LOW, EPS_HIGH = 0.2, 0.27
DP_SIZE, NUM_TOKENS, NUM_SEQUENCES, HORIZON = 2, 40, 8, 16


def responses(seed=0):
    """Four responses of at most seven tokens; one of them is empty."""
    generator = torch.Generator().manual_seed(seed)
    theta, old, mu = (-2 * torch.rand(4, 7, generator=generator) for _ in range(3))
    lengths = torch.tensor([7, 3, 0, 5])
    mask = (torch.arange(7) < lengths[:, None]).float()
    advantages = torch.randn(4, 1, generator=generator).expand(4, 7)
    return {
        "theta": theta.requires_grad_(),
        "old": old,
        "m": (old - mu).exp(),
        "mu": mu,
        "advantages": advantages,
        "mask": mask,
    }


def verl_config():
    from verl.workers.config import ActorConfig

    config = ActorConfig(
        strategy="megatron",
        rollout_n=1,
        use_dynamic_bsz=True,
        clip_ratio_low=EPS_LOW,
        clip_ratio_high=EPS_HIGH,
        clip_ratio_c=1e9,
    )
    config.global_batch_info.update(
        dp_size=DP_SIZE,
        batch_num_tokens=NUM_TOKENS,
        global_batch_size=NUM_SEQUENCES,
        loss_scale_factor=HORIZON,
    )
    return config


def verl_loss(name, given, aggregation, weights=None):
    loss, metrics = core_algos.get_policy_loss_fn(name)(
        old_log_prob=given["old"],
        log_prob=given["theta"],
        advantages=given["advantages"],
        response_mask=given["mask"],
        loss_agg_mode=aggregation,
        config=verl_config(),
        rollout_is_weights=weights,
    )
    (gradient,) = torch.autograd.grad(loss, given["theta"])
    return loss.detach(), gradient, metrics


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_grpo_has_the_value_and_gradient_of_verls_own_clipped_loss(aggregation):
    given = responses()
    loss, gradient, _ = verl_loss("routing_replay/grpo", given, aggregation)
    expected, expected_gradient, _ = verl_loss("vanilla", given, aggregation)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, expected_gradient)


def test_minirl_in_verl_has_the_papers_gradient():
    given = responses()
    _, gradient, metrics = verl_loss(
        "routing_replay/minirl", given, "seq-mean-token-sum", weights=given["m"]
    )
    with torch.no_grad():
        r = (given["theta"] - given["old"]).exp()
        w = (given["theta"] - given["mu"]).exp()
        a = given["advantages"]
        kept = ~(((a > 0) & (r > 1 + EPS_HIGH)) | ((a < 0) & (r < 1 - EPS_LOW)))
        # Equation 7: the gradient of - M * sg[min(w, 5)] * A * log pi_theta, over all responses.
        expected = -kept.float() * w.clamp(max=5) * a * given["mask"] / NUM_SEQUENCES * DP_SIZE
    torch.testing.assert_close(gradient, expected)
    assert 0 < metrics["objective/clip_fraction"] < 1


def test_minirl_in_verl_names_the_missing_discrepancy():
    with pytest.raises(ObjectiveError, match="needs the rollout's log-probs"):
        verl_loss("routing_replay/minirl", responses(), "seq-mean-token-sum")


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_a_loss_in_verl_does_not_depend_on_the_split_into_microbatches(aggregation):
    given = responses()
    whole, gradient, _ = verl_loss("routing_replay/minirl", given, aggregation, given["m"])
    parts = [{k: v[half] for k, v in given.items()} for half in (slice(0, 2), slice(2, 4))]
    split = [verl_loss("routing_replay/minirl", part, aggregation, part["m"]) for part in parts]
    torch.testing.assert_close(split[0][0] + split[1][0], whole)
    torch.testing.assert_close(torch.cat([split[0][1], split[1][1]]), gradient)


def skyrl_loss(name, given):
    config = types.SimpleNamespace(
        policy_loss_type="regular",
        eps_clip_low=EPS_LOW,
        eps_clip_high=EPS_HIGH,
        off_policy_correction=types.SimpleNamespace(
            tis_ratio_type=None,
            sequence_mask_metric=None,
            outlier_token_is_threshold_low=None,
            outlier_token_is_threshold_high=None,
            token_mask_is_threshold_low=None,
            token_mask_is_threshold_high=None,
        ),
    )
    loss, metrics = ppo_utils.PolicyLossRegistry.get(name)(
        given["theta"],
        given["old"],
        given["advantages"],
        config=config,
        loss_mask=given["mask"],
        rollout_logprobs=given["mu"],
    )
    (gradient,) = torch.autograd.grad(loss, given["theta"])
    return loss.detach(), gradient, metrics


def test_grpo_has_the_value_and_gradient_of_skyrls_own_clipped_loss():
    given = responses()
    loss, gradient, _ = skyrl_loss("routing_replay/grpo", given)
    expected, expected_gradient, _ = skyrl_loss("regular", given)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, expected_gradient)


def test_minirl_in_skyrl_weighs_by_the_rollouts_log_probs():
    given = responses()
    _, gradient, _ = skyrl_loss("routing_replay/minirl_no_clip", given)
    with torch.no_grad():
        w = (given["theta"] - given["mu"]).exp()
        expected = -w.clamp(max=5) * given["advantages"] * given["mask"]
    torch.testing.assert_close(gradient, expected)
