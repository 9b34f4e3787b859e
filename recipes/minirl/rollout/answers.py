"""Responses of a step, stored as they end: an interrupted run samples none of them again.

answers/step_000007.jsonl      one line of JSON per response, in the order in which they ended:
    {"key": request and settings, "url": server, "answer": as SGLang's /generate would say it,
     "routes": its routed_experts}
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from routing_replay.errors import DataError, RoutingReplayError, writing
from routing_replay.rollout import Completion, GenerateRequest
from routing_replay.rollout.requests import answer_of, completion_of
from routing_replay.routes.payload import FIELD
from routing_replay.routes.shape import MoEShape

from ..settings.config import RecipeConfig

FOLDER = "answers"
# What decides the weights of a step: responses of a run with other values are of another policy.
SECTIONS = ("model", "data", "training", "objective", "replay")


class StoredAnswers:
    """The stored responses of one step; only the first rank has them.

    A response belongs to a request with the same tokens and settings; among identical requests, to
    the one with the same number. What was cut short or damaged on the disk is sampled again.

    Args:
        shared_dir: Folder of the run that every machine sees.
        step: Its number.
        config: The run's.
        model: Layers, experts and top-k of the routes.

    Raises:
        DataError: The file cannot be read or written.
    """

    def __init__(self, shared_dir: Path, step: int, config: RecipeConfig, model: MoEShape):
        self.path = shared_dir / FOLDER / f"step_{step:06d}.jsonl"
        self._model = model
        sections = asdict(config)
        self._settings = json.dumps({name: sections[name] for name in SECTIONS}, sort_keys=True)
        self._num_asked: Counter[str] = Counter()
        self._lock = threading.Lock()
        with writing(self.path, "the responses of a step", DataError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._stored = _read(self.path)

    def keys(self, requests: Sequence[GenerateRequest]) -> list[str]:
        """Return what tells the requests of this step apart; call it once for each of them."""
        keys = []
        for request in requests:
            text = self._settings + json.dumps(request.to_json(), sort_keys=True)
            digest = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
            keys.append(f"{digest}-{self._num_asked[digest]}")
            self._num_asked[digest] += 1
        return keys

    def find(self, key: str, request: GenerateRequest) -> Completion | None:
        """Return the stored response to a request, or None."""
        record = self._stored.get(key)
        if record is None:
            return None
        try:
            answer = _with_routes(record["answer"], record.get("routes"))
            return completion_of(answer, request, record["url"], self._model)
        except RoutingReplayError:
            return None

    def add(self, key: str, request: GenerateRequest, completion: Completion) -> None:
        """Store a response. Several threads may do so.

        Raises:
            DataError: It cannot be written.
        """
        line = line_of(key, completion, request.start)
        fix = "Free space and go on with --resume; or train with --no-store-answers"
        with (
            self._lock,
            writing(self.path, "the responses of a step", DataError, fix=fix),
            open(self.path, "a", encoding="utf-8") as file,
        ):
            file.write(line)


def line_of(key: str, completion: Completion, start: int) -> str:
    """Return the line that stores a response: one JSON object.

    Its routes stand beside the answer, as they are: base64 has nothing to escape, and JSON's search
    for it would take longer than all the rest.
    """
    answer = answer_of(completion, start)
    routes = answer["meta_info"].pop(FIELD, None)
    line = json.dumps({"key": key, "url": completion.url, "answer": answer})
    return line + "\n" if routes is None else f'{line[:-1]}, "routes": "{routes}"}}\n'


def _with_routes(answer: dict[str, Any], routes: str | None) -> dict[str, Any]:
    if routes is None:
        return answer
    return answer | {"meta_info": answer["meta_info"] | {FIELD: routes}}


def remove_covered(shared_dir: Path, step: int) -> None:
    """Remove the responses of the steps up to one that a checkpoint holds."""
    for path in (shared_dir / FOLDER).glob("step_*.jsonl"):
        if int(path.stem.removeprefix("step_")) <= step:
            path.unlink(missing_ok=True)


def _read(path: Path) -> dict[str, dict[str, Any]]:
    """Return the records by key, and cut off what a crash left of the last line."""
    if not path.is_file():
        return {}
    records = {}
    with open(path, "rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                os.truncate(path, file.tell() - len(line))
                break
            try:
                record = json.loads(line)
                records[record["key"]] = record
            except (ValueError, TypeError, KeyError):
                continue
    return records
