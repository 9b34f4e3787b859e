"""Preflight: configurations under which replay would be wrong, refused with cause and fix.

Every rule reads attributes by Megatron's names, so it works on a TransformerConfig and on the saved
arguments of a job alike.
"""

from __future__ import annotations

import importlib.metadata
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ..config import ReplayConfig
from ..errors import PreflightError

# `make test-versions` passed on these. Others within the range may work; beyond it the seam is
# missing, or unknown.
TESTED_VERSIONS = ("0.16.1", "0.17.1", "0.18.2", "0.19.2")
OLDEST, NEWEST = (0, 16, 1), (0, 20)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One result of the preflight.

    Args:
        name: Short stable name, for scripts.
        is_error: Replay would be wrong (True), or only something to know (False).
        what: What was found.
        cause: Why it matters.
        fix: What to do.
    """

    name: str
    is_error: bool
    what: str
    cause: str
    fix: str

    def __str__(self):
        kind = "error" if self.is_error else "warning"
        return f"{kind} {self.name}: {self.what}. {self.cause}. {self.fix}"


Rule = Callable[[object, ReplayConfig], Iterator[Finding]]
RULES: list[Rule] = []


def rule(function: Rule) -> Rule:
    RULES.append(function)
    return function


def examine(model_config, config: ReplayConfig | None = None, version: str | None = None):
    """All findings, errors first.

    Args:
        model_config: TransformerConfig, or any object with Megatron's argument names.
        config: Replay settings.
        version: Version of megatron-core; None reads the installed one.
    """
    found = [f for r in RULES for f in r(model_config, config or ReplayConfig())]
    found += list(_version(version or _installed_version()))
    return sorted(found, key=lambda f: not f.is_error)


def require(model_config, config: ReplayConfig) -> None:
    """Raise PreflightError on the first error; warn of the rest."""
    for finding in examine(model_config, config):
        if finding.is_error:
            raise PreflightError(
                f"{finding.what} ({finding.name})",
                where=finding.cause,
                fix=finding.fix,
            )
        warnings.warn(str(finding), stacklevel=3)


def _get(config, *names, default=None):
    """The first attribute that exists: TransformerConfig and arguments differ in a few names."""
    for name in names:
        if hasattr(config, name):
            return getattr(config, name)
    return default


@rule
def _dense_model(config, _):
    if not any(hasattr(config, name) for name in ("num_moe_experts", "num_experts")):
        yield Finding(
            name="no-moe-settings",
            is_error=True,
            what="the configuration names neither num_moe_experts nor num_experts",
            cause="It is another file, or Megatron's settings lie deeper in it",
            fix="Give the mapping that holds Megatron's names itself, such as moe_router_topk",
        )
    elif not _get(config, "num_moe_experts", "num_experts"):
        yield Finding(
            name="dense-model",
            is_error=True,
            what="the model has no experts",
            cause="There is no route to replay",
            fix="Leave routing replay disabled for dense models",
        )


@rule
def _router_fusion(config, replay):
    if _get(config, "moe_router_fusion") and not replay.unset_router_fusion:
        yield Finding(
            name="router-fusion",
            is_error=True,
            what="moe_router_fusion is on",
            cause="The fused kernel selects experts itself and never asks for replayed ones",
            fix="Drop --moe-router-fusion, or set unset_router_fusion to unset it while attached",
        )


@rule
def _balancing(config, _):
    types = _get(config, "moe_router_load_balancing_type", default="none")
    for kind in [types] if isinstance(types, str) else types:
        if kind in ("sinkhorn", "quantile_balancing"):
            yield Finding(
                name=kind.replace("_", "-"),
                is_error=True,
                what=f"moe_router_load_balancing_type is {kind}",
                cause="This router chooses experts by its own algorithm, not by the top-k seam",
                fix="Train with aux_loss, seq_aux_loss, expert bias or none",
            )


@rule
def _hash_layers(config, _):
    if _get(config, "moe_n_hash_layers"):
        yield Finding(
            name="hash-layers",
            is_error=True,
            what=f"the first {config.moe_n_hash_layers} layers route by a hash of the token",
            cause="They never ask for replayed experts; no released megatron-core has them",
            fix="Use a released version, in which every MoE layer has a learned router",
        )


@rule
def _flex(config, _):
    if _get(config, "moe_token_dispatcher_type") == "flex":
        yield Finding(
            name="flex-dispatcher",
            is_error=False,
            what="moe_token_dispatcher_type is flex",
            cause="It finds the experts anew as the top-k of the gates: a replayed expert whose "
            "gate underflows to 0 is lost, after our receipt",
            fix="Use alltoall, or keep --moe-router-dtype fp32 and watch live_mass",
        )


@rule
def _capacity(config, _):
    if _get(config, "moe_expert_capacity_factor") is not None:
        yield Finding(
            name="capacity",
            is_error=True,
            what="moe_expert_capacity_factor is set",
            cause="Tokens beyond the capacity are dropped after replay chose their experts",
            fix="Train without a capacity factor; inference engines drop no tokens",
        )


@rule
def _random_logits(config, _):
    forced = _get(config, "moe_router_force_biased") is not None
    if forced or _get(config, "moe_router_force_load_balancing"):
        yield Finding(
            name="forced-routing",
            is_error=True,
            what="the router's logits are replaced by random ones (moe_router_force_...)",
            cause="Gates of replayed experts would be random",
            fix="These options are for benchmarks only: drop them",
        )


@rule
def _cuda_graphs(config, _):
    impl = _get(config, "cuda_graph_impl", default="none")
    old = _get(config, "enable_cuda_graph") or _get(config, "external_cuda_graph")
    if (impl in (None, "none") and not old) or not _captures_router(config, impl):
        return
    yield Finding(
        name="cuda-graph",
        is_error=True,
        what="a CUDA graph captures the router",
        cause="The graph would replay the routes that were present when it was captured",
        fix="Leave moe and moe_router out of --cuda-graph-modules (attn alone is fine)",
    )


def _captures_router(config, impl) -> bool:
    modules = _get(config, "cuda_graph_modules", "cuda_graph_scope", default="full")
    modules = [modules] if isinstance(modules, str) or modules is None else modules
    names = {str(getattr(m, "name", m)).lower() for m in modules}
    without_router = {"attn", "mlp", "mamba", "moe_preprocess"}
    return impl == "full_iteration" or not names or not names <= without_router


@rule
def _expert_overlap(config, _):
    if _get(config, "overlap_moe_expert_parallel_comm"):
        yield Finding(
            name="expert-overlap",
            is_error=True,
            what="overlap_moe_expert_parallel_comm is on",
            cause="Its schedule runs layers of two microbatches interleaved, outside the model's "
            "forward, so a router cannot tell whose tokens it sees",
            fix="Drop --overlap-moe-expert-parallel-comm",
        )


@rule
def _jitter(config, _):
    if _get(config, "moe_input_jitter_eps") is not None:
        yield Finding(
            name="input-jitter",
            is_error=False,
            what="moe_input_jitter_eps is set",
            cause="The gates of replayed experts are noisy, and differ between passes",
            fix="Drop --moe-input-jitter-eps for reinforcement learning",
        )


@rule
def _statistics(config, _):
    if _get(config, "moe_router_enable_expert_bias"):
        yield Finding(
            name="expert-bias",
            is_error=False,
            what="the expert bias is updated from replayed loads",
            cause="Megatron counts the dispatched tokens, which are the replayed ones",
            fix="Set --moe-router-bias-update-rate 0 to keep the rollout's bias",
        )


@rule
def _stock_replay(config, _):
    if _get(config, "moe_enable_routing_replay"):
        yield Finding(
            name="stock-replay",
            is_error=False,
            what="moe_enable_routing_replay is set: Megatron's own replay objects exist as well",
            cause="They work outside our scopes; switched on inside one they raise a ReplayError",
            fix="Drop --moe-enable-routing-replay: routing_replay does not need it",
        )


@rule
def _mtp(config, _):
    if _get(config, "mtp_num_layers"):
        yield Finding(
            name="mtp",
            is_error=False,
            what="the model has multi-token-prediction layers",
            cause="No engine returns routes for them: their routers always route live",
            fix="Nothing to do; the receipt covers the decoder's layers",
        )


def _version(version: str) -> Iterator[Finding]:
    numbers = tuple(int(part) for part in version.split(".")[:3] if part.isdigit())
    tested = ", ".join(TESTED_VERSIONS)
    if numbers < OLDEST or numbers >= NEWEST:
        yield Finding(
            name="version",
            is_error=True,
            what=f"megatron-core {version} is not supported",
            cause="The replay seam of TopKRouter exists from 0.16.1 and was read up to 0.19",
            fix=f"Install one of the tested versions: {tested}",
        )
    elif version not in TESTED_VERSIONS:
        yield Finding(
            name="version",
            is_error=False,
            what=f"megatron-core {version} was not tested",
            cause="Its replay seam is the one that we know, but the suite did not run on it",
            fix=f"Tested versions: {tested}",
        )


def _installed_version() -> str:
    # Not megatron.core.__version__: it may carry the commit of whatever checkout is current.
    return importlib.metadata.version("megatron-core")
