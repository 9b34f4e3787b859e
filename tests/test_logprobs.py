"""Token log-probs in chunks and over split vocabularies, against the plain softmax."""

import math
import os
import tempfile

import oracles_objectives as oracle
import pytest
import torch
import torch.distributed as dist
from torch_ranks import start_ranks

from routing_replay.errors import ObjectiveError
from routing_replay.objectives import logprobs
from routing_replay.objectives.logprobs import Support, logprobs_at, token_logprobs

TOKENS, VOCABULARY = 23, 12


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    # Three and a bit rows of this vocabulary: 23 tokens end in an incomplete chunk.
    monkeypatch.setitem(logprobs.CHUNK_BYTES, "cpu", 4 * VOCABULARY * 3 + 8)


def example(dtype=torch.float64):
    draw = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(TOKENS, VOCABULARY, generator=draw, dtype=torch.float64)
    targets = torch.randint(0, VOCABULARY, (TOKENS,), generator=draw)
    return logits.to(dtype).requires_grad_(), targets


def support():
    """Of every token some ids, its target among them; token 4 is unrestricted, token 5 misses its
    target.
    """
    _, targets = example()
    rows = [sorted({int(y), (int(y) + 5) % 12, t % 12}) for t, y in enumerate(targets)]
    rows[4] = []
    rows[5] = [(int(targets[5]) + 1) % 12]
    offsets = [0]
    for row in rows:
        offsets.append(offsets[-1] + len(row))
    ids = [v for row in rows for v in row]
    return Support(ids_N=torch.tensor(ids), offsets_T1=torch.tensor(offsets)), rows


def plain(logits, targets, temperature=1.0, rows=None):
    """log_softmax with everything in memory."""
    scores = logits.double() / temperature
    if rows is not None:
        allowed = torch.zeros(scores.shape, dtype=torch.bool)
        for t, row in enumerate(rows):
            allowed[t, row or slice(None)] = True
        scores = torch.where(allowed, scores, -torch.inf)
    logs = scores.log_softmax(1)
    entropy = -torch.where(logs > -torch.inf, logs.exp() * logs, 0.0).sum(1)
    return logs.gather(1, targets[:, None]).squeeze(1), entropy


def test_values_are_those_of_a_loop():
    logits, targets = example()
    scores = token_logprobs(logits, targets)
    rows = logits.tolist()
    expected = [oracle.log_softmax(row)[y] for row, y in zip(rows, targets.tolist(), strict=True)]
    assert scores.logp_T.tolist() == pytest.approx(expected)
    assert scores.entropy_T.tolist() == pytest.approx([oracle.entropy(row) for row in rows])


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("with_support", [False, True])
def test_gradients_are_those_of_the_plain_softmax(temperature, with_support):
    logits, targets = example()
    allowed, rows = support() if with_support else (None, None)
    weights = torch.randn(2, TOKENS, dtype=torch.float64)
    scores = token_logprobs(logits, targets, temperature=temperature, support=allowed)
    logp, entropy = plain(logits, targets, temperature, rows)
    torch.testing.assert_close(scores.logp_T, logp)
    torch.testing.assert_close(scores.entropy_T, entropy)
    gradients = []
    for logp_T, entropy_T in ((scores.logp_T, scores.entropy_T), (logp, entropy)):
        # Token 5 has probability 0 under its support: no gradient through its log-prob.
        logp_T = torch.where(torch.isfinite(logp_T), logp_T, 0.0)
        keep = torch.arange(TOKENS) != 5 if with_support else torch.ones(TOKENS).bool()
        loss = (weights[0] * logp_T + weights[1] * entropy_T)[keep].sum()
        gradients.append(torch.autograd.grad(loss, logits)[0])
    assert torch.isfinite(gradients[0]).all()
    keep = torch.isfinite(gradients[1])
    torch.testing.assert_close(gradients[0][keep], gradients[1][keep])


def test_finite_differences_agree():
    logits, targets = example()

    def scores(z):
        scores = token_logprobs(z, targets, temperature=0.7)
        return scores.logp_T, scores.entropy_T

    assert torch.autograd.gradcheck(scores, (logits,))


