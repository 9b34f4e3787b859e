"""One real SGLang server for all tests that need one, and what transformers says about its model.

A server costs many seconds to start: `sglang_server` is shared by a whole test session. Its model
is a tiny Qwen3-MoE in float32, so that an independent forward in transformers can be compared.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import write_tiny_qwen3_moe

from routing_replay.sglang.client import RolloutClient
from routing_replay.sglang.requests import GenerateRequest
from routing_replay.sglang.server import Server, ServerOptions, launch
from routing_replay.table import TableModel

MODEL = TableModel(layers=(0, 1, 2), num_experts=16, top_k=4)
VOCAB = 128
# Chunks far shorter than prompts, and few slots: chunked prefill and eviction really happen.
ARGUMENTS = (
    *("--dtype", "float32"),
    *("--max-total-tokens", "2048"),
    *("--max-running-requests", "8"),
    *("--chunked-prefill-size", "32"),
    *("--random-seed", "1"),
    # Tests that act on running requests wait for such a line.
    *("--decode-log-interval", "4"),
    "--enable-mixed-chunk",
)
# One thread: the test machine's few cores are shared, and waiting threads spin.
ENVIRONMENT = {"OMP_NUM_THREADS": "1"}


@dataclass
class RunningServer:
    """The shared server, a client of it, and two checkpoints of one architecture."""

    server: Server
    client: RolloutClient
    checkpoints: list[Path]

    def restore(self):
        """Weights and cache as at the start: tests may run in any order."""
        self.client.update_weights(str(self.checkpoints[0]), 0)


def write_checkpoint(path, seed):
    """The tiny model, with a tokenizer that makes one token of each word t0, t1, ..."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    write_tiny_qwen3_moe(path, layers=3, experts=16, top_k=4, vocab=VOCAB, seed=seed)
    words = models.WordLevel({f"t{n}": n for n in range(VOCAB)}, unk_token="t0")
    tokenizer = Tokenizer(words)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="t0").save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def sglang_server():
    pytest.importorskip("sglang")
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = [
            # All layers are routed: SGLang's Qwen3-MoE ignores `mlp_only_layers`.
            write_checkpoint(Path(folder) / name, seed)
            for seed, name in enumerate(("first", "second"))
        ]
        options = ServerOptions(
            capture="logits",
            logit_fraction=0.5,
            arguments=ARGUMENTS,
            environment=ENVIRONMENT,
            log_path=Path(folder) / "server.log",
        )
        with launch(checkpoints[0], options) as server:
            yield RunningServer(server, RolloutClient([server.url], MODEL), checkpoints)


def request(prompt, *, num_new=12, capture="gates", **others):
    """A request that samples exactly `num_new` tokens at temperature 1."""
    sampling = {"temperature": 1.0, "max_new_tokens": num_new, "ignore_eos": True}
    return GenerateRequest(input_ids=list(prompt), sampling=sampling, capture=capture, **others)


def random_prompt(seed, length=20):
    return np.random.default_rng(seed).integers(3, VOCAB, length).tolist()


class Reference:
    """An independent forward of the same checkpoint in transformers, router by router."""

    def __init__(self, checkpoint):
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
        self._inputs, self.chosen = [], []  # chosen: the last forward's ids [T, K], per router
        for name, module in self.model.named_modules():
            if name.endswith("mlp.gate"):
                module.register_forward_hook(self._note)

    def _note(self, gate, arguments, output):
        self._inputs.append((gate, arguments[0]))
        self.chosen.append(output[-1] if isinstance(output, tuple) else None)

    @torch.no_grad()
    def __call__(self, tokens, past=None):
        """Router logits [T, L, E] and log-probs [T, V] of `tokens`, and the cache after them."""
        self._inputs.clear()
        self.chosen.clear()
        ids = torch.tensor([list(tokens)])
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


def assert_ids_follow(routes, logits_TLE, rows=slice(None), margin=1e-3):
    """The experts are the top-k of the reference wherever that is not a matter of rounding."""
    top_k = routes.top_k
    sorted_TLE = -np.sort(-logits_TLE, -1)
    is_clear_TL = (sorted_TLE[..., top_k - 1] - sorted_TLE[..., top_k]) > margin
    expected_TLK = np.sort(np.argsort(-logits_TLE, -1)[..., :top_k], -1)
    got_TLK = np.sort(routes.expert_ids_TLK[rows].astype(int), -1)
    # Random weights leave few ties; were most rows unclear, this test would prove nothing.
    assert is_clear_TL.mean() > 0.9
    np.testing.assert_array_equal(got_TLK[is_clear_TL], expected_TLK[is_clear_TL])
