"""Responses of several answers: calls of a tool.

A response is one training sequence. What the tool returns is in it, and is not trained: its tokens
are in no mask. Each request asks for the routes that no earlier answer of the response holds.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from routing_replay.rollout import Completion, Conversation, GenerateRequest
from routing_replay.routes.routes import Routes
from routing_replay.routes.spans import Span, num_known_rows

CALL = re.compile(r"(\d+)([+-])(\d+)=$")


@dataclass(frozen=True, kw_only=True)
class Tool:
    """A tool that a response can call.

    Args:
        stop: Text that ends a call: the server stops at it.
        run: The text of the answer up to and with `stop` -> what the tool returns.
    """

    stop: str
    run: Callable[[str], str]


def calculate(text: str) -> str:
    """Return the sum or difference at the end of a text, three digits; "-" if there is none."""
    call = CALL.search(text)
    if call is None:
        return "-"
    first, sign, second = call.groups()
    return f"{int(first) + int(second) * (1 if sign == '+' else -1):03d}"


TOOLS = {"calculator": Tool(stop="=", run=calculate)}


@dataclass(kw_only=True)
class Response:
    """A response in the making.

    Args:
        prompt_ids: Tokens of the prompt.
        max_new_tokens: Most tokens that are sampled, over all answers.
        tool: What an answer may call; None for nothing.
        tool_calls: Most calls.
    """

    prompt_ids: Sequence[int]
    max_new_tokens: int
    tool: Tool | None = None
    tool_calls: int = 0
    conversation: Conversation = field(default_factory=Conversation)
    # (request, answer), in their order.
    answers: list[tuple[GenerateRequest, Completion]] = field(default_factory=list)
    # Tokens since the tool last returned: what a call, or the reward, is read from.
    last_ids: list[int] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    is_done: bool = False

    def __post_init__(self) -> None:
        self.spans.append(Span(token_ids=self.prompt_ids))

    @property
    def num_left(self) -> int:
        """Tokens that may still be sampled."""
        return self.max_new_tokens - sum(len(c.output_ids) for _, c in self.answers)

    def request(self, template: GenerateRequest) -> GenerateRequest:
        """Return the next request.

        Args:
            template: The run's sampling; prompt, length and first row of the routes are replaced.
        """
        tokens = [token for span in self.spans for token in span.tokens()]
        sampling: dict[str, Any] = {**template.sampling, "max_new_tokens": self.num_left}
        if self.tool is not None:
            sampling["stop"] = [self.tool.stop]
        start = num_known_rows(self.conversation.samples, tokens)
        return replace(template, input_ids=tokens, sampling=sampling, start=start)

    def add(self, request: GenerateRequest, completion: Completion, tokenizer: Any) -> None:
        """Take an answer; run the tool if it ends in a call."""
        self.answers.append((request, completion))
        sample = self.conversation.add(request, completion)
        self.spans.append(Span(sample=sample))
        self.last_ids += completion.output_ids
        text = tokenizer.decode(self.last_ids, skip_special_tokens=True)
        self.is_done = not self._is_call(completion, text)
        if not self.is_done:
            assert self.tool is not None
            self.tool_calls -= 1
            output = tokenizer.encode(self.tool.run(text), add_special_tokens=False)
            self.spans.append(Span(token_ids=output))
            self.last_ids = []

    def _is_call(self, completion: Completion, text: str) -> bool:
        if self.tool is None or completion.finish_reason != "stop":
            return False
        return self.tool.stop in text and self.tool_calls > 0 and self.num_left > 0

    def columns(self) -> dict[str, Any]:
        """Return the tokens after the prompt, which of them were sampled, and their routes.

        Returns:
            Fields of the batch's `Sample`.
        """
        if len(self.answers) == 1:
            ((_, completion),) = self.answers
            response_ids = np.array(completion.output_ids, np.int32)
            return {"response_ids": response_ids, "routes": completion.routes}
        tokens = [token for span in self.spans[1:] for token in span.tokens()]
        sampled = [span.sample is not None for span in self.spans[1:] for _ in span.tokens()]
        return {
            "response_ids": np.array(tokens, np.int32),
            "is_sampled": np.array(sampled),
            "routes": self._routes(),
        }

    def _routes(self) -> Routes | None:
        if all(completion.routes is None for _, completion in self.answers):
            return None
        return self.conversation.trajectory(self.spans).routes
