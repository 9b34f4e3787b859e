"""Preflight: configurations under which replay would be wrong, refused with cause and fix.

Every rule reads attributes by Megatron's names, so it works on a TransformerConfig and on the saved
arguments of a job alike.
"""

from __future__ import annotations

import importlib.metadata
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from packaging.version import Version

from ..config import ReplayConfig
from ..errors import PreflightError
from ..findings import Finding

# `make test-versions` passed on these. Others within the range may work; beyond it the seam is
# missing, or unknown.
TESTED_VERSIONS = ("0.16.1", "0.17.1", "0.18.2", "0.19.2")
OLDEST, NEWEST = Version("0.16.1"), Version("0.20")

Rule = Callable[[Any, ReplayConfig], Iterator[Finding]]
RULES: list[Rule] = []


def rule(function: Rule) -> Rule:
    """Add a rule to the preflight."""
    RULES.append(function)
    return function


def examine(
    model_config: object, config: ReplayConfig | None = None, version: str | None = None
) -> list[Finding]:
    """Return all findings, errors first.

    Args:
        model_config: TransformerConfig, or any object with Megatron's argument names.
        config: Replay settings.
        version: Version of megatron-core; None reads the installed one.
    """
    findings = [f for r in RULES for f in r(model_config, config or ReplayConfig())]
    findings += _version(version or str(installed_version()))
    return sorted(findings, key=lambda finding: finding.rank)


def require(model_config: object, config: ReplayConfig) -> None:
    """Raise PreflightError on the first error; warn of the rest."""
    for finding in examine(model_config, config):
        if finding.is_error:
            raise finding.to_error(PreflightError)
        warnings.warn(str(finding), stacklevel=3)


def _get(config: object, *names: str, default: Any = None) -> Any:
    """The first attribute that exists: TransformerConfig and arguments differ in a few names."""
    for name in names:
        if hasattr(config, name):
            return getattr(config, name)
    return default


@rule
def _dense_model(config: Any, _: ReplayConfig) -> Iterator[Finding]:
    if not any(hasattr(config, name) for name in ("num_moe_experts", "num_experts")):
        yield Finding(
            name="no-moe-settings",
            level="error",
            what="the configuration names neither num_moe_experts nor num_experts",
            cause="It is another file, or Megatron's settings lie deeper in it",
            fix="Give the mapping that holds Megatron's names itself, such as moe_router_topk",
        )
    elif not _get(config, "num_moe_experts", "num_experts"):
        yield Finding(
            name="dense-model",
            level="error",
            what="the model has no experts",
            cause="There is no route to replay",
            fix="Leave routing replay disabled for dense models",
        )


@rule
def _router_fusion(config: Any, replay: ReplayConfig) -> Iterator[Finding]:
    if _get(config, "moe_router_fusion") and not (replay.unset_router_fusion or replay.kernel):
        yield Finding(
            name="router-fusion",
            level="error",
            what="moe_router_fusion is on",
            cause="The fused kernel selects experts itself and never asks for replayed ones",
            fix="Drop --moe-router-fusion, or set unset_router_fusion to unset it while attached",
        )


@rule
def _balancing(config: Any, _: ReplayConfig) -> Iterator[Finding]:
    types = _get(config, "moe_router_load_balancing_type", default="none")
    for kind in [types] if isinstance(types, str) else types:
        if kind in ("sinkhorn", "quantile_balancing"):
            yield Finding(
                name=kind.replace("_", "-"),
                level="error",
                what=f"moe_router_load_balancing_type is {kind}",
                cause="This router chooses experts by its own algorithm, not by the top-k seam",
                fix="Train with aux_loss, seq_aux_loss, expert bias or none",
            )


@rule
def _hash_layers(config: Any, _: ReplayConfig) -> Iterator[Finding]:
    if _get(config, "moe_n_hash_layers"):
        yield Finding(
            name="hash-layers",
            level="error",
            what=f"the first {config.moe_n_hash_layers} layers route by a hash of the token",
            cause="They never ask for replayed experts; no released megatron-core has them",
            fix="Use a released version, in which every MoE layer has a learned router",
        )


@rule
def _capacity(config: Any, _: ReplayConfig) -> Iterator[Finding]:
    if _get(config, "moe_expert_capacity_factor") is not None:
        yield Finding(
            name="capacity",
            level="error",
            what="moe_expert_capacity_factor is set",
            cause="Tokens beyond the capacity are dropped after replay chose their experts",
            fix="Train without a capacity factor; inference engines drop no tokens",
        )
    if _get(config, "moe_expert_rank_capacity_factor") is not None:
        yield Finding(
            name="rank-capacity",
            level="error",
            what="moe_expert_rank_capacity_factor is set",
            cause="The dispatcher drops tokens beyond a rank's budget after replay chose their "
            "experts; with moe_paged_stash an overflow also runs the step a second time",
            fix="Train without a rank capacity factor, and so without moe_paged_stash",
        )


@rule
def _random_logits(config: Any, _: ReplayConfig) -> Iterator[Finding]:
    forced = _get(config, "moe_router_force_biased") is not None
    if forced or _get(config, "moe_router_force_load_balancing"):
        yield Finding(
            name="forced-routing",
            level="error",
            what="the router's logits are replaced by random ones (moe_router_force_...)",
            cause="Gates of replayed experts would be random",
            fix="These options are for benchmarks only: drop them",
        )


