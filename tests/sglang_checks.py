"""What transformers says about a tiny model, and how a server's rows are compared with it."""

import numpy as np

from tools.router_reference import Reference, clear_of_ties

__all__ = ["Reference", "assert_ids_follow", "assert_true", "softmax", "tokens_of"]

# float16 keeps eleven bits; SGLang and transformers sum in different orders in float32.
GATE_ERROR = 2.0**-11 + 1e-4


def softmax(logits):
    exp = np.exp(logits - logits.max(-1, keepdims=True))
    return exp / exp.sum(-1, keepdims=True)


def assert_ids_follow(routes, logits_TLE, rows=slice(None)):
    """The experts are the top-k of the reference wherever that is not a matter of rounding."""
    top_k = routes.top_k
    is_clear_TL = clear_of_ties(logits_TLE, top_k)
    expected_TLK = np.sort(np.argsort(-logits_TLE, -1)[..., :top_k], -1)
    got_TLK = np.sort(routes.expert_ids_TLK[rows].astype(int), -1)
    # Random weights leave few ties; were most rows unclear, this test would prove nothing.
    assert is_clear_TL.mean() > 0.9
    np.testing.assert_array_equal(got_TLK[is_clear_TL], expected_TLK[is_clear_TL])


def tokens_of(asked, completion):
    """What was fed to the model: all tokens but the last sampled one."""
    return [*asked.input_ids, *completion.output_ids][:-1]


def assert_true(asked, completion, reference):
    """Ids, gates and log-probs are those of the reference's forward of the same tokens."""
    routes = completion.routes
    logits_TLE, logprobs_TV, _ = reference(tokens_of(asked, completion), routes=routes)
    rows = slice(asked.start, None)
    assert routes.covered_T.all()
    assert_ids_follow(routes, logits_TLE[rows])
    if routes.gate_probs_TLK is not None:
        ids_TLK = routes.expert_ids_TLK.astype(np.int64)
        expected_TLK = np.take_along_axis(softmax(logits_TLE[rows]), ids_TLK, -1)
        np.testing.assert_allclose(routes.gate_probs_TLK, expected_TLK, atol=GATE_ERROR)
    response = logprobs_TV[len(asked.input_ids) - 1 :]
    mu = response[np.arange(len(completion.output_ids)), completion.output_ids]
    np.testing.assert_allclose(completion.mu_logprobs, mu, atol=2e-3)
