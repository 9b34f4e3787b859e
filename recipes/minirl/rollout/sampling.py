"""Rollouts and rewards: prompts become token ids, SGLang samples, verifiers reward."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recipes.serving.kept import write_states
from routing_replay.errors import ConfigError, DataError, ServerError
from routing_replay.objectives import informative_groups
from routing_replay.rollout import (
    ClientOptions,
    Completion,
    GenerateRequest,
    RolloutClient,
    probe,
)
from routing_replay.routes.shape import MoEShape

from ..data.prompts import Prompt
from ..data.verifiers import VERIFIERS
from ..settings.config import RecipeConfig
from .answers import StoredAnswers
from .batch import Sample
from .groups import Group
from .turns import TOOLS, Response

FINISHED = ("stop", "length")
# Any tokens will do: only the form of the answer is checked.
PROBE_IDS = (1, 2)
SHORTEST_CHECK_S, LONGEST_CHECK_S = 5.0, 20.0
# Of the client's counts.
SERVER_METRICS = {
    "faults": "server_faults",
    "left_out": "servers_left_out",
    "returned": "servers_returned",
    "continued": "continued_responses",
}


class Rollout:
    """Samples responses from the servers and rewards them.

    Args:
        config: The recipe's configuration.
        urls: The servers.
        checkpoint: Folder whose tokenizer is used.
        model: Layers, experts and top-k that every answer must have.
        states: File that says which servers are left out; None: none is written.

    Raises:
        ServerError: Fewer than `min_servers` servers answer; or one returns no or wrong routes, or
            no sampling mask or most likely tokens where these are needed.
    """

    def __init__(
        self,
        config: RecipeConfig,
        urls: Sequence[str],
        checkpoint: Path,
        model: MoEShape,
        states: Path | None = None,
    ):
        from transformers import AutoTokenizer

        self.config = config
        self.tokenizer: Any = AutoTokenizer.from_pretrained(checkpoint)
        options = client_options(config)
        self.client = RolloutClient(urls, model=model, options=options)
        self._counted: dict[str, int] = {}
        self._num_stored = 0

        def report(event: str) -> None:
            print(f"Servers: {event}", flush=True)
            if states is not None:
                write_states(states, self.client.servers)

        self.client.servers.on_event = report
        self.client.require_servers()
        if config.num_top_logprobs > len(self.tokenizer):
            raise ConfigError(
                "the setting 'topk_logprobs' asks for more tokens than there are",
                expected=f"at most {len(self.tokenizer)}",
                got=config.num_top_logprobs,
                where=checkpoint,
            )
        capture = config.rollout_capture
        for url in [server.url for server in self.client.servers.in_use]:
            if capture != "off":
                # A server without the plugin, or a gateway that drops fields, shows here.
                probe(url, model, capture)
            if config.has_sampling_mask or config.num_top_logprobs:
                request = self._request(PROBE_IDS, for_training=True, max_new_tokens=1)
                check_scores(RolloutClient([url], model=model), request)

    def sample(
        self,
        prompts: Sequence[Prompt],
        num_samples: int,
        *,
        for_training: bool,
        answers: StoredAnswers | None = None,
        keep: Callable[[list[Sample]], Group] | None = None,
    ) -> list[Group]:
        """Sample `num_samples` responses of each prompt, with rewards.

        Args:
            prompts: The tasks.
            num_samples: Responses per prompt.
            for_training: Routes come back with the samples, and what else the loss needs.
            answers: Where responses are found that an interrupted run has sampled already, and
                stored as they end.
            keep: What is kept of a group's samples, called in a thread as soon as all have ended.

        Returns:
            The prompts' groups in their order.

        Raises:
            ServerError, PayloadError: A server failed, or an answer lacks what was asked for.
            DataError: The tokenizer makes no token of a prompt, or a response cannot be stored.
        """
        encoded = [self.encode(prompt) for prompt in prompts]
        repeated = [ids for ids in encoded for _ in range(num_samples)]
        # Those of a group leave the memory when it ends.
        responses = {number: self._response(ids) for number, ids in enumerate(repeated)}
        template = self._request((), for_training)
        unfinished = Counter(dict.fromkeys(range(len(prompts)), num_samples))
        groups: dict[int, Group] = {}
        lock = threading.Lock()

        def take(number: int, request: GenerateRequest, completion: Completion) -> None:
            check_finished(completion)
            response, group = responses[number], number // num_samples
            response.add(request, completion, self.tokenizer)
            with lock:
                unfinished[group] -= response.is_done
                is_last = response.is_done and not unfinished[group]
            if is_last:
                ended = [responses.pop(group * num_samples + n) for n in range(num_samples)]
                samples = [self._rewarded(prompts[group], one) for one in ended]
                groups[group] = keep(samples) if keep else Group(samples=samples)

        while running := [number for number, r in responses.items() if not r.is_done]:
            requests = [responses[n].request(template) for n in running]
            self._complete(running, requests, answers, take)
        return [groups[number] for number in range(len(prompts))]

    def _response(self, prompt_ids: Sequence[int]) -> Response:
        r = self.config.rollout
        return Response(
            prompt_ids=prompt_ids,
            max_new_tokens=r.max_new_tokens,
            tool=TOOLS.get(r.tool),
            tool_calls=r.tool_calls,
        )

    def server_metrics(self) -> dict[str, float]:
        """Return what happened to the servers since this was last called."""
        counts = self.client.counts
        events = {name: counts.get(name, 0) - self._counted.get(name, 0) for name in SERVER_METRICS}
        self._counted = counts
        metrics: dict[str, float] = {
            f"rollout/{metric}": events[name] for name, metric in SERVER_METRICS.items()
        }
        stored, self._num_stored = self._num_stored, 0
        num_servers = len(self.client.servers.in_use)
        return metrics | {"rollout/servers": num_servers, "rollout/stored_responses": stored}

    def _complete(
        self,
        numbers: Sequence[int],
        requests: Sequence[GenerateRequest],
        answers: StoredAnswers | None,
        take: Callable[[int, GenerateRequest, Completion], None],
    ) -> None:
        """Call `take` with each request's completion, stored or sampled, as soon as it is there."""
        keys = answers.keys(requests) if answers else [""] * len(requests)
        missing = []
        for place, (key, request) in enumerate(zip(keys, requests, strict=True)):
            completion = answers.find(key, request) if answers else None
            if completion is None:
                missing.append(place)
            else:
                take(numbers[place], request, completion)
        self._num_stored += len(requests) - len(missing)

        def use(number: int, completion: Completion) -> None:
            place = missing[number]
            if answers is not None:
                answers.add(keys[place], requests[place], completion)
            take(numbers[place], requests[place], completion)

        self.client.generate_each([requests[place] for place in missing], use)

    def encode(self, prompt: Prompt) -> list[int]:
        """Return a prompt's token ids; chat messages always take the tokenizer's template."""
        if self.config.data.chat_template or not isinstance(prompt.prompt, str):
            messages = prompt.prompt
            if isinstance(messages, str):
                messages = [{"role": "user", "content": messages}]
            ids: list[int] = self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_dict=False
            )
        else:
            ids = self.tokenizer.encode(prompt.prompt)
        if not ids:
            raise DataError("the prompt has no tokens", got=repr(prompt.prompt))
        return ids

    def _request(
        self, input_ids: Sequence[int], for_training: bool, **sampling: float
    ) -> GenerateRequest:
        """Return a request with the run's sampling."""
        r = self.config.rollout
        settings: dict[str, float] = {
            "temperature": r.temperature,
            "max_new_tokens": r.max_new_tokens,
        }
        settings["top_p"] = r.top_p
        if r.top_k:
            settings["top_k"] = r.top_k
        return GenerateRequest(
            input_ids=input_ids,
            sampling=settings | sampling,
            capture=self.config.rollout_capture if for_training else "off",
            wants_sampling_mask=for_training and self.config.has_sampling_mask,
            num_top_logprobs=self.config.num_top_logprobs if for_training else 0,
        )

    def _rewarded(self, prompt: Prompt, response: Response) -> Sample:
        text = self.tokenizer.decode(response.last_ids, skip_special_tokens=True)
        return Sample(
            prompt_ids=tuple(response.prompt_ids),
            reward=VERIFIERS[prompt.verifier](text, prompt.answer),
            weight_version=min(version_of(completion) for _, completion in response.answers),
            **response.columns(),
            **joined([sampled_logprobs(*answer) for answer in response.answers]),
        )


