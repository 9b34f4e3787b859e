"""Server features under which rows could be wrong: refused at start, each with its reason."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import ServerError

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
    harmless: tuple
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
        ("enable_two_batch_overlap",),
        OFF,
        "both halves of a batch write the same rows of one buffer. Turn it off",
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
)


def refuse_unsupported(server_args, moe_backend: str, settings) -> None:
    """Raise for the first unsupported feature that the server was started with.

    Args:
        server_args: SGLang's arguments.
        moe_backend: The MoE runner that SGLang chose, by its name.
        settings: The `CaptureSettings`.

    Raises:
        ServerError: What is on, why the rows would be wrong, and what to use instead.
    """
    for feature in FEATURES:
        for name in feature.names:
            value = getattr(server_args, name, None)
            if value not in feature.harmless:
                raise _refusal(f"{name}={value}", feature.why)
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
    # Ids and gates are gathered and cut by SGLang's own capture; the logits are not.
    for name, harmless in (("enable_dp_attention", OFF), ("moe_a2a_backend", (None, "none"))):
        value = getattr(server_args, name, None)
        if settings.has_logits and value not in harmless:
            raise _refusal(
                f"{name}={value} and the capture level logits",
                "a rank sees the logits of other tokens. Capture gates, or turn it off",
            )


def _refusal(what: str, why: str) -> ServerError:
    return ServerError(f"no true routes with {what}", fix=f"Reason: {why}")
