"""A real Megatron model as rollout engine: it samples, reports log-probs, and records its routes.

It samples token by token from its own distribution, as an engine does, without a cache.
"""

import dataclasses

import numpy as np
import torch
from safetensors.torch import save_file

from routing_replay.routes.batch import RolloutBatch
from routing_replay.routes.routes import Routes
from routing_replay.routes.table import RouteTable

NUM_PROMPT, NUM_TOKENS = 4, 28


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rollout:
    """What an engine returns: tokens, log-probs of the sampled ones, routes."""

    tokens_ST: torch.Tensor
    logp_mu_ST: torch.Tensor
    table: RouteTable

    def batch(self) -> RolloutBatch:
        num_sequences, num_tokens = self.tokens_ST.shape
        sampled_T = torch.arange(num_tokens - 1) >= NUM_PROMPT - 1
        return RolloutBatch(
            input_ids_N=self.tokens_ST[:, :-1].flatten(),
            labels_N=self.tokens_ST[:, 1:].flatten(),
            mask_N=sampled_T.repeat(num_sequences),
            logp_mu_N=self.logp_mu_ST.flatten(),
            lengths_S=torch.full((num_sequences,), num_tokens),
        )

    def save(self, folder):
        """The folder of a batch, as the recipe leaves it and the tools read it."""
        folder.mkdir(exist_ok=True)
        columns = dataclasses.asdict(self.batch())
        columns.pop("fingerprint")
        save_file(columns, folder / "batch.safetensors")
        self.table.save(folder / "routes.safetensors")


class Recorder:
    """Stands at a router's seam of the engine and keeps what it decided.

    Attributes:
        power: The combine weights are raised to it and renormalised.
    """

    layer_number = 0
    power = 1.0

    def __init__(self):
        self.ids_TK = self.gates_TK = self.weights_TK = None

    def note_weights(self, router, arguments, output):
        probs_TE, routing_map_TE = output
        if self.power != 1:
            probs_TE = probs_TE**self.power
            probs_TE = probs_TE / probs_TE.sum(1, keepdim=True)
        self.weights_TK = probs_TE.detach().gather(1, self.ids_TK).float()
        return probs_TE, routing_map_TE

    def get_replay_topk(
        self, scores, topk, num_groups=None, group_topk=None, default_compute_topk=None
    ):
        values, ids_TK = default_compute_topk(scores, topk, num_groups, group_topk)
        self.ids_TK = ids_TK
        self.gates_TK = scores.detach().float().softmax(-1).gather(1, ids_TK)
        return values, ids_TK