def test_only_one_of_the_two_outputs_may_be_used():
    logits, targets = example()
    for pick in (lambda s: s.logp_T, lambda s: s.entropy_T):
        ours = torch.autograd.grad(pick(token_logprobs(logits, targets)).sum(), logits)[0]
        logp, entropy = plain(logits, targets)
        theirs = logp if pick(token_logprobs(logits, targets)).mean() < 0 else entropy
        torch.testing.assert_close(ours, torch.autograd.grad(theirs.sum(), logits)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_logits_are_scored_in_float32(dtype):
    logits, targets = example(dtype)
    scores = token_logprobs(logits, targets)
    assert scores.logp_T.dtype == torch.float32
    logp, entropy = plain(logits, targets)
    # The logits are what they are; float32 arithmetic on them errs by some 2^-24 of |logp| <= 15.
    torch.testing.assert_close(scores.logp_T.double(), logp, rtol=0, atol=5e-6)
    torch.testing.assert_close(scores.entropy_T.double(), entropy, rtol=0, atol=5e-6)
    ours = torch.autograd.grad(scores.logp_T.sum(), logits)[0]
    theirs = torch.autograd.grad(logp.sum(), logits)[0]
    assert ours.dtype == dtype
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(ours, theirs, rtol=2 * step, atol=2 * step)


def test_a_target_outside_the_vocabulary_scores_minus_infinity_without_gradient():
    logits, targets = example()
    targets[3], targets[4] = -100, VOCABULARY
    scores = token_logprobs(logits, targets)
    assert scores.logp_T[3] == scores.logp_T[4] == -math.inf
    assert torch.isfinite(scores.entropy_T).all()
    (gradient,) = torch.autograd.grad(scores.logp_T.sum(), logits)
    assert (gradient[3:5] == 0).all()
    assert (gradient[5] != 0).any()


def test_vocabulary_padding_of_minus_infinity_has_no_part():
    logits, targets = example()
    padded = torch.cat([logits.detach(), torch.full((TOKENS, 4), -torch.inf)], 1).requires_grad_()
    scores, bare = token_logprobs(padded, targets), token_logprobs(logits, targets)
    torch.testing.assert_close(scores.logp_T, bare.logp_T)
    torch.testing.assert_close(scores.entropy_T, bare.entropy_T)
    (gradient,) = torch.autograd.grad((scores.logp_T + scores.entropy_T).sum(), padded)
    assert (gradient[:, VOCABULARY:] == 0).all()


def test_a_row_of_one_token_has_probability_one():
    only = torch.tensor([[2.0, -torch.inf, -torch.inf]])
    scores = token_logprobs(only, torch.tensor([0]))
    assert scores.logp_T.tolist() == [0.0]
    assert scores.entropy_T.tolist() == [0.0]


@pytest.mark.parametrize("allowed", [None, "support"])
def test_log_probs_at_several_ids_are_those_of_the_plain_softmax(allowed):
    logits, targets = example()
    ids_TK = torch.stack([targets, (targets + 5) % VOCABULARY, (targets + 6) % VOCABULARY], 1)
    allowed = support()[0] if allowed else None
    scores = logprobs_at(logits, ids_TK, temperature=0.8, support=allowed)
    for column in range(3):
        expected = token_logprobs(logits, ids_TK[:, column], temperature=0.8, support=allowed)
        torch.testing.assert_close(scores[:, column], expected.logp_T.detach())
    assert not scores.requires_grad
    if allowed is None:
        plain = (logits.detach() / 0.8).log_softmax(1).gather(1, ids_TK)
        torch.testing.assert_close(scores, plain)
    outside = logprobs_at(logits, torch.full_like(ids_TK, VOCABULARY))
    assert (outside == -math.inf).all()


def test_no_tokens_have_no_scores():
    logits = torch.zeros(0, VOCABULARY, requires_grad=True)
    scores = token_logprobs(logits, torch.zeros(0, dtype=torch.int64))
    scores.logp_T.sum().backward()
    assert scores.logp_T.shape == scores.entropy_T.shape == (0,)
    assert logits.grad.shape == (0, VOCABULARY)


def test_reused_logits_become_their_gradient_and_refuse_a_second_backward():
    logits, targets = example()
    expected = torch.autograd.grad(token_logprobs(logits, targets).logp_T.sum(), logits)[0]
    # As in a model: the logits are the output of something, not a parameter.
    hidden = logits.detach().clone().requires_grad_()
    output = hidden * 1.0
    loss = token_logprobs(output, targets, reuse_logits=True).logp_T.sum()
    loss.backward(retain_graph=True)
    torch.testing.assert_close(hidden.grad, expected)
    torch.testing.assert_close(output.detach(), expected)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda z, y: token_logprobs(z[0], y), r"expected \[T, V\] and \[T\]"),
        (lambda z, y: token_logprobs(z, y[1:]), r"got \(23, 12\) and \(22,\)"),
        (lambda z, y: token_logprobs(z, y, temperature=0.0), "temperature is not positive"),
        (lambda z, y: token_logprobs(z[1:], y[1:], support=support()[0]), "expected 23 offsets"),
        (
            lambda z, y: Support(ids_N=torch.tensor([1, 2]), offsets_T1=torch.tensor([0, 2, 1])),
            "do not fit its ids; expected rising from 0 to 2",
        ),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ObjectiveError, match=message):
        call(*example())


