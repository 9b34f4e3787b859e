"""What a run starts from: a checkpoint, training prompts, held-out prompts."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from recipes.model import fp8
from recipes.model.weight_names import require_supported
from routing_replay.errors import CheckpointError

from ..settings.config import RecipeConfig
from .prompts import Prompt, read_prompts
from .tiny_model import checkpoint_folder

ROLLOUT_MODEL = "--rollout-model"


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Checkpoint and prompts.

    Args:
        base: Hugging Face checkpoint: first weights, config and tokenizer.
        reference: That of the frozen reference of KL terms.
        prompts: For training.
        heldout: For evaluation.
    """

    base: Path
    reference: Path
    prompts: list[Prompt]
    heldout: list[Prompt]


def base_folder(config: RecipeConfig) -> Path:
    """Return the folder of the checkpoint that a run starts from, which may not exist yet."""
    is_tiny = config.model.model == "tiny"
    return checkpoint_folder(config) if is_tiny else Path(config.model.model)


def server_folder(config: RecipeConfig) -> Path:
    """Return the folder of the checkpoint that the servers start from."""
    return Path(config.rollout.rollout_model or base_folder(config))


def load_inputs(config: RecipeConfig) -> Inputs:
    """Read the inputs of a configuration; a tiny model must have been prepared.

    Raises:
        CheckpointError: There is no checkpoint.
        DataError: A broken prompt file.
    """
    base = base_folder(config)
    reference = Path(config.objective.reference or base)
    rollout = server_folder(config)
    for folder, flag in ((base, "--model"), (reference, "--reference"), (rollout, ROLLOUT_MODEL)):
        if not (folder / "config.json").is_file():
            raise CheckpointError(
                "there is no checkpoint",
                expected="a folder with config.json, tokenizer and safetensors files",
                where=folder,
                fix=f"Download the model first and name its folder with {flag}",
            )
        _check_architecture(folder / "config.json")
    if config.rollout.rollout_weights == "fp8":
        path = rollout / "config.json"
        fp8.require_quantized(json.loads(path.read_text()), path)
    heldout = read_prompts(config.data.heldout_prompts or base / "heldout.jsonl")
    return Inputs(
        base=base,
        reference=reference,
        prompts=read_prompts(config.data.prompts or base / "train.jsonl"),
        heldout=heldout[: config.data.heldout_limit or None],
    )


def _check_architecture(path: Path) -> None:
    """Refuse an unknown architecture here, before a server has been waited for."""
    try:
        model_type = json.loads(path.read_text()).get("model_type")
    except (OSError, ValueError) as error:
        raise CheckpointError("config.json cannot be read", got=error, where=path) from error
    require_supported(model_type, path)
