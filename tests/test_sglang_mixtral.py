"""Mixtral: rows beside transformers' own router logits."""

import numpy as np
import pytest
import torch
from sglang_checks import assert_ids_follow, tokens_of
from sglang_servers import ARGUMENTS, ENVIRONMENT, random_prompt, request

from recipes.serving.server import ServerOptions, launch
from routing_replay.rollout import RolloutClient
from routing_replay.routes.shape import MoEShape

pytest.importorskip("sglang", reason="SGLang is not installed")
pytestmark = pytest.mark.slow  # a server of its own
MODEL = MoEShape(layers=(0, 1), num_experts=8, top_k=3)
SIZES = {
    "vocab_size": 128,
    "hidden_size": 128,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 3,
    "max_position_embeddings": 512,
    "initializer_range": 0.12,
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
}


def mixtral():
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=8, sliding_window=None))


def test_rows_gates_and_log_probs_are_those_of_transformers(tmp_path):
    torch.manual_seed(1)
    model = mixtral().float().eval()
    model.save_pretrained(tmp_path)
    options = ServerOptions(
        capture="logits", logit_fraction=1.0, arguments=ARGUMENTS, environment=ENVIRONMENT
    )
    asked = request(random_prompt(1, length=40), capture="logits")
    with launch(tmp_path, options) as server:
        (completion,) = RolloutClient([server.url], MODEL).generate([asked])
    fed, routes = tokens_of(asked, completion), completion.routes
    with torch.no_grad():
        output = model(torch.tensor([fed]), output_router_logits=True)
    logits_TLE = torch.stack([x.reshape(len(fed), -1) for x in output.router_logits], 1)
    assert routes.covered_T.all()
    assert_ids_follow(routes, logits_TLE.numpy())
    np.testing.assert_allclose(routes.router_logits.values_NLE, logits_TLE, atol=2e-3)
    probs_TLE = logits_TLE.softmax(-1).numpy()
    expected_TLK = np.take_along_axis(probs_TLE, routes.expert_ids_TLK.astype(np.int64), -1)
    np.testing.assert_allclose(routes.gate_probs_TLK, expected_TLK, atol=2.0**-11 + 1e-4)
    mu_T = output.logits[0, 39:].log_softmax(-1).numpy()
    expected_T = mu_T[np.arange(len(completion.output_ids)), completion.output_ids]
    np.testing.assert_allclose(completion.mu_logprobs, expected_T, atol=2e-3)
