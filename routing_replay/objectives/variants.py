"""Names for a loss with other parameters: published variants and ablations.

A preset is no loss of its own. Its method says what is computed.
"""

from __future__ import annotations

from .registry import preset

_MINIRL = "MiniRL (2512.01374)"

preset(
    name="minirl_decoupled",
    method="minirl",
    parameters={"weight": "decoupled"},
    summary="MiniRL with the truncation on m alone, as the public stacks apply it.",
    reference=f"{_MINIRL}; truncation as slime, miles and verl place TIS.",
    use="To compare with runs of those stacks. Equal to minirl on-policy (r = 1).",
    pitfalls="The whole weight has no bound: r is free where its sign of A is not masked.",
)
preset(
    name="minirl_length_norm",
    method="minirl",
    parameters={"aggregation": "seq-mean-token-mean"},
    summary="Ablation: MiniRL divided by the length of each response.",
    reference=f'{_MINIRL}, ablation "length normalisation".',
    use="For study. Stable but lower in the paper.",
    pitfalls="No longer a first-order approximation of the sequence objective.",
)
preset(
    name="minirl_no_is",
    method="minirl",
    parameters={"weight": "r"},
    summary="Ablation: MiniRL without the train-inference weight m; on-policy the weight is 1.",
    reference=f'{_MINIRL}, ablation "without train-infer IS"; r off-policy is our reading.',
    use="For study of what the weight m does.",
    pitfalls="Collapses quickly in the paper, with replay too.",
)
preset(
    name="minirl_no_clip",
    method="minirl",
    parameters={"masked": False},
    summary="Ablation: MiniRL without the mask on r; eps_* have no effect.",
    reference=f'{_MINIRL}, ablation "no clipping".',
    use="For study; the same as minirl on-policy.",
    pitfalls="Collapses early off-policy in the paper.",
)
preset(
    name="dr_grpo",
    method="grpo",
    parameters={"aggregation": "seq-mean-token-sum-norm", "advantage": "group-mean"},
    summary="GRPO without its two biases: no std, token sums divided by a constant.",
    reference="Dr.GRPO (2503.20783).",
    use="GRPO whose expected gradient is that of the reward.",
    pitfalls="The constant scales the learning rate: change both or none.",
)
preset(
    name="dapo",
    method="grpo",
    parameters={"aggregation": "token-mean", "eps_high": 0.28},
    summary="GRPO with a wider upper clip and a token-level mean.",
    reference="DAPO (2503.14476) equation 8; overlong shaping is `overlong_penalty`, dynamic "
    "sampling is `informative_groups`.",
    use="Long responses, sparse rewards.",
    pitfalls="Dynamic sampling changes the number of rollouts per step: count it when "
    "comparing costs.",
)
preset(
    name="gspo_token",
    method="gspo",
    parameters={"per_token": True},
    summary="GSPO that allows an advantage per token.",
    reference="GSPO (2507.18071), the GSPO-token variant.",
    use="Multi-turn responses with advantages per turn.",
    pitfalls="Equal to gspo in value and gradient where the advantage is the response's.",
)
preset(
    name="dr_gspo",
    method="gspo",
    parameters={"aggregation": "seq-mean-token-sum", "advantage": "group-mean"},
    summary="GSPO times the length of the response: the geometric first-order approximation.",
    reference="A series of articles on RL objectives, without a paper; clipping kept from GSPO "
    "(ours).",
    use="To compare with dr_grpo: less variance, more bias (error (1 - 1/T) / 2 * (sum of "
    "deltas)^2).",
    pitfalls="Long responses weigh more than under gspo; a learning rate does not carry over.",
)
