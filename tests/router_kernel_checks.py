"""What is checked of the replay router; runs where the kernel runs (see triton_process.py)."""

import numpy as np
import oracles_kernels
import torch

from routing_replay.kernels import require_device


def tokens_of(num_experts):
    """Two full tiles and a ragged one."""
    from routing_replay.kernels.router import NUM_WARPS
    from routing_replay.kernels.scores import tile_of

    return 2 * tile_of(num_experts, NUM_WARPS)[0] + 1


def inputs(num_experts, top_k, dtype, device, seed=0):
    """Logits, distinct ids in the compact dtype, the gradient of the weights."""
    generator = np.random.default_rng(seed)
    num_tokens = tokens_of(num_experts)
    logits_TE = torch.from_numpy(3 * generator.standard_normal((num_tokens, num_experts)))
    ids_TK = generator.random((num_tokens, num_experts)).argsort(1)[:, :top_k]
    grad_TE = torch.from_numpy(generator.standard_normal((num_tokens, num_experts)))
    ids_TK = torch.from_numpy(ids_TK).to(torch.uint8 if num_experts <= 256 else torch.int16)
    return logits_TE.to(device, dtype), ids_TK.to(device), grad_TE.to(device, dtype)


def routed(logits_TE, ids_TK, grad_TE, rule_fields, **options):
    """Weights, map and gradient of the kernel."""
    from routing_replay.kernels.router import RoutingRule, replay_routing

    require_device(logits_TE.device)
    logits_TE = logits_TE.clone().requires_grad_()
    rule = RoutingRule(**rule_fields)
    weights_TE, routing_map_TE = replay_routing(logits_TE, ids_TK, rule, **options)
    weights_TE.backward(grad_TE)
    return weights_TE.detach(), routing_map_TE, logits_TE.grad


def reference(logits_TE, ids_TK, grad_TE, rule_fields, dtype):
    """Weights and gradient of the oracle, computed in `dtype` and rounded to the logits'."""
    from routing_replay.kernels.router import RoutingRule

    leaf_TE = logits_TE.to(dtype, copy=True).requires_grad_()
    rule = RoutingRule(**rule_fields)
    weights_TE = oracles_kernels.combine_weights(leaf_TE, ids_TK.long(), rule, dtype)
    weights_TE.backward(grad_TE.to(dtype))
    if dtype == torch.float64:
        return weights_TE.detach(), leaf_TE.grad
    return weights_TE.detach().to(logits_TE.dtype), leaf_TE.grad.to(logits_TE.dtype)


# The root mean square is steady where the largest of a few thousand errors is luck. Twice torch's
# and a bit: the interpreter cuts float32 to bfloat16 where torch (and a GPU) rounds, and the error
# of a cut is twice that of rounding.
TIMES_OWN_ERROR = 2.5


def error_of(values_TE, truth_TE):
    return (values_TE.double() - truth_TE).square().mean().sqrt().item()


def is_as_exact(error, own_error, truth_TE):
    """By torch's own error, and a unit of float32: a few large weights may round luckily there."""
    unit = torch.finfo(torch.float32).eps * truth_TE.square().mean().sqrt().item()
    return error <= TIMES_OWN_ERROR * own_error + unit


def check_replayed(device, num_experts, rule_fields, dtype):
    """Weights, map and gradient of replayed tokens, against float64; what is wrong comes back."""
    logits_TE, ids_TK, grad_TE = inputs(num_experts, rule_fields["top_k"], dtype, device)
    before_TK = ids_TK.clone()
    weights_TE, routing_map_TE, gradient_TE = routed(logits_TE, ids_TK, grad_TE, rule_fields)
    truth = reference(logits_TE, ids_TK, grad_TE, rule_fields, torch.float64)
    own = reference(logits_TE, ids_TK, grad_TE, rule_fields, torch.float32)
    wrong = []
    for name, values, exact, rounded in zip(
        ("weights", "gradient"), (weights_TE, gradient_TE), truth, own, strict=True
    ):
        error, own_error = error_of(values, exact), error_of(rounded, exact)
        if values.dtype != dtype or not is_as_exact(error, own_error, exact):
            wrong.append((name, error, own_error))
    expected_TE = torch.zeros_like(routing_map_TE).scatter(1, ids_TK.long(), True)
    if not torch.equal(routing_map_TE, expected_TE):
        wrong.append("map")
    if (weights_TE[~expected_TE] != 0).any():
        wrong.append("weights of experts that are not selected")
    if not torch.equal(ids_TK, before_TK):
        wrong.append("ids were changed")
    return wrong


