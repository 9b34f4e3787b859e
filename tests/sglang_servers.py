"""One real SGLang server for all tests that need one, and what transformers says about its model.

A server costs many seconds to start: the fixture `sglang_server` (conftest.py) serves a whole test
session. Its model is a tiny Qwen3-MoE in float32, so that an independent forward in transformers
can be compared.
"""

import contextlib
import tempfile
import threading
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from tiny_models import write_tiny_qwen3_moe

from recipes.serving.server import Server, ServerOptions, launch
from routing_replay.errors import ServerError
from routing_replay.rollout import GenerateRequest, RolloutClient
from routing_replay.routes.shape import MoEShape

MODEL = MoEShape(layers=(0, 1, 2), num_experts=16, top_k=4)
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
)
# One thread: the test machine's few cores are shared, and waiting threads spin.
ENVIRONMENT = {"OMP_NUM_THREADS": "1"}
RESTORE_TRIES = 10


@dataclass
class RunningServer:
    """The shared server, a client of it, and two checkpoints of one architecture."""

    server: Server
    client: RolloutClient
    checkpoints: list[Path]

    def restore(self):
        """Weights and cache as at the start: tests may run in any order.

        Requests that a test has left behind keep the server from flushing its cache.
        """
        for _ in range(RESTORE_TRIES):
            with contextlib.suppress(ServerError):
                self.client.update_weights(str(self.checkpoints[0]), 0)
                return
            self.client.abort()
            time.sleep(0.5)
        self.client.update_weights(str(self.checkpoints[0]), 0)


def write_checkpoint(path, seed):
    """The tiny model, with a tokenizer that makes one token of each word t0, t1, ...

    Its chat template is the messages' words one after another.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    write_tiny_qwen3_moe(path, layers=3, experts=16, top_k=4, vocab=VOCAB, seed=seed)
    words = models.WordLevel({f"t{n}": n for n in range(VOCAB)}, unk_token="t0")
    tokenizer = Tokenizer(words)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="t0", chat_template=template
    ).save_pretrained(path)
    return path


@contextlib.contextmanager
def running(capture, *arguments):
    """A server of the tiny model, `RunningServer`."""
    if find_spec("sglang") is None:  # an import for the question alone takes 8 s
        pytest.skip("SGLang is not installed")
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = [
            # All layers are routed: SGLang's Qwen3-MoE ignores `mlp_only_layers`.
            write_checkpoint(Path(folder) / name, seed)
            for seed, name in enumerate(("first", "second"))
        ]
        options = ServerOptions(
            capture=capture,
            logit_fraction=0.5,
            arguments=(*ARGUMENTS, *arguments),
            environment=ENVIRONMENT,
            log_path=Path(folder) / "server.log",
        )
        with launch(checkpoints[0], options) as server:
            yield RunningServer(server, RolloutClient([server.url], MODEL), checkpoints)


def request(prompt, *, num_new=12, capture="gates", **options):
    """A request that samples exactly `num_new` tokens at temperature 1."""
    sampling = {"temperature": 1.0, "max_new_tokens": num_new, "ignore_eos": True}
    return GenerateRequest(input_ids=list(prompt), sampling=sampling, capture=capture, **options)


def random_prompt(seed, length=20):
    return np.random.default_rng(seed).integers(3, VOCAB, length).tolist()


def while_running(server, asked, act):
    """Completions of requests during which `act` happened, after some tokens were sampled."""
    results = []
    thread = threading.Thread(target=lambda: results.extend(server.client.generate(asked)))
    thread.start()
    wait_for_decoding(server.server.log_path, len(asked))
    act()
    thread.join(timeout=300)
    assert len(results) == len(asked)
    return results


def wait_for_decoding(log_path, num_requests, timeout_s=60):
    """Until a server's log shows that many running requests in a decode batch."""
    start, deadline = log_path.stat().st_size, time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        with open(log_path, "rb") as file:
            file.seek(start)
            if f"Decode batch, #running-req: {num_requests}".encode() in file.read():
                return
        time.sleep(0.05)
    raise AssertionError("the requests never decoded")
