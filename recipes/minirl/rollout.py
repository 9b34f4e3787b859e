"""Rollouts and rewards: prompts to token ids, SGLang's samples, the verifier's verdict."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from routing_replay.errors import DataError
from routing_replay.sglang.client import ClientOptions, RolloutClient
from routing_replay.sglang.probe import probe
from routing_replay.sglang.requests import GenerateRequest
from routing_replay.table import TableModel

from .batch import Sample
from .config import RecipeConfig
from .prompts import Prompt
from .verifiers import VERIFIERS

# A response that is aborted again and again would otherwise hang the job silently.
FINISHED = ("stop", "length")


class Rollout:
    """Samples responses from the servers and rewards them.

    Args:
        config: The recipe's configuration.
        urls: The servers.
        checkpoint: Folder whose tokenizer is used.
        model: Layers, experts and top-k that every answer must have.

    Raises:
        ServerError: A server does not answer, or returns no or wrong routes.
    """

    def __init__(
        self, config: RecipeConfig, urls: Sequence[str], checkpoint: Path, model: TableModel
    ):
        from transformers import AutoTokenizer

        self.config = config
        self.tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        options = ClientOptions(request_timeout_s=config.rollout.request_timeout_s)
        self.client = RolloutClient(urls, model=model, options=options)
        capture = config.rollout_capture
        if capture != "off":
            for url in urls:
                # A server without the plugin, or a gateway that drops fields, shows here.
                probe(url, model, capture)

    def sample(
        self,
        prompts: Sequence[Prompt],
        num_samples: int,
        *,
        capture: str,
        on_done: Callable[[], None] | None = None,
    ) -> list[Sample]:
        """Responses, `num_samples` of each prompt one after another, with rewards.

        Args:
            prompts: The tasks.
            num_samples: Responses per prompt.
            capture: What comes back of the routes: off, ids, gates or logits.
            on_done: Called after each response.

        Raises:
            ServerError, PayloadError: A server failed, or an answer lacks its routes.
            DataError: A prompt that the tokenizer turns into nothing.
        """
        sampling = {
            "temperature": self.config.rollout.temperature,
            "max_new_tokens": self.config.rollout.max_new_tokens,
        }
        asked = [p for p in prompts for _ in range(num_samples)]
        ids_of = {id(p): self.encode(p) for p in prompts}
        requests = [
            GenerateRequest(input_ids=ids_of[id(p)], sampling=sampling, capture=capture)
            for p in asked
        ]
        completions = self.client.generate(requests, lambda *_: on_done() if on_done else None)
        return [
            self._rewarded(prompt, request.input_ids, completion)
            for prompt, request, completion in zip(asked, requests, completions, strict=True)
        ]

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt; chat messages always take the tokenizer's template."""
        if self.config.data.chat_template or not isinstance(prompt.prompt, str):
            messages = prompt.prompt
            if isinstance(messages, str):
                messages = [{"role": "user", "content": messages}]
            ids = self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_dict=False
            )
        else:
            ids = self.tokenizer.encode(prompt.prompt)
        if not ids:
            raise DataError("a prompt without tokens", got=repr(prompt.prompt))
        return ids

    def _rewarded(self, prompt: Prompt, prompt_ids, completion) -> Sample:
        if completion.finish_reason not in FINISHED:
            raise DataError(
                "a response was not finished",
                expected=" or ".join(FINISHED),
                got=completion.finish_reason,
                where=completion.url,
            )
        text = self.tokenizer.decode(completion.output_ids, skip_special_tokens=True)
        return Sample(
            prompt_ids=tuple(prompt_ids),
            response_ids=tuple(completion.output_ids),
            logp_mu=tuple(completion.mu_logprobs.tolist()),
            routes=completion.routes,
            reward=VERIFIERS[prompt.verifier](text, prompt.answer),
        )


def mean_reward(samples: Sequence[Sample]) -> float:
    return sum(sample.reward for sample in samples) / len(samples)
