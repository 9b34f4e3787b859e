"""The hot functions never make the host wait for the device.

They run on the meta device here: its tensors have no values, so whatever reads one on the host
(`.item()`, `.tolist()`, `if tensor`, `nonzero`) raises. Copies between devices are counted.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from routing_replay import objectives
from routing_replay.metrics.agreement import LayerAgreement, RouterView
from routing_replay.metrics.policy_kl import Sequences, policy_metrics, update_metrics
from routing_replay.metrics.typed import masked_max, masked_mean, merge
from routing_replay.objectives import Denominators, LossInputs, logprobs
from routing_replay.objectives.logprobs import Support, logprobs_at, token_logprobs

TOKENS, VOCAB, EXPERTS, TOP_K = 24, 16, 8, 2
META = torch.device("meta")


class Copies(TorchDispatchMode):
    """Counts copies from one device to another."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        outcome = function(*args, **(kwargs or {}))
        if function.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_):
            source = args[1] if function.overloadpacket is torch.ops.aten.copy_ else args[0]
            self.count += source.device != outcome.device
        return outcome


def floats(*shape):
    return torch.empty(*shape, device=META)


def integers(*shape):
    return torch.empty(*shape, dtype=torch.int64, device=META)


def mask():
    return torch.empty(TOKENS, dtype=torch.bool, device=META)


@pytest.mark.parametrize("read", [float, bool, torch.Tensor.tolist, torch.nonzero])
def test_the_guard_sees_a_read_on_the_host(read):
    with pytest.raises((RuntimeError, NotImplementedError), match="[mM]eta"):
        read(floats(1))


def test_the_guard_counts_copies_between_devices():
    with Copies() as copies:
        torch.zeros(3).to(META)
        torch.zeros(3).to(torch.float64)
        floats(3).copy_(torch.zeros(3))
    assert copies.count == 2


def test_agreement_observes_without_a_sync():
    agreement = LayerAgreement([0], num_rows=TOKENS, has_gates=True, has_logits=True, device=META)
    view = RouterView(
        replayed_ids_TK=integers(TOKENS, TOP_K),
        live_ids_TK=integers(TOKENS, TOP_K),
        values_TE=floats(TOKENS, EXPERTS),
        probs_TE=floats(TOKENS, EXPERTS),
        valid_T=mask(),
        token_rows_T=integers(TOKENS),
        gate_probs_TK=floats(TOKENS, TOP_K),
    )
    with Copies() as copies:
        agreement.observe(0, view)
        agreement.observe_kl(0, floats(TOKENS), mask())
        agreement.metrics()
    assert copies.count == 0


def test_policy_metrics_are_kept_on_the_device():
    sequences = Sequences(index_T=integers(TOKENS), count=3)
    with Copies() as copies:
        metrics = policy_metrics(floats(TOKENS), floats(TOKENS), mask(), sequences=sequences)
        merge(metrics, update_metrics(floats(TOKENS), floats(TOKENS), floats(TOKENS), mask()))
        masked_mean(floats(TOKENS), mask())
        masked_max(floats(TOKENS), mask())
    assert copies.count == 0


@pytest.mark.parametrize("score", ["token_logprobs", "logprobs_at"])
def test_a_sampling_support_is_copied_once_however_many_chunks_there_are(monkeypatch, score):
    monkeypatch.setattr(logprobs, "CHUNK_BYTES", {"cuda": 4 * VOCAB * 3})  # 3 tokens, 8 chunks
    counts_T = torch.arange(TOKENS) % 4
    support = Support(
        ids_N=integers(int(counts_T.sum())),
        offsets_T1=torch.cat([torch.zeros(1, dtype=torch.int64), counts_T.cumsum(0)]),
    )
    logits_TV = floats(TOKENS, VOCAB).requires_grad_()
    with Copies() as copies:
        if score == "token_logprobs":
            scores = token_logprobs(logits_TV, integers(TOKENS), support=support)
            (scores.logp_T.sum() + scores.entropy_T.sum()).backward()
        else:
            logprobs_at(logits_TV, integers(TOKENS, 2), support=support)
    assert copies.count == 1


@pytest.mark.parametrize("name", objectives.names())
def test_no_objective_reads_a_value_on_the_host(name):
    inputs = LossInputs(
        logp_theta_T=floats(TOKENS).requires_grad_(),
        logp_old_T=floats(TOKENS),
        logp_mu_T=floats(TOKENS),
        advantages_T=floats(TOKENS),
        mask_T=mask(),
        sequence_T=integers(TOKENS),
        num_sequences=3,
        denominators=Denominators(num_sequences=3, num_tokens=TOKENS, max_length=8),
        logp_ref_T=floats(TOKENS),
        entropy_T=floats(TOKENS),
        router_shift_T=floats(TOKENS),
        sampled_ids_T=integers(TOKENS),
        topk_ids_TK=integers(TOKENS, 4),
        topk_logp_mu_TK=floats(TOKENS, 4),
        topk_logp_theta_TK=floats(TOKENS, 4),
    )
    checks = {"geometric_low": 0.9, "sequence_k3_max": 0.01, "veto_below": 1e-4}
    objective = objectives.get(name, **checks, kl_coefficient=0.1, entropy_coefficient=0.1)
    with Copies() as copies:
        objective(inputs).loss.backward()
    assert copies.count == 0
