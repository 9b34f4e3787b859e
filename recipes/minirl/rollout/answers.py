"""Responses of a step, stored as they end: an interrupted run samples none of them again.

answers/step_000007/group_000012.jsonl     one line of JSON per response, as they ended:
    {"key": request, settings and member, "url": server, "answer": as SGLang's /generate would say
     it, "routes": its routed_experts}
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from routing_replay.errors import DataError, RoutingReplayError, writing
from routing_replay.rollout import Completion, GenerateRequest
from routing_replay.rollout.requests import answer_of, completion_of
from routing_replay.routes.payload import FIELD
from routing_replay.routes.shape import MoEShape

from ..settings.config import RecipeConfig

FOLDER = "answers"
WHAT = "the responses of a step"  # for errors
# What decides the weights of a step: responses of a run with other values are of another policy.
SECTIONS = ("model", "data", "training", "objective", "replay")


@dataclass(frozen=True, kw_only=True)
class StepAnswers:
    """The stored responses of a step: a file for each group, which only its sampler opens.

    Args:
        folder: Of the step.
        settings: Of the run, as far as they decide the step's weights.
        model: Layers, experts and top-k of the routes.
    """

    folder: Path
    settings: str
    model: MoEShape

    @classmethod
    def of(cls, shared_dir: Path, step: int, config: RecipeConfig, model: MoEShape) -> StepAnswers:
        """Return those of a step of a run.

        Args:
            shared_dir: Folder of the run that every machine sees.
            step: Its number.
            config: The run's.
            model: Of the routes.

        Raises:
            DataError: The folder cannot be made.
        """
        sections = asdict(config)
        settings = json.dumps({name: sections[name] for name in SECTIONS}, sort_keys=True)
        folder = shared_dir / FOLDER / f"step_{step:06d}"
        with writing(folder, WHAT, DataError):
            folder.mkdir(parents=True, exist_ok=True)
        return cls(folder=folder, settings=settings, model=model)

    def group(self, number: int) -> StoredAnswers:
        """Return the responses of a group, by its number within the step.

        Raises:
            DataError: The file cannot be read or written.
        """
        return StoredAnswers(self.folder / f"group_{number:06d}.jsonl", self.settings, self.model)


class StoredAnswers:
    """The stored responses of one group.

    A response belongs to a member of the group and to a request with the same tokens and settings.
    What was cut short or damaged on the disk is sampled again.

    Args:
        path: Their file.
        settings, model: As of `StepAnswers`.

    Raises:
        DataError: The file cannot be read or written.
    """

    def __init__(self, path: Path, settings: str, model: MoEShape):
        self.path = path
        self._settings = settings
        self._model = model
        self._lock = threading.Lock()
        self.num_found = 0
        with writing(path, WHAT, DataError):
            self._stored = _read(path)

    def find(self, member: int, request: GenerateRequest) -> Completion | None:
        """Return a member's stored response to a request, or None."""
        record = self._stored.get(self._key(member, request)) if self._stored else None
        if record is None:
            return None
        try:
            answer = _with_routes(record["answer"], record.get("routes"))
            completion = completion_of(answer, request, record["url"], self._model)
        except RoutingReplayError:
            return None
        with self._lock:
            self.num_found += 1
        return completion

    def add(self, member: int, request: GenerateRequest, completion: Completion) -> None:
        """Store a response. Several threads may do so.

        Raises:
            DataError: It cannot be written.
        """
        line = line_of(self._key(member, request), completion, request.start)
        fix = "Free space and go on with --resume; or train with --no-store-answers"
        with (
            self._lock,
            writing(self.path, WHAT, DataError, fix=fix),
            open(self.path, "a", encoding="utf-8") as file,
        ):
            file.write(line)

    def _key(self, member: int, request: GenerateRequest) -> str:
        body = replace(request, priority=None).to_json()  # it decides when, not what
        text = self._settings + json.dumps(body, sort_keys=True)
        return f"{hashlib.blake2b(text.encode(), digest_size=16).hexdigest()}-{member}"


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
    for folder in (shared_dir / FOLDER).glob("step_*"):
        if int(folder.name.removeprefix("step_")) <= step:
            shutil.rmtree(folder, ignore_errors=True)


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
