"""Server features under which rows could be wrong: refused at start, each with its reason."""

from __future__ import annotations

from ..errors import ServerError

# Their kernels choose the experts themselves and never report them: every row would be zero.
IN_KERNEL_BACKENDS = ("triton_kernel", "triton_kernels", "flashinfer_trtllm", "flashinfer_mxfp4")


def refuse_unsupported(server_args, settings) -> None:
    """Raise for the first unsupported feature that the server was started with.

    Args:
        server_args: SGLang's arguments, whatever its version; a missing one is not set.
        settings: The `CaptureSettings`.

    Raises:
        ServerError: What is on, why the rows would be wrong, and what to use instead.
    """

    def value(name):
        return getattr(server_args, name, None)

    rules = [
        (
            (value("pp_size") or 1) > 1,
            "pipeline parallelism (--pp-size)",
            "every stage sees its own layers only. Use tensor parallelism",
        ),
        (
            bool(value("enable_hierarchical_cache")),
            "the hierarchical cache (--enable-hierarchical-cache)",
            "prefixes come back from the host in other slots, without their rows. Turn it off",
        ),
        (
            value("disaggregation_mode") not in (None, "null"),
            "prefill/decode disaggregation (--disaggregation-mode)",
            "the decoding server never saw the prompt's rows. Use undivided servers",
        ),
        (
            bool(value("enable_two_batch_overlap")) or bool(value("enable_single_batch_overlap")),
            "batch overlap (--enable-two-batch-overlap)",
            "both halves of a batch write the same rows of one buffer. Turn it off",
        ),
        (
            value("speculative_algorithm") is not None,
            "speculative decoding (--speculative-algorithm)",
            "accepted tokens move between slots without their rows. Turn it off for rollouts",
        ),
        (
            value("moe_runner_backend") in IN_KERNEL_BACKENDS,
            f"--moe-runner-backend {value('moe_runner_backend')}",
            "it routes inside its kernel and reports nothing. Use triton or "
            "flashinfer_trtllm_routed",
        ),
        (
            (value("chunked_prefill_size") or 1) < 0,
            "unchunked prefill (--chunked-prefill-size -1)",
            "the capture's buffer has the size of a chunk. Name a size",
        ),
        (
            settings.has_logits and bool(value("enable_dp_attention")),
            "logits under data-parallel attention (--enable-dp-attention)",
            "a rank sees the tokens of all ranks. Capture gates, or turn it off",
        ),
    ]
    for is_on, what, why in rules:
        if is_on:
            raise ServerError(f"no true routes with {what}", fix=f"Reason: {why}")