class Engine:
    """A Megatron model that samples.

    Args:
        chunk: The model; in bfloat16 it may stand inside Megatron's Float16Module.
        rounded: What becomes of every weight; None leaves it.
    """

    def __init__(self, chunk, rounded=None):
        from routing_replay.megatron.routers import find_routers

        self.chunk = chunk
        if rounded is not None:
            with torch.no_grad():
                for parameter in chunk.parameters():
                    parameter.copy_(rounded(parameter))
        self.routers = [found.router for found in find_routers([chunk])]
        self.recorders = [Recorder() for _ in self.routers]
        for router, recorder in zip(self.routers, self.recorders, strict=True):
            router.router_replay = recorder
            router.register_forward_hook(recorder.note_weights)

    def rounded_router(self, layer: int, rounded) -> None:
        """This layer's router rounds its logits."""
        router = self.routers[layer]
        gating = router.gating
        router.gating = lambda hidden: rounded(gating(hidden))

    @torch.no_grad()
    def sample(
        self,
        num_sequences: int = 64,
        *,
        top_p: float = 1.0,
        temperature: float = 1.0,
        seed: int = 0,
        is_silent: bool = False,
    ) -> Rollout:
        """Sequences of one length from random prompts.

        `is_silent` reports the log-probs from before top-p, as SGLang does.
        """
        generator = torch.Generator().manual_seed(seed)
        vocab = self.chunk.config.vocab_size
        tokens_ST = torch.randint(vocab, (num_sequences, NUM_PROMPT), generator=generator)
        logps = []
        while tokens_ST.shape[1] < NUM_TOKENS:
            logits_SV = self._logits(tokens_ST)[:, -1] / temperature
            log_probs_SV = logits_SV.log_softmax(-1)
            truncated_SV = truncate(log_probs_SV, top_p)
            chosen_S1 = torch.multinomial(truncated_SV.exp(), 1, generator=generator)
            reported_SV = log_probs_SV if is_silent else truncated_SV
            logps.append(reported_SV.gather(1, chosen_S1))
            tokens_ST = torch.cat([tokens_ST, chosen_S1], 1)
        self._logits(tokens_ST[:, :-1])  # routes of the whole sequences, as a cache would keep them
        prompt_SP = torch.zeros(num_sequences, NUM_PROMPT - 1)
        return Rollout(
            tokens_ST=tokens_ST,
            logp_mu_ST=torch.cat([prompt_SP, *logps], 1),
            table=self._table(num_sequences),
        )

    def _logits(self, tokens_ST):
        positions_ST = torch.arange(tokens_ST.shape[1]).expand(len(tokens_ST), -1)
        return self.chunk(tokens_ST, positions_ST, None).float()

    def _table(self, num_sequences) -> RouteTable:
        def by_sequence(name):
            # Routers see [position, sequence] order.
            values = torch.stack([getattr(r, name) for r in self.recorders], 1)
            return values.unflatten(0, (NUM_TOKENS - 1, num_sequences)).swapaxes(0, 1).numpy()

        ids_STLK, gates_STLK = by_sequence("ids_TK"), by_sequence("gates_TK")
        weights_STLK = by_sequence("weights_TK")
        return RouteTable.from_routes(
            [
                Routes(
                    expert_ids_TLK=ids_TLK.astype(np.uint8),
                    gate_probs_TLK=gates_TLK.astype(np.float16),
                    combine_weights_TLK=weights_TLK,
                    layers=range(len(self.routers)),
                    num_experts=self.routers[0].config.num_moe_experts,
                )
                for ids_TLK, gates_TLK, weights_TLK in zip(
                    ids_STLK, gates_STLK, weights_STLK, strict=True
                )
            ]
        )


def to_bfloat16(values):
    """As an engine in bfloat16 holds its weights."""
    return values.bfloat16()


def to_14_bits(values):
    """With 14 bits of mantissa: an engine as near as another one can be without being the same."""
    bits = values.float().contiguous().view(torch.int32)
    return ((bits + (1 << 8)) & ~((1 << 9) - 1)).view(torch.float32)


def to_three_bits(logits_TE):
    """As numbers with three bits of mantissa."""
    return logits_TE.to(torch.float8_e4m3fn).float()


def to_halves(logits_TE):
    """To multiples of 0.5, of logits near 0.8: routes that cost more than all other layers' do."""
    return (2 * logits_TE).round() / 2


def truncate(log_probs_SV: torch.Tensor, top_p: float) -> torch.Tensor:
    """The distribution after top-p, renormalised, as an engine reports it."""
    if top_p == 1.0:
        return log_probs_SV
    sorted_SV, order_SV = log_probs_SV.sort(descending=True)
    before_SV = sorted_SV.exp().cumsum(-1) - sorted_SV.exp()
    kept_SV = torch.zeros_like(before_SV, dtype=torch.bool).scatter(1, order_SV, before_SV < top_p)
    return log_probs_SV.masked_fill(~kept_SV, -torch.inf).log_softmax(-1)


def permute_experts(chunk, layer) -> None:
    """A layer's experts behind another layer of the router's numbers."""
    experts = chunk.decoder.layers[layer].mlp.experts.local_experts
    before = [
        {n: p.clone() for n, p in expert.state_dict().items() if p is not None}
        for expert in experts
    ]
    for number, expert in enumerate(experts):
        expert.load_state_dict(before[(number + 1) % len(before)], strict=False)
