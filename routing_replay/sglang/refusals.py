"""Server features under which rows could be wrong: refused at start, each with its reason."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..capture import CaptureSettings
from ..errors import ServerError
from . import versions

# Their kernels choose the experts themselves and never report them: every row would be zero.
IN_KERNEL_BACKENDS = (
    "triton_kernel",
    "flashinfer_trtllm",
    "flashinfer_mxfp4",
    "experimental_sgl_trtllm",
)


@dataclass(frozen=True)
class Feature:
    """Arguments of SGLang that must keep their defaults, and why.

    Args:
        names: Of the arguments, in whatever version; one that a version lacks is not set.
        harmless: Values under which the rows are true.
        why: What would go wrong, and what to do instead.
    """

    names: tuple[str, ...]
    harmless: tuple[object, ...]
    why: str


OFF = (None, False)
FEATURES = (
    Feature(
        ("enable_hisparse",),
        OFF,
        "decoded tokens change their slots, and nothing says which. Turn it off",
    ),
    Feature(
        ("enable_two_batch_overlap", "enable_pdmux"),
        OFF,
        "two batches at a time write the same rows of one buffer. Turn it off",
    ),
    Feature(
        ("dllm_algorithm",), OFF, "a diffusion model visits a token many times, a row holds one"
    ),
    Feature(
        ("attn_cp_size", "dcp_size"), (None, 1), "a rank sees a part of the tokens. Use --tp-size"
    ),
    Feature(
        ("enable_dp_attention",),
        OFF,
        "SGLang cuts a rank's rows at another offset than it wrote them (sglang issue 30712). "
        "Use --tp-size, or several servers",
    ),
    Feature(
        ("moe_a2a_backend",),
        (None, "none", "deepep", "deepep_v2"),
        "SGLang gathers the rows of scattered tokens for DeepEP only. Use deepep or none",
    ),
)
# Read in versions.COVERS_FEATURES and later.
NEWER_FEATURES = (
    Feature(
        (
            *("enable_hierarchical_cache", "enable_lmcache", "enable_flexkv"),
            "enable_unified_cache_external_linker",
        ),
        OFF,
        "prefixes come back from outside in other slots, without their rows. Turn it off, or take "
        "SGLang 0.5.23",
    ),
    Feature(
        ("speculative_algorithm",),
        OFF,
        "accepted tokens move between slots without their rows. Turn it off, or take SGLang 0.5.23",
    ),
    Feature(
        ("disaggregation_mode",),
        (None, "null"),
        "the decoding server never saw the prompt's rows. Use undivided servers, or take SGLang "
        "0.5.23",
    ),
    Feature(
        ("pp_size",),
        (None, 1),
        "every stage sees its own layers only. Use --tp-size, or take SGLang 0.5.23",
    ),
)
STAGED_FEATURES = (
    Feature(("pp_size",), (None, 1), "logits of the other stages' layers do not travel. Use gates"),
)
UNGATHERED_FEATURES = (
    Feature(
        ("moe_a2a_backend",),
        (None, "none"),
        "a rank sees the values of a part of the tokens, and nothing gathers them",
    ),
)


def refuse_unsupported(server_args: Any, moe_backend: str, settings: CaptureSettings) -> None:
    """Raise for the first unsupported feature that the server was started with.

    Args:
        server_args: SGLang's arguments.
        moe_backend: The MoE runner that SGLang chose, by its name.
        settings: The server's capture level.

    Raises:
        ServerError: What is on, why the rows would be wrong, and what to use instead.
    """
    _refuse(server_args, FEATURES)
    if versions.installed() < versions.COVERS_FEATURES:
        _refuse(server_args, NEWER_FEATURES)
    if settings.has_logits:
        _refuse(server_args, STAGED_FEATURES, f" and the capture level {settings.level}")
    if settings.has_logits or settings.has_weights:
        _refuse(server_args, UNGATHERED_FEATURES, f" and the capture level {settings.level}")
    if moe_backend in IN_KERNEL_BACKENDS:
        raise _refusal(
            f"moe_runner_backend={moe_backend}",
            "it routes inside its kernel and reports nothing. Use triton or "
            "flashinfer_trtllm_routed",
        )
    if settings.hooks_routers and versions.has_compiled_prefill(server_args):
        raise _refusal(
            f"prefill graphs of torch.compile and the capture level {settings.level}",
            "it would trace the capture. Turn them off (--disable-piecewise-cuda-graph, or "
            "--cuda-graph-backend-prefill breakable), or capture ids",
        )


def _refuse(server_args: Any, features: tuple[Feature, ...], suffix: str = "") -> None:
    for feature in features:
        for name in feature.names:
            value = getattr(server_args, name, None)
            if value not in feature.harmless:
                raise _refusal(f"{name}={value}{suffix}", feature.why)


def _refusal(what: str, why: str) -> ServerError:
    return ServerError(f"the capture returns no true routes with {what}", fix=f"Reason: {why}")
