"""What each adapter relies on in its framework: one list for adapters, doctor and contract tests.

A seam is written as `name`, or as `name(parameter, ...)` where the adapter counts on parameters.
"""

from __future__ import annotations

from ..errors import PreflightError, unknown_name
from .seams import Framework, Switch, compare, seams

RAY_HOOK = Switch(
    setting="RAY_RUNTIME_ENV_HOOK",
    value="routing_replay.adapters.ray.runtime_env_hook",
    cause="Without it no worker process is patched, and the framework's own replay runs",
)
MODE = Switch(
    setting="ROUTING_REPLAY_MODE",
    cause="Nothing is replayed; every worker reads it: set it in the job's runtime environment",
)
INTERLEAVED = Switch(
    setting="--overlap-moe-expert-parallel-comm",
    is_needed=False,
    cause="Forwards of two microbatches are interleaved: replay refuses the job",
)

MEGATRON_LM = Framework(
    package="megatron",
    distribution="megatron-core",
    tested="megatron-core 0.19.2",
    seams=seams(
        {
            "megatron.training.training": (
                "get_forward_backward_func",
                "train_step(forward_step_func, data_iterator, model)",
            )
        }
    ),
    switches=(INTERLEAVED,),
)

MEGATRON_BRIDGE = Framework(
    package="megatron",
    distribution="megatron-bridge",
    tested="megatron-bridge 0.6.2",
    seams=seams(
        {
            "megatron.bridge.training.pretrain": (
                "pretrain(config, forward_step_func, callbacks)",
            ),
            "megatron.bridge.training.callbacks": (
                "Callback.on_train_step_start(context)",
                "Callback.on_train_step_end(context)",
                "Callback.on_train_end(context)",
            ),
            "megatron.bridge.training.state": (
                "GlobalState.tensorboard_logger",
                "GlobalState.wandb_logger",
            ),
        }
    ),
)

VERL = Framework(
    package="verl",
    distribution="verl",
    tested="0.9.1",
    seams=seams(
        {
            "verl.workers.engine.megatron.transformer_impl": (
                "MegatronEngineWithLMHead.forward_step(batch_iter, model)",
                "MegatronEngineWithLMHead.prepare_model_inputs(batch)",
                "MegatronEngine.initialize",
                "MegatronEngine.disable_adapter",
                "MegatronEngine.forward_backward_batch(data, loss_function, forward_only)",
                "MegatronEngine._get_context_parallel_layout(unwrapped_model)",
            ),
            "verl.models.mcore.util": (
                "preprocess_thd_engine(input_ids, pre_process, use_fp8_padding, min_local_rows, "
                "pad_to_length_bucket, cp_layout)",
                "preprocess_bshd_engine(input_ids, pre_process, use_fp8_padding, "
                "forced_max_seqlen)",
            ),
            "verl.workers.engine.base": (
                "EngineRegistry.register(model_type, backend, device, vendor)",
            ),
            "verl.trainer.ppo.core_algos": ("register_policy_loss(name)",),
        }
    ),
    switches=(
        MODE,
        Switch(
            setting="VERL_USE_EXTERNAL_PLUGINS",
            value="none",
            is_needed=False,
            cause="verl loads no plugin: nothing is replayed",
        ),
        Switch(
            setting="actor_rollout_ref.rollout.enable_rollout_routing_replay",
            value="True",
            mode="R3",
            cause="The rollout returns no routes",
        ),
        Switch(
            setting="algorithm.rollout_correction.bypass_mode",
            value="True",
            is_needed=False,
            mode="R2",
            cause="The old policy's pass, which R2 records, does not run",
        ),
        Switch(
            setting="actor_rollout_ref.actor.megatron.dynamic_context_parallel",
            value="True",
            is_needed=False,
            cause="Sequences move between data-parallel ranks: the adapter refuses the job",
        ),
        *(
            Switch(
                setting="actor_rollout_ref.actor.megatron.router_replay.mode",
                value=mode,
                is_needed=False,
                cause="verl would replay as well: the adapter refuses the job",
            )
            for mode in ("R2", "R3")
        ),
    ),
)