@dataclass(frozen=True, kw_only=True)
class Groups:
    """The groups of a batch, in the order of their sampling.

    Args:
        groups: As many as the batch has.
        num_prompts: Prompts consumed for them.
        num_rounds: Batches of requests that it took.
    """

    groups: list[Group]
    num_prompts: int
    num_rounds: int

    @property
    def samples(self) -> list[Sample]:
        """Those of all groups, one after another."""
        return [sample for group in self.groups for sample in group.samples]


def sample_groups(
    rollout: Rollout,
    draw: Callable[[int, int], list[Prompt]],
    count: int,
    rounds: int,
    answers: StoredAnswers | None = None,
    keep: Callable[[list[Sample]], Group] | None = None,
) -> Groups:
    """Sample a batch of `count` groups; DAPO's dynamic sampling if `rounds` is not 0.

    Groups whose responses all got the same reward have no advantage. Groups of further prompts
    replace them, in at most `rounds` further rounds. If some are still missing, such groups fill
    the batch after all, so that it always has its size.

    Args:
        rollout: Samples and rewards.
        draw: (offset, number) -> that many prompts, from `offset` after the first.
        count: Groups in the batch.
        rounds: Further rounds at most.
        answers, keep: As for `Rollout.sample`.

    Source: DAPO (2503.14476) equation 11; the bound on the rounds is ours.
    """
    size = rollout.config.data.samples_per_prompt
    groups: list[Group] = []
    is_informative: list[bool] = []
    num_rounds = 0
    while sum(is_informative) < count and num_rounds <= rounds:
        prompts = draw(len(groups), count - sum(is_informative))
        sampled = rollout.sample(prompts, size, for_training=True, answers=answers, keep=keep)
        rewards_S = torch.tensor([sample.reward for group in sampled for sample in group.samples])
        group_S = torch.arange(len(rewards_S)) // size
        is_informative += informative_groups(rewards_S, group_S)[::size].tolist()
        groups += sampled
        num_rounds += 1
    # The sort is stable: informative groups first, then the earliest others.
    chosen = sorted(range(len(groups)), key=lambda number: not is_informative[number])[:count]
    return Groups(
        groups=[groups[number] for number in sorted(chosen)],
        num_prompts=len(groups),
        num_rounds=num_rounds,
    )


