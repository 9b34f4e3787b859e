"""Rollouts and rewards: prompts become token ids, SGLang samples, verifiers reward."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from recipes.serving.kept import write_states
from routing_replay.errors import ConfigError, DataError, RoutingReplayError
from routing_replay.objectives import informative_groups
from routing_replay.rollout import (
    ClientOptions,
    Completion,
    GenerateRequest,
    RolloutClient,
    Session,
    SharedSession,
    probe,
)
from routing_replay.rollout.session import all_or_none
from routing_replay.routes.shape import MoEShape

from ..data.prompts import Prompt
from ..data.verifiers import VERIFIERS
from ..settings.config import RecipeConfig
from .answers import StoredAnswers
from .batch import Sample
from .groups import Group, StepFiles
from .scores import check_finished, joined, sampled_logprobs
from .turns import TOOLS, Response
from .versions import num_old_context

T = TypeVar("T")
# Any tokens will do: only the form of the answer is checked.
PROBE_IDS = (1, 2)
SHORTEST_CHECK_S, LONGEST_CHECK_S = 5.0, 20.0
PROBE_RETRIES, PROBE_WAIT_S = 3, 0.5
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
        options: Of the client; None: those of the run.

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
        options: ClientOptions | None = None,
    ):
        from transformers import AutoTokenizer

        self.config = config
        self.checkpoint = checkpoint
        self.tokenizer: Any = AutoTokenizer.from_pretrained(checkpoint)
        options = options or client_options(config)
        self.client = RolloutClient(urls, model=model, options=options)
        self._session = SharedSession(self.client.session)
        self._counted: dict[str, int] = {}

        def report(event: str) -> None:
            print(f"Servers: {event}", flush=True)
            if states is not None:
                write_states(states, self.client.servers)

        self.client.servers.on_event = report
        self.client.resume()  # a run that was killed may have left them paused
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
                probe_again(url, model, capture)
            if config.has_sampling_mask or config.num_top_logprobs:
                request = self._request(PROBE_IDS, for_training=True, max_new_tokens=1)
                check_scores(RolloutClient([url], model=model), request)

    def sample(
        self,
        prompts: Sequence[Prompt],
        num_samples: int,
        files: StepFiles | None = None,
        first: int = 0,
    ) -> list[Group]:
        """Sample `num_samples` responses of each prompt, with rewards. Several threads may do so.

        Args:
            prompts: The tasks.
            num_samples: Responses per prompt.
            files: Where the groups of a step that is trained are found that an interrupted run has
                sampled, and go as soon as they end. None: for an evaluation, without routes and
                what else the loss needs.
            first: Number of the first group within the step.

        Returns:
            The prompts' groups in their order.

        Raises:
            ServerError, PayloadError: A server failed, or an answer lacks what was asked for.
            DataError: The tokenizer makes no token of a prompt, or a response cannot be stored.
        """
        numbered = enumerate(prompts, first)
        return results_of([self.begin(n, prompt, num_samples, files) for n, prompt in numbered])

    def begin(
        self, number: int, prompt: Prompt, num_samples: int, files: StepFiles | None
    ) -> Future[Group]:
        """Begin to sample one group; arguments and errors as of `sample`."""

        async def work(session: Session) -> Group:
            token_ids = self.encode(prompt)
            answers = None
            if files is not None and files.answers is not None:
                answers = await asyncio.to_thread(files.answers.group, number)
            template = self._request((), for_training=files is not None)
            if self.config.has_priorities:
                # An evaluation, which training waits for, comes before all steps.
                template = replace(template, priority=0 if files is None else -files.step)
            responses = [self._response(token_ids) for _ in range(num_samples)]
            members = enumerate(responses)
            await all_or_none(self._finish(session, *m, template, answers) for m in members)
            group = await asyncio.to_thread(self._ended, number, prompt, responses, files)
            return replace(group, num_stored=answers.num_found if answers else 0)

        return self._session.submit(work)

    async def _finish(
        self,
        session: Session,
        member: int,
        response: Response,
        template: GenerateRequest,
        answers: StoredAnswers | None,
    ) -> None:
        """Sample a response to its end, as far as it is not stored."""

        def take(request: GenerateRequest, completion: Completion, is_stored: bool) -> None:
            if answers is not None and not is_stored:
                answers.add(member, request, completion)
            check_finished(completion)
            response.add(request, completion, self.tokenizer)

        while not response.is_done:
            request = response.request(template)
            stored = None
            if answers is not None:
                stored = await asyncio.to_thread(answers.find, member, request)
            completion = stored or await session.complete(request)
            await asyncio.to_thread(take, request, completion, stored is not None)

    def _ended(
        self,
        number: int,
        prompt: Prompt,
        responses: Sequence[Response],
        files: StepFiles | None,
    ) -> Group:
        samples = [self._rewarded(prompt, response) for response in responses]
        if files is None or files.writer is None:
            return Group(samples=samples)
        return files.writer.write(number, samples)

    def _response(self, prompt_ids: Sequence[int]) -> Response:
        r = self.config.rollout
        return Response(
            prompt_ids=prompt_ids,
            max_new_tokens=r.max_new_tokens,
            tool=TOOLS.get(r.tool),
            tool_calls=r.tool_calls,
        )

    def state(self) -> dict[str, float]:
        """Return what happened to the servers since this was last called."""
        counts = self.client.counts
        events = {name: counts.get(name, 0) - self._counted.get(name, 0) for name in SERVER_METRICS}
        self._counted = counts
        metrics: dict[str, float] = {
            f"rollout/{metric}": events[name] for name, metric in SERVER_METRICS.items()
        }
        num_servers = len(self.client.servers.in_use)
        return metrics | {"rollout/servers": num_servers}

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
        sample = Sample(
            prompt_ids=np.array(response.prompt_ids, np.int32),
            reward=VERIFIERS[prompt.verifier](text, prompt.answer),
            **response.columns(),
            **joined([sampled_logprobs(*answer) for answer in response.answers]),
        )
        return replace(sample, num_old_context=num_old_context(sample))


@dataclass(frozen=True, kw_only=True)
class Groups:
    """The groups of a batch, in the order of their sampling.

    Args:
        groups: As many as the batch has.
        num_prompts: Prompts consumed for them.
        num_rounds: Batches of requests that it took.
        num_stored: Responses that were found, of all prompts.
    """

    groups: list[Group]
    num_prompts: int
    num_rounds: int
    num_stored: int

    @property
    def samples(self) -> list[Sample]:
        """Those of all groups, one after another."""
        return [sample for group in self.groups for sample in group.samples]


def sample_groups(
    sample: Callable[[Sequence[Prompt], int], list[Group]],
    draw: Callable[[int, int], list[Prompt]],
    count: int,
    rounds: int,
) -> Groups:
    """Sample a batch of `count` groups; DAPO's dynamic sampling if `rounds` is not 0.

    Groups whose responses all got the same reward have no advantage. Groups of further prompts
    replace them, in at most `rounds` further rounds. If some are still missing, such groups fill
    the batch after all, so that it always has its size.

    Args:
        sample: (prompts, number of the first group) -> their groups.
        draw: (offset, number) -> that many prompts, from `offset` after the first.
        count: Groups in the batch.
        rounds: Further rounds at most.

    Source: DAPO (2503.14476) equation 11; the bound on the rounds is ours.
    """
    groups: list[Group] = []
    is_informative: list[bool] = []
    num_rounds = 0
    while sum(is_informative) < count and num_rounds <= rounds:
        sampled = sample(draw(len(groups), count - sum(is_informative)), len(groups))
        size = len(sampled[0].samples)
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
        num_stored=sum(group.num_stored for group in groups),
    )


def results_of(futures: Sequence[Future[T]]) -> list[T]:
    """Return the results in their order; the first error cancels what still runs."""
    try:
        ended, _ = wait(futures, return_when=FIRST_EXCEPTION)
        for future in ended:
            future.result()
        return [future.result() for future in futures]
    finally:
        for future in futures:
            future.cancel()


def probe_again(url: str, model: MoEShape, capture: str) -> None:
    """Raise for a server without the plugin, or a gateway that drops fields.

    What a connection damages now and then, another try gets whole.
    """
    for number in range(PROBE_RETRIES):
        try:
            probe(url, model, capture)
        except RoutingReplayError as error:
            print(f"Servers: {url} is asked again: {error}", flush=True)
            time.sleep(PROBE_WAIT_S * 2**number)
        else:
            return
    probe(url, model, capture)


def client_options(config: RecipeConfig) -> ClientOptions:
    """Return the client's options of a run."""
    r = config.rollout
    return ClientOptions(
        # A server's queue holds the requests of so many steps.
        request_timeout_s=r.request_timeout_s * max(1, r.ahead),
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


def mean_reward(samples: Sequence[Sample]) -> float:
    """Return the mean reward of some responses."""
    return sum(sample.reward for sample in samples) / len(samples)