_SKYRL = "skyrl.backends.skyrl_train"
SKYRL = Framework(
    package="skyrl",
    distribution="skyrl",
    tested="0.4.0",
    seams=seams(
        {
            f"{_SKYRL}.workers.megatron.megatron_model_wrapper": (
                "get_forward_backward_func",
                "setup_per_microbatch_replay_forward",
                "setup_per_microbatch_replay_backward",
                "router_replay_schedule",
                "get_model_config",
                "PackedTensor",
            ),
            f"{_SKYRL}.utils.replay_utils": (
                "setup_per_microbatch_replay_forward(rollout_expert_indices, router_padding_mask, "
                "attention_mask, model, model_config, metadata_layout)",
                "scatter_router_padding_mask_for_model(router_padding_mask, model, model_config)",
            ),
            f"{_SKYRL}.distributed.megatron.token_metadata": (
                "align_packed_token_metadata(metadata, layout, padding_value)",
            ),
            f"{_SKYRL}.distributed.megatron.megatron_utils": (
                "make_batch_generator(batches, vpp_size)",
            ),
            f"{_SKYRL}.utils.ppo_utils": ("register_policy_loss(name)",),
        }
    ),
    switches=(
        RAY_HOOK,
        MODE,
        Switch(
            setting="trainer.policy.megatron_config.moe_enable_routing_replay",
            value="true",
            cause="It carries the routes and marks the policy; the adapter takes them over",
        ),
        Switch(
            setting="generator.inference_engine.enable_return_routed_experts",
            value="true",
            cause="SkyRL refuses its replay key without it",
        ),
        Switch(
            setting="trainer.ref.megatron_config.moe_enable_routing_replay",
            value="true",
            is_needed=False,
            cause="The reference would replay the actor's routes",
        ),
    ),
)

_NEMO = "nemo_rl.models.megatron"
NEMO_RL = Framework(
    package="nemo_rl",
    tested="7ea279ab (2026-08-22)",
    seams=seams(
        {
            f"{_NEMO}.data": ("get_microbatch_iterator(data, cfg, mbs, straggler_timer)",),
            "nemo_rl.models.policy.workers.megatron_policy_worker": ("get_microbatch_iterator",),
            f"{_NEMO}.router_replay": (
                "set_router_replay_forward(model, routed_experts)",
                "set_router_replay_backward(model)",
                "clear_router_replay(model)",
            ),
            f"{_NEMO}.train": (
                "set_router_replay_forward",
                "set_router_replay_backward",
                "clear_router_replay",
                "get_forward_backward_func",
            ),
        }
    ),
    switches=(
        RAY_HOOK,
        MODE,
        Switch(
            setting="policy.router_replay.enabled",
            value="true",
            cause="It carries the routes; the adapter takes them over",
        ),
    ),
)


def _slime(package: str, *, tested: str, names: dict[str, tuple[str, ...]]) -> Framework:
    """slime and its fork miles: the same seams, but for `names`."""
    backend = f"{package}.backends.megatron_utils"
    shared = {
        f"{backend}.model": (
            "get_batch",
            "get_forward_backward_func",
            "forward_only(model, data_iterator, store_prefix)",
        ),
        f"{backend}.actor": ("forward_only",),
        f"{backend}.initialize": ("init",),
    }
    return Framework(
        package=package,
        tested=tested,
        seams=seams(shared | names),
        switches=(
            Switch(
                setting="--custom-megatron-init-path",
                value="routing_replay.adapters.slime.init",
                cause="Nothing loads the adapter",
            ),
            Switch(
                setting="--use-rollout-routing-replay",
                mode="R3",
                cause="It makes the rollout return routes; the adapter takes them over",
            ),
            Switch(
                setting="--use-rollout-logprobs",
                is_needed=False,
                mode="R2",
                cause="The old policy's pass, which R2 records, does not run",
            ),
            INTERLEAVED,
        ),
    )


SLIME = _slime(
    "slime",
    tested="624b824a (2026-08-21)",
    names={
        "slime.backends.megatron_utils.data": (
            "get_batch(data_iterator, keys, pad_multiplier, allgather_cp)",
        ),
        "slime.observability.logging_utils": ("log(args, metrics, step_key)",),
    },
)
MILES = _slime(
    "miles",
    tested="31f1ca96 (2026-08-21)",
    names={
        "miles.backends.training_utils.data": (
            "get_batch(data_iterator, keys, pad_multiplier, qkv_format)",
        ),
        "miles.utils.tracking_utils.tracking": ("log(args, metrics, step_key)",),
    },
)

FRAMEWORKS = {
    "megatron-lm": MEGATRON_LM,
    "megatron-bridge": MEGATRON_BRIDGE,
    "verl": VERL,
    "skyrl": SKYRL,
    "slime": SLIME,
    "miles": MILES,
    "nemo-rl": NEMO_RL,
}


def framework(name: str) -> Framework:
    """Return the entry of a framework.

    Raises:
        ConfigError: No adapter has this name.
    """
    if name not in FRAMEWORKS:
        raise unknown_name("framework", name, FRAMEWORKS)
    return FRAMEWORKS[name]


def require(name: str) -> None:
    """Raise PreflightError unless the installed framework has what its adapter relies on."""
    differences = list(compare(framework(name)))
    if differences:
        raise PreflightError(
            f"{name} is another version than the adapter was written for",
            expected=FRAMEWORKS[name].tested,
            got="; ".join(differences),
            fix=f"Use the tested version, or see docs/adopt/{name.replace('-', '_')}.md",
        )
