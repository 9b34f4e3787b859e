"""Arms of a batch: log-probs of its tokens, each arm scored under one setting, kept on disk.

A folder `arms/` beside the batch holds one file per arm, so that whatever was scored is never
scored again, and everything else is arithmetic without an engine. `tools.score_arms` scores.

    live           live routing
    routes         replayed experts
    weights        and replayed combine weights
    checkpoint     and the checkpoint that sampled
    KIND SETTING   as the last of these, with one setting changed: "precision float32",
                   "order allgather", "layout tp2", "kernels te", "kernels math"
    again N        the last of the four once more
    live in A-B    as `routes`, but the layers A..B route live
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..errors import ConfigError, DataError, reading, writing
from ..files import atomic_write
from ..routes.batch import RolloutBatch

FOLDER = "arms"
LADDER = ("live", "routes", "weights", "checkpoint")
LAYOUT = "layout"
KINDS = ("precision", "order", LAYOUT, "kernels")
AGAIN = "again"


@dataclass(frozen=True, kw_only=True)
class Scores:
    """One arm's result.

    Args:
        logp_N: float32, log-prob of each sampled token.
        entropy_N: float32, of the policy over the vocabulary.
        live_mass_LR: float64, by routed layer and row of the table the live router's probability
            of the replayed experts; nan where it was not seen. None if it was not measured.
    """

    logp_N: torch.Tensor
    entropy_N: torch.Tensor
    live_mass_LR: torch.Tensor | None = None


class ScoredArms:
    """The arms of one batch.

    Args:
        folder: Of the batch (`batch.safetensors`).
        fingerprint: Of what all arms share, beside the batch: the trained checkpoint, temperature,
            version of the code; and the layout, which the arms of another layout do not share.
            None reads whatever was scored together.

    Raises:
        DataError: No batch, or a damaged file of an arm.
        ConfigError: Arms with another fingerprint than this one, or than each other.
    """

    def __init__(self, folder: Path, fingerprint: Mapping[str, str] | None = None):
        self.batch = RolloutBatch.open(folder / "batch.safetensors")
        self._folder = folder / FOLDER
        self._fingerprint = {"batch": self.batch.fingerprint, **(fingerprint or {})}
        self._arms: dict[str, Scores] = {}
        # A hidden file is an arm that a killed run had begun to write, or another run is writing.
        for path in sorted(self._folder.glob("[!.]*.safetensors")):
            name, scores = self._read(path)
            self._arms[name] = scores

    def __contains__(self, name: str) -> bool:
        return name in self._arms

    def __getitem__(self, name: str) -> Scores:
        return self._arms[name]

    @property
    def names(self) -> list[str]:
        return list(self._arms)

    @property
    def base(self) -> str:
        """The last arm of the ladder: nothing is equal beyond it but one setting at a time.

        Raises:
            DataError: No arm of the ladder was scored.
        """
        scored = [name for name in LADDER if name in self._arms]
        if not scored:
            raise DataError(
                "the batch has no scored arms",
                expected=f"at least {LADDER[0]!r} and {LADDER[1]!r}",
                got=", ".join(self.names) or "none",
                where=self._folder,
                fix="torchrun -m tools.score_arms BATCH --checkpoint CHECKPOINT",
            )
        return scored[-1]

    def of_kind(self, kind: str) -> list[str]:
        """Return the arms whose names begin with a word, in their natural order."""
        names = [name for name in self._arms if name.split()[0] == kind]
        return sorted(names, key=lambda name: [int(x) for x in re.findall(r"\d+", name)])

    def add(self, name: str, scores: Scores, is_writer: bool = True) -> None:
        """Keep an arm, on disk too where this rank writes.

        Raises:
            DataError: The disk is full or not writable; what was scored before stays.
        """
        self._arms[name] = scores
        if not is_writer:
            return
        self._folder.mkdir(exist_ok=True)
        tensors = {"logp_N": scores.logp_N, "entropy_N": scores.entropy_N}
        if scores.live_mass_LR is not None:
            tensors["live_mass_LR"] = scores.live_mass_LR
        metadata = {"arm": name, "fingerprint": json.dumps(self._shared_by(name))}
        path = self._folder / f"{name.replace(' ', '_')}.safetensors"
        with writing(path, "the scores of an arm", DataError), atomic_write(path) as partial:
            save_file({k: v.contiguous() for k, v in tensors.items()}, partial, metadata)

    def _read(self, path: Path) -> tuple[str, Scores]:
        what = "the scores of an arm"
        also = (SafetensorError, KeyError, TypeError)
        with reading(path, what, DataError, also=also), safe_open(path, "pt") as file:
            metadata = file.metadata()
            stored = json.loads(metadata["fingerprint"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            scores = Scores(
                logp_N=tensors["logp_N"],
                entropy_N=tensors["entropy_N"],
                live_mass_LR=tensors.get("live_mass_LR"),
            )
        for key, value in self._shared_by(metadata["arm"]).items():
            if stored.get(key) != value:
                raise ConfigError(
                    f"an arm was scored with another {key}",
                    expected=value,
                    got=stored.get(key),
                    where=path,
                    fix="Remove the folder of the arms to score again",
                )
        self._fingerprint = stored | self._fingerprint  # for the next arms
        return metadata["arm"], scores

    def _shared_by(self, name: str) -> dict[str, str]:
        """The part of the fingerprint that holds for an arm."""
        is_own = name.split()[0] == LAYOUT
        return {k: v for k, v in self._fingerprint.items() if not (is_own and k == LAYOUT)}
