"""What transformers says about a tiny model, and how a server's rows are compared with it."""

import numpy as np
import torch

# float16 keeps eleven bits; SGLang and transformers sum in different orders in float32.
GATE_ERROR = 2.0**-11 + 1e-4
# Router logits this close to each other may change places by rounding.
TIE = 1e-3


class Reference:
    """An independent forward of the same checkpoint in transformers, router by router."""

    def __init__(self, checkpoint):
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
        self._inputs, self.chosen = [], []  # chosen: the last forward's ids [T, K], per router
        self._ties_TLK = None
        for name, module in self.model.named_modules():
            if name.endswith("mlp.gate"):
                module.register_forward_hook(self._note)

    def _note(self, gate, arguments, output):
        self._inputs.append((gate, arguments[0]))
        if self._ties_TLK is not None:
            output = self._with_ties(gate, self._ties_TLK[:, len(self.chosen)], *output)
        self.chosen.append(output[-1] if isinstance(output, tuple) else None)
        return output

    @staticmethod
    def _with_ties(gate, theirs_TK, logits_TE, scores_TK, ids_TK):
        """The router's output with their experts where these are within rounding of its own."""
        is_known_T = (theirs_TK >= 0).all(-1)
        theirs_TK = theirs_TK.clamp(min=0)
        lowest_T, their_lowest_T = (
            logits_TE.gather(-1, ids).amin(-1) for ids in (ids_TK, theirs_TK)
        )
        is_tie_T1 = (is_known_T & (their_lowest_T >= lowest_T - TIE))[:, None]
        their_scores_TK = logits_TE.float().softmax(-1).gather(-1, theirs_TK)
        if gate.norm_topk_prob:
            their_scores_TK = their_scores_TK / their_scores_TK.sum(-1, keepdim=True)
        scores_TK = torch.where(is_tie_T1, their_scores_TK.to(scores_TK.dtype), scores_TK)
        return logits_TE, scores_TK, torch.where(is_tie_T1, theirs_TK, ids_TK)

    @torch.no_grad()
    def __call__(self, tokens, past=None, routes=None):
        """Router logits [T, L, E] and log-probs [T, V] of `tokens`, and the cache after them.

        A tie goes the way of the last tokens' `routes`: one that went the other way would give
        this token's later layers, and all later tokens, other inputs.
        """
        self._inputs.clear()
        self.chosen.clear()
        ids = torch.tensor([list(tokens)])
        self._ties_TLK = None
        if routes is not None:
            theirs_TLK = torch.from_numpy(routes.expert_ids_TLK.astype(np.int64))
            unknown = (ids.shape[1] - len(theirs_TLK), *theirs_TLK.shape[1:])
            self._ties_TLK = torch.cat([torch.full(unknown, -1), theirs_TLK])
        output = self.model(input_ids=ids, past_key_values=past, use_cache=True)
        layers = [
            torch.nn.functional.linear(hidden.reshape(ids.shape[1], -1).float(), gate.weight)
            for gate, hidden in self._inputs
        ]
        logits_TLE = torch.stack(layers, 1).numpy()
        return logits_TLE, output.logits[0].log_softmax(-1).numpy(), output.past_key_values


def softmax(logits):
    exp = np.exp(logits - logits.max(-1, keepdims=True))
    return exp / exp.sum(-1, keepdims=True)


def assert_ids_follow(routes, logits_TLE, rows=slice(None)):
    """The experts are the top-k of the reference wherever that is not a matter of rounding."""
    top_k = routes.top_k
    sorted_TLE = -np.sort(-logits_TLE, -1)
    is_clear_TL = (sorted_TLE[..., top_k - 1] - sorted_TLE[..., top_k]) > TIE
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