# --- a vocabulary split over two ranks ----------------------------------------------------------


def several_ids():
    """Ids of both halves of the vocabulary."""
    return torch.arange(TOKENS)[:, None] % VOCABULARY + torch.tensor([[0, 5]]) - 1


def _rank(rank, folder):
    torch.set_num_threads(1)
    logprobs.CHUNK_BYTES["cpu"] = 4 * VOCABULARY * 2
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    half = VOCABULARY // 2
    results = []
    for allowed in (None, support()[0]):
        logits, targets = example()
        targets[7] = -100
        local = logits.detach()[:, rank * half : (rank + 1) * half].clone().requires_grad_()
        scores = token_logprobs(
            local, targets, temperature=0.8, group=dist.group.WORLD, support=allowed
        )
        logp_T = torch.where(torch.isfinite(scores.logp_T), scores.logp_T, 0.0)
        (logp_T * torch.arange(TOKENS) + scores.entropy_T).sum().backward()
        at_ids = logprobs_at(local, several_ids(), temperature=0.8, group=dist.group.WORLD)
        results.append((scores.logp_T.detach(), scores.entropy_T.detach(), local.grad, at_ids))
    torch.save(results, os.path.join(folder, f"rank{rank}.pt"))
    dist.destroy_process_group()


def test_a_split_vocabulary_gives_the_values_and_gradients_of_the_whole():
    with tempfile.TemporaryDirectory() as folder:
        start_ranks(_rank, (folder,), 2)
        ranks = [torch.load(os.path.join(folder, f"rank{rank}.pt")) for rank in range(2)]
    for number, allowed in enumerate((None, support()[0])):
        logits, targets = example()
        targets[7] = -100
        whole = token_logprobs(logits, targets, temperature=0.8, support=allowed)
        logp_T = torch.where(torch.isfinite(whole.logp_T), whole.logp_T, 0.0)
        (logp_T * torch.arange(TOKENS) + whole.entropy_T).sum().backward()
        for rank in ranks:
            torch.testing.assert_close(rank[number][0], whole.logp_T.detach())
            torch.testing.assert_close(rank[number][1], whole.entropy_T.detach())
            ids_TK = several_ids()
            at_ids = logprobs_at(logits, ids_TK, temperature=0.8)
            assert (at_ids[ids_TK < 0] == -math.inf).all()
            torch.testing.assert_close(rank[number][3], at_ids)
        gradient = torch.cat([rank[number][2] for rank in ranks], dim=1)
        torch.testing.assert_close(gradient, logits.grad)