def check_live(device, num_experts, rule_fields, dtype, has_bias, ties=False):
    """A third of the tokens live: their experts, best first, written over their ids."""
    from routing_replay.kernels.router import RoutingRule

    logits_TE, ids_TK, grad_TE = inputs(num_experts, rule_fields["top_k"], dtype, device)
    if ties:  # few distinct values: nearly every selection is decided by the tie rule
        logits_TE = logits_TE.clamp(-2, 2).round()
    is_live_T = torch.arange(len(logits_TE), device=device) % 3 == 1
    bias_E = torch.linspace(1, -1, num_experts, device=device) if has_bias else None
    values_TE = oracles_kernels.selection_values(logits_TE, RoutingRule(**rule_fields), bias_E)
    expected_TK = ids_TK.clone()
    for token in is_live_T.nonzero().flatten().tolist():
        ids = oracles_kernels.live_selection(
            values_TE[token].double().tolist(), RoutingRule(**rule_fields)
        )
        expected_TK[token] = torch.tensor(ids)
    ids_TK[is_live_T] = 0  # no selection: duplicates
    options = {"is_live_T": is_live_T, "expert_bias_E": bias_E}
    weights_TE, routing_map_TE, gradient_TE = routed(
        logits_TE, ids_TK, grad_TE, rule_fields, **options
    )
    again = routed(logits_TE, expected_TK.clone(), grad_TE, rule_fields)
    wrong = [] if torch.equal(ids_TK, expected_TK) else ["experts of live tokens"]
    for name, one, other in zip(
        ("weights", "map", "gradient"),
        (weights_TE, routing_map_TE, gradient_TE),
        again,
        strict=True,
    ):
        if not torch.equal(one, other):
            wrong.append(f"{name}: not those of a replay of the same experts")
    return wrong


def selected_of(device, rows, top_k, dtype):
    """Experts that live tokens of given logits select (softmax over the selected)."""
    logits_TE = torch.tensor(rows, dtype=dtype, device=device)
    ids_TK = torch.zeros((len(rows), top_k), dtype=torch.uint8, device=device)
    is_live_T = torch.ones(len(rows), dtype=torch.bool, device=device)
    routed(logits_TE, ids_TK, torch.zeros_like(logits_TE), {"top_k": top_k}, is_live_T=is_live_T)
    return ids_TK.tolist()


def check_neighbours(device):
    """A buffer around the ids: live rows of the last, ragged tile write nothing behind it."""
    logits_TE, ids_TK, grad_TE = inputs(32, 4, torch.float32, device)
    buffer_LTK = torch.full((3, *ids_TK.shape), 77, dtype=torch.uint8, device=device)
    is_live_T = torch.ones(len(ids_TK), dtype=torch.uint8, device=device)
    routed(logits_TE, buffer_LTK[1], grad_TE, {"top_k": 4}, is_live_T=is_live_T)
    return bool((buffer_LTK[[0, 2]] == 77).all()), bool((buffer_LTK[1] < 32).all())


def extreme_gradients(device, form):
    """Gradients at logits where scores under- and overflow."""
    logits_TE = torch.tensor([[-200.0, -90.0, -20.0, 0.0, 30.0, 90.0, 200.0, 1.0]], device=device)
    ids_TK = torch.arange(7, dtype=torch.uint8, device=device)[None]
    grad_TE = torch.linspace(-1, 1, 8, device=device)[None]
    fields = {"top_k": 7, "score_function": form}
    return [values.tolist() for values in routed(logits_TE, ids_TK, grad_TE, fields)]


def refusal(device, changes):
    """The message with which inputs are refused; all tensors are moved to the device."""
    from routing_replay.errors import ReplayError
    from routing_replay.kernels.router import RoutingRule, replay_routing

    arguments = {
        "logits_TE": torch.zeros(5, 8),
        "ids_TK": torch.zeros(5, 2, dtype=torch.uint8),
    } | changes
    tensors = {name: values.to(device) for name, values in arguments.items()}
    try:
        replay_routing(rule=RoutingRule(top_k=2), **tensors)
    except ReplayError as error:
        return str(error)
    return "accepted"


def exponential(device, values):
    """The kernels' exp, alone."""
    import exponential_kernel

    return exponential_kernel.run(torch.tensor(values, device=device)).tolist()