@rule
def _cuda_graphs(config: Any, replay: ReplayConfig) -> Iterator[Finding]:
    impl = _get(config, "cuda_graph_impl", default="none")
    old = _get(config, "enable_cuda_graph") or _get(config, "external_cuda_graph")
    if (impl in (None, "none") and not old) or not _captures_router(config, impl):
        return
    cause = _beyond_buffers(config, impl)
    if cause or not replay.captured_routers:
        can_replay = "" if cause else "; or set captured_routers, which has not run on a GPU"
        yield Finding(
            name="cuda-graph",
            level="error",
            what="a CUDA graph captures the router",
            cause=cause or "The graph would replay the routes that were present at its capture",
            fix="Leave moe and moe_router out of --cuda-graph-modules (attn alone is fine)"
            + can_replay,
        )
        return
    yield from _captured_routers(config, replay)


def _captures_router(config: Any, impl: str | None) -> bool:
    names = _graph_modules(config)
    return impl == "full_iteration" or not names or not names <= _WITHOUT_ROUTER


def _graph_modules(config: Any) -> set[str]:
    modules = _get(config, "cuda_graph_modules", "cuda_graph_scope", default="full")
    modules = [modules] if isinstance(modules, str) or modules is None else modules
    return {str(getattr(m, "name", m)).lower() for m in modules}


_WITHOUT_ROUTER = {"attn", "mlp", "mamba", "moe_preprocess"}


def _beyond_buffers(config: Any, impl: str | None) -> str | None:
    """Why buffers that are filled before a chunk's forward are not enough; None if they are."""
    if impl not in ("local", "transformer_engine"):
        return "One graph holds all microbatches: nothing runs before each to bring its routes"
    names = _graph_modules(config)
    if "moe_router" not in names or not names <= _WITHOUT_ROUTER | {"moe_router"}:
        return "Graphs of whole MoE layers need a capacity factor, which drops tokens after replay"
    granularity = _get(config, "recompute_granularity")
    recomputed = _get(config, "recompute_modules") or []
    if granularity == "full" or (granularity == "selective" and "moe" in recomputed):
        return "A router that is recomputed runs when its buffers are of another microbatch"
    return None


def _captured_routers(config: Any, replay: ReplayConfig) -> Iterator[Finding]:
    """What else a captured router must not be asked for."""
    if replay.agreement_every:
        yield Finding(
            name="captured-agreement",
            level="error",
            what="agreement with live routing is on, and CUDA graphs capture the routers",
            cause="A graph makes no call, so nothing sees the router's live scores",
            fix="Set agreement_every to 0",
        )
    if _get(config, "moe_router_fusion") and not replay.kernel:
        yield Finding(
            name="captured-fusion",
            level="error",
            what="moe_router_fusion is on, and CUDA graphs capture the routers",
            cause="A graph keeps the fused kernel, which never asks for replayed experts",
            fix="Set kernel, which replays in its place, or drop --moe-router-fusion",
        )


@rule
def _expert_overlap(config: Any, _: ReplayConfig) -> Iterator[Finding]:
    if _get(config, "overlap_moe_expert_parallel_comm"):
        yield Finding(
            name="expert-overlap",
            level="error",
            what="overlap_moe_expert_parallel_comm is on",
            cause="Its schedule runs layers of two microbatches interleaved, outside the model's "
            "forward, so a router cannot tell whose tokens it sees",
            fix="Drop --overlap-moe-expert-parallel-comm",
        )


@rule
def _jitter(config: Any, _: ReplayConfig) -> Iterator[Finding]:
    if _get(config, "moe_input_jitter_eps") is not None:
        yield Finding(
            name="input-jitter",
            level="warning",
            what="moe_input_jitter_eps is set",
            cause="The gates of replayed experts are noisy, and differ between passes",
            fix="Drop --moe-input-jitter-eps for reinforcement learning",
        )


@rule
def _statistics(config: Any, _: ReplayConfig) -> Iterator[Finding]:
    if _get(config, "moe_router_enable_expert_bias"):
        yield Finding(
            name="expert-bias",
            level="warning",
            what="the expert bias is updated from replayed loads",
            cause="Megatron counts the dispatched tokens, which are the replayed ones",
            fix="Set --moe-router-bias-update-rate 0 to keep the rollout's bias",
        )


@rule
def _stock_replay(config: Any, _: ReplayConfig) -> Iterator[Finding]:
    if _get(config, "moe_enable_routing_replay"):
        yield Finding(
            name="stock-replay",
            level="warning",
            what="moe_enable_routing_replay is set: Megatron's own replay objects exist as well",
            cause="They work outside our scopes; switched on inside one they raise a ReplayError",
            fix="Drop --moe-enable-routing-replay: routing_replay does not need it",
        )


@rule
def _mtp(config: Any, _: ReplayConfig) -> Iterator[Finding]:
    if _get(config, "mtp_num_layers"):
        yield Finding(
            name="mtp",
            level="warning",
            what="the model has multi-token-prediction layers",
            cause="No engine returns routes for them: their routers always route live",
            fix="Nothing to do; the receipt covers the decoder's layers",
        )


def _version(version: str) -> Iterator[Finding]:
    tested = ", ".join(TESTED_VERSIONS)
    # A release candidate has its release's seam; a build of a commit says so after a plus.
    release = Version(Version(version).base_version)
    if release < OLDEST or release >= NEWEST:
        yield Finding(
            name="version",
            level="error",
            what=f"megatron-core {version} is not supported",
            cause="The replay seam of TopKRouter exists from 0.16.1 and was read up to 0.19",
            fix=f"Install one of the tested versions: {tested}",
        )
    elif version not in TESTED_VERSIONS:
        yield Finding(
            name="version",
            level="warning",
            what=f"megatron-core {version} was not tested",
            cause="Its replay seam is the known one, but the suite did not run on it",
            fix=f"Tested versions: {tested}",
        )


def installed_version() -> Version:
    """Return the version of the installed megatron-core."""
    # Not megatron.core.__version__: it may carry the commit of whatever checkout is current.
    return Version(importlib.metadata.version("megatron-core"))
