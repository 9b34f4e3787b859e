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
    Feature(("pp_size",), (None, 1), "every stage sees its own layers only. Use --tp-size"),
    Feature(
        (
            *("enable_hierarchical_cache", "enable_lmcache", "enable_flexkv", "enable_hisparse"),
            "enable_unified_cache_external_linker",
        ),
        OFF,
        "prefixes come back from outside in other slots, without their rows. Turn it off",
    ),
    Feature(
        ("disaggregation_mode",),
        (None, "null"),
        "the decoding server never saw the prompt's rows. Use undivided servers",
    ),
    Feature(
        ("enable_two_batch_overlap", "enable_pdmux"),
        OFF,
        "two batches at a time write the same rows of one buffer. Turn it off",
    ),
    Feature(
        ("speculative_algorithm",),
        OFF,
        "accepted tokens move between slots without their rows. Turn it off for rollouts",
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
    if settings.has_logits or settings.has_weights:
        _refuse(server_args, UNGATHERED_FEATURES, f" and the capture level {settings.level}")
    if moe_backend in IN_KERNEL_BACKENDS:
        raise _refusal(
            f"moe_runner_backend={moe_backend}",
            "it routes inside its kernel and reports nothing. Use triton or "
            "flashinfer_trtllm_routed",
        )
    if (server_args.chunked_prefill_size or 0) < 0:
        raise _refusal(
            f"chunked_prefill_size={server_args.chunked_prefill_size}",
            "the capture's buffer has the size of a chunk. Name a size",
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
