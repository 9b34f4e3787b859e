"""Naive references of the kernels: selections in Python loops, weights by gather and scatter."""

import torch


def combine_weights(logits_TE, ids_TK, rule, dtype=torch.float64):
    """Dense weights [T, E] of the selected experts, in `dtype` throughout; differentiable."""
    logits_TE = logits_TE.to(dtype)
    if rule.form == "softmax":
        weights_TK = logits_TE.gather(1, ids_TK).softmax(-1)
    elif rule.form == "pre_softmax":
        weights_TK = logits_TE.softmax(-1).gather(1, ids_TK)
    else:
        scores_TK = independent_scores(logits_TE, rule.form).gather(1, ids_TK)
        # 1e-20 is Megatron's; a single expert is not normalised.
        total_T1 = scores_TK.sum(-1, keepdim=True) + 1e-20
        weights_TK = scores_TK / total_T1 if rule.top_k > 1 else scores_TK
    weights_TK = weights_TK * (rule.scaling_factor or 1.0)
    return torch.zeros_like(logits_TE).scatter(1, ids_TK, weights_TK)


def independent_scores(logits_TE, form):
    if form == "sigmoid":
        return logits_TE.sigmoid()
    return torch.nn.functional.softplus(logits_TE).sqrt()


def selection_values(logits_TE, rule, expert_bias_E):
    """What a live top-k compares; float32 as in Megatron, the logits themselves as they are."""
    if rule.form == "softmax":
        return logits_TE
    if rule.form == "pre_softmax":
        return logits_TE.float().softmax(-1)
    scores_TE = independent_scores(logits_TE.float(), rule.form)
    return scores_TE if expert_bias_E is None else scores_TE + expert_bias_E


def live_selection(values, rule):
    """Expert ids of one token, best first; of equal values the lowest index wins."""
    candidates = range(len(values))
    if rule.group_top_k:
        size = len(values) // rule.num_groups
        groups = [range(g * size, (g + 1) * size) for g in range(rule.num_groups)]
        num_summed = rule.top_k // rule.group_top_k
        sums = [sum(sorted((values[e] for e in g), reverse=True)[:num_summed]) for g in groups]
        best = sorted(range(len(groups)), key=lambda g: (-sums[g], g))[: rule.group_top_k]
        candidates = [e for g in sorted(best) for e in groups[g]]
    return sorted(candidates, key=lambda e: (-values[e], e))[: rule.top_k]
