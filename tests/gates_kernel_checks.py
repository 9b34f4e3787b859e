"""What is checked of the gates-capture kernel; runs where the kernel runs."""

import oracles_kernels
import torch

from routing_replay.errors import ServerError
from routing_replay.kernels import require_device
from routing_replay.sglang.gates import gate_probs, pack, unpack

UNTOUCHED = 0x07070707


def inputs(num_tokens, num_experts, top_k, dtype, device):
    generator = torch.Generator().manual_seed(num_experts + top_k)
    logits_TE = 3 * torch.randn(num_tokens, num_experts, generator=generator)
    ids_TK = torch.rand(num_tokens, num_experts, generator=generator).argsort(1)[:, :top_k].int()
    ids_TK[-2] = -1  # rows that only fill a graph's batch
    ids_TK[-1] = 30000
    return logits_TE.to(device, dtype), ids_TK.to(device)


def check_layer(device, num_experts, top_k, function, dtype):
    """One layer of a buffer with shared columns: packed rows, and nothing around them."""
    from routing_replay.kernels.gates import NUM_WARPS, capture_gates
    from routing_replay.kernels.scores import tile_of

    require_device(torch.device(device))
    num_tokens = 2 * tile_of(num_experts, NUM_WARPS)[0] + 3
    logits_TE, ids_TK = inputs(num_tokens, num_experts, top_k, dtype, device)
    buffer_TLW = torch.full(
        (num_tokens + 4, 3, top_k + 1), UNTOUCHED, dtype=torch.int32, device=device
    )
    capture_gates(logits_TE, ids_TK, function, buffer_TLW[:num_tokens, 1, :top_k])
    packed_TK = buffer_TLW[:num_tokens, 1, :top_k].clone()
    buffer_TLW[:num_tokens, 1, :top_k] = UNTOUCHED
    wrong = [] if (buffer_TLW == UNTOUCHED).all() else ["the buffer around the rows"]

    ids, gates = unpack(packed_TK[:, None])
    truth = true_gates(logits_TE, ids_TK, function)
    torch_form = unpack(pack(ids_TK, gate_probs(logits_TE, ids_TK, function))[:, None])
    if not torch.equal(ids, torch_form[0]):
        wrong.append("ids")
    error = (gates[:, 0].double() - truth).abs()
    # float16 rounds a gate to half a unit of its 11 bits; below 2^-14 to half of 2^-24.
    allowed = truth * 2**-11 + 2**-25
    # Float32 may fall on the other side of a tie, by as much as its own rounding.
    if not (error <= allowed + truth * 2**-20).all():
        wrong.append(("gates", (error / allowed).max().item()))
    return wrong


def true_gates(logits_TE, ids_TK, function):
    """Probability over all experts, in float64."""
    logits_TE = logits_TE.double()
    if function == "softmax":
        scores_TE = logits_TE.exp()
    else:
        scores_TE = oracles_kernels.independent_scores(logits_TE, function)
    probs_TE = scores_TE / scores_TE.sum(-1, keepdim=True)
    return probs_TE.gather(1, ids_TK.clamp(0, logits_TE.shape[1] - 1).long())


def check_strides(device):
    from routing_replay.kernels.gates import capture_gates

    logits_TE, ids_TK = inputs(7, 16, 4, torch.float32, device)
    wide_logits_TE = torch.cat([logits_TE, logits_TE + 9], 1)
    wide_ids_TK = torch.cat([ids_TK, ids_TK * 0 + 5], 1)
    packed_TK = torch.zeros(7, 4, dtype=torch.int32, device=device)
    capture_gates(wide_logits_TE[:, :16], wide_ids_TK[:, :4], "softmax", packed_TK)
    dense_TK = torch.zeros_like(packed_TK)
    capture_gates(logits_TE, ids_TK, "softmax", dense_TK)
    is_same = torch.equal(packed_TK, dense_TK) and bool(dense_TK[:5].any())
    return [] if is_same else ["strided rows"]


def check_empty(device):
    from routing_replay.kernels.gates import capture_gates

    buffer_TLW = torch.full((4, 3, 2), UNTOUCHED, dtype=torch.int32, device=device)
    logits_TE = torch.zeros(0, 8, device=device)
    ids_TK = torch.zeros(0, 2, dtype=torch.int32, device=device)
    capture_gates(logits_TE, ids_TK, "softmax", buffer_TLW[:0, 1, :2])
    return [] if (buffer_TLW == UNTOUCHED).all() else ["rows of no token"]


def refusal(device, change):
    """The message with which a router call is refused."""
    from routing_replay.kernels.gates import capture_gates

    arguments = {
        "router_logits_TE": torch.zeros(4, 8),
        "expert_ids_TK": torch.zeros(4, 2, dtype=torch.int32),
        "function": "softmax",
        "packed_TK": torch.zeros(4, 2, dtype=torch.int32),
    } | change
    on_device = {
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in arguments.items()
    }
    try:
        capture_gates(**on_device)
    except ServerError as error:
        return str(error)
    return "accepted"
