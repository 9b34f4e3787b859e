"""Both engines on one CPU: roll out in SGLang, replay its routes in Megatron, measure the KL.

    python examples/two_engines.py          about a minute; needs both engines, no GPU

SGLang samples in bfloat16 and Megatron scores in float32, so their routers disagree on some
tokens. Replay sends every token to the experts that sampled it.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from tiny_checkpoint import VOCAB, write_tiny_checkpoint

sys.path.insert(0, str(Path(__file__).parents[1]))  # recipes/ is not installed with the package

import routing_replay as rr
from recipes.model import parallel
from recipes.model.model import build_model, transformer_config
from recipes.model.weights import load_hf
from recipes.serving import ServerOptions, launch
from routing_replay.rollout import Completion, GenerateRequest, RolloutClient

NUM_SEQUENCES, NUM_PROMPT, NUM_NEW = 16, 8, 24


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = write_tiny_checkpoint(Path(folder))
        prompts = torch.randint(3, VOCAB, (NUM_SEQUENCES, NUM_PROMPT)).tolist()
        completions = roll_out(checkpoint, prompts)
        model = load_megatron(checkpoint)
    tokens_ST = torch.tensor(
        [[*p, *c.output_ids] for p, c in zip(prompts, completions, strict=True)]
    )
    mu_ST = torch.stack([torch.from_numpy(c.mu_logprobs) for c in completions])
    table = rr.RouteTable.from_routes([c.routes for c in completions])
    token_rows_ST = table.token_rows([tokens_ST.shape[1]] * NUM_SEQUENCES)
    live_ST = score(model, tokens_ST)
    replay = rr.attach(model, rr.ReplayConfig(mode="R3"))
    with replay.replaying(table), replay.microbatch(token_rows_ST):
        replayed_ST = score(model, tokens_ST)
    replay.remove()
    lines = replay.receipt.lines
    num_replayed = sum(line.num_replayed for line in lines)
    print(f"replayed {num_replayed} selections of a token in a layer, {len(lines)} layers")
    print(f"KL(SGLang || Megatron), live routing:    {kl(mu_ST, live_ST):.2e} nats per token")
    print(f"KL(SGLang || Megatron), replayed routes: {kl(mu_ST, replayed_ST):.2e} nats per token")
    parallel.destroy()


def roll_out(checkpoint: Path, prompts: list[list[int]]) -> list[Completion]:
    """Sample a response to each prompt, with the routes of all its tokens."""
    sampling = {"temperature": 1.0, "max_new_tokens": NUM_NEW, "ignore_eos": True}
    with launch(checkpoint, ServerOptions(arguments=("--dtype", "bfloat16"))) as server:
        requests = [GenerateRequest(input_ids=p, sampling=sampling) for p in prompts]
        return RolloutClient([server.url]).generate(requests)


def load_megatron(checkpoint: Path) -> torch.nn.Module:
    """Return a Megatron model on one rank with the checkpoint's weights."""
    layout = parallel.ParallelLayout()
    parallel.initialize(layout, seed=1)
    chunks = build_model(transformer_config(checkpoint, layout, dtype=torch.float32), layout)
    load_hf(chunks, checkpoint)
    return chunks[0].eval()


@torch.no_grad()
def score(model: torch.nn.Module, tokens_ST: torch.Tensor) -> torch.Tensor:
    """Return the log-prob of each sampled token."""
    positions_ST = torch.arange(tokens_ST.shape[1]).expand_as(tokens_ST)
    logprobs_STV = model(tokens_ST, positions_ST, None).log_softmax(-1)
    logprobs_ST = logprobs_STV[:, :-1].gather(-1, tokens_ST[:, 1:, None])[..., 0]
    return logprobs_ST[:, NUM_PROMPT - 1 :]


def kl(mu_ST: torch.Tensor, logprobs_ST: torch.Tensor) -> float:
    """Estimate the KL divergence by k3: the mean of rho - 1 - log rho, rho = pi / mu."""
    log_rho_ST = logprobs_ST - mu_ST
    return float((log_rho_ST.expm1() - log_rho_ST).mean())


if __name__ == "__main__":
    main()