def client_options(config: RecipeConfig) -> ClientOptions:
    """Return the client's options of a run."""
    r = config.rollout
    return ClientOptions(
        request_timeout_s=r.request_timeout_s,
        control_timeout_s=r.publish_timeout_s,
        health_every_s=r.health_every_s,
        # SGLang samples a token for a check, which takes a second and more.
        health_timeout_s=max(SHORTEST_CHECK_S, min(r.health_every_s, LONGEST_CHECK_S)),
        min_servers=r.min_servers,
        recovery_timeout_s=r.server_recovery_s,
    )


def check_scores(client: RolloutClient, request: GenerateRequest) -> None:
    """Raise unless a server answers a tiny request with the scores that training needs."""
    (completion,) = client.generate([request])
    check_finished(completion)
    sampled_logprobs(request, completion)


def joined(scores: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Join the scores of a response's answers, whose tokens follow one another."""
    whole: dict[str, Any] = dict(scores[0])
    for later in scores[1:]:
        for name, values in later.items():
            if isinstance(values, np.ndarray):
                whole[name] = np.concatenate([whole[name], values])
            elif name != "support_mass" and values is not None:
                whole[name] = [*whole[name], *values]
    whole["logp_mu"] = tuple(whole["logp_mu"])
    if "support_mass" in whole:
        lengths = [len(one["logp_mu"]) for one in scores]
        masses = [one["support_mass"] for one in scores]
        whole["support_mass"] = float(np.average(masses, weights=lengths))
    return whole


def check_finished(completion: Completion) -> None:
    """Raise DataError for an answer that ended otherwise than by itself or by its length."""
    if completion.finish_reason not in FINISHED:
        raise DataError(
            "a response is not finished",
            expected=" or ".join(FINISHED),
            got=completion.finish_reason,
            where=completion.url,
            fix="The server's log says why; a sampling mask needs top_k within its "
            "--sampling-mask-max-tokens",
        )


def sampled_logprobs(request: GenerateRequest, completion: Completion) -> dict[str, Any]:
    """Return log mu of the sampled and of the most likely tokens, as fields of Sample.

    Under a sampling mask the distribution is renormalised over the mask and is 0 outside.

    Raises:
        ServerError: The mask is missing.
    """
    scores: dict[str, Any] = {
        "logp_mu": tuple(completion.mu_logprobs.tolist()),
        "top_ids": completion.top_ids,
        "top_logp_mu": completion.top_logprobs,
    }
    if not request.wants_sampling_mask:
        return scores
    if completion.sampling_mask is None or completion.mask_logprobs is None:
        raise ServerError(
            "the answer has no sampling mask",
            expected="meta_info.output_token_sampling_mask and output_token_sampling_logprobs",
            where=completion.url,
            fix="SGLang 0.5.20 and later return it; or train with --no-keep-sampling-mask",
        )
    scores["logp_mu"] = tuple(completion.mask_logprobs.tolist())
    scores["support"] = completion.sampling_mask
    log_mass_T = completion.mu_logprobs - completion.mask_logprobs
    scores["support_mass"] = float(np.exp(log_mass_T).mean())
    if completion.top_ids is not None:
        pairs = zip(completion.top_ids, completion.sampling_mask, strict=True)
        inside_TK = np.array([np.isin(ids, mask) for ids, mask in pairs])
        within_TK = completion.top_logprobs - log_mass_T[:, None]
        scores["top_logp_mu"] = np.where(inside_TK, within_TK, -np.inf).astype(np.float32)
    return scores


def version_of(completion: Completion) -> int:
    """Return the version of the weights that sampled; -1 of a server that was told none."""
    return int(completion.weight_version) if completion.weight_version.isdigit() else -1


def mean_reward(samples: Sequence[Sample]) -> float:
    """Return the mean reward of some responses."""
    return sum(sample.reward for sample in samples) / len(samples)
