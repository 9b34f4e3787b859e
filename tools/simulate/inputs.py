"""What a simulation is made of: a model, a job, and rates, from one YAML file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import yaml

from routing_replay.errors import ConfigError, reading, unknown_name

# Where a rate comes from, from the firmest to the weakest.
SOURCES = ("measured", "computed", "published", "assumed")
# Bytes beside each expert id. `logits` samples rows and has no fixed number.
VALUE_BYTES = {"ids": 0, "weights": 4, "gates": 2}
FORWARDS_PER_UPDATE = {"none": 3, "moe": 4, "full": 4}
# Of a parameter in a checkpoint: main weight and two moments of AdamW, in float32.
OPTIMIZER_BYTES = 12
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Model:
    """Shapes of a mixture-of-experts model.

    Args:
        name: For the heading.
        layers: Transformer layers.
        moe_layers: Those with a router.
        experts: Of a layer.
        top_k: Experts of a token.
        hidden: Width of the residual stream; with the vocabulary the embedding's parameters.
        vocabulary: Tokens.
        attention_heads: Query heads.
        head_channels: Of a head, the mean of keys and values.
        parameters: All of them.
        active_parameters: Those that a token meets, its embedding among them.
    """

    name: str
    layers: int
    moe_layers: int
    experts: int
    top_k: int
    hidden: int
    vocabulary: int
    attention_heads: int
    head_channels: int
    parameters: float
    active_parameters: float

    def route_bytes(self, capture: str) -> int:
        """Return the bytes of one token's routes, as arrays and tables hold them."""
        id_bytes = 1 if self.experts <= 256 else 2
        return self.moe_layers * self.top_k * (id_bytes + VALUE_BYTES[capture])

    def forward_flops(self, sequence_tokens: float) -> float:
        """Return the operations of one token's forward pass, the mean over a causal sequence.

        Two per active parameter without the embedding, which is looked up; in attention four per
        head channel for each of the tokens before, of which there are half a sequence on average.
        """
        multiplied = self.active_parameters - self.vocabulary * self.hidden
        channels = self.layers * self.attention_heads * self.head_channels
        return 2 * multiplied + 4 * channels * sequence_tokens / 2


@dataclass(frozen=True, kw_only=True)
class Job:
    """A step and the machines that run it.

    Args:
        samples: Responses of a step.
        prompt_tokens, response_tokens: Means of a sample.
        longest_response_tokens: Of the longest.
        capture: "ids", "weights" or "gates".
        servers: SGLang servers, each on a host of its own.
        trainer_gpus, trainer_nodes: Of the trainer.
        is_packed: Microbatches are packed (`microbatch_tokens`); else every sequence is padded to
            the longest.
        recompute: "none", "moe" or "full".
        has_reference: A frozen reference scores the batch, too.
        live_every: Every so many steps the batch is scored without replay as well, twice; 0: never.
        stores_answers: Rank 0 stores every response as it ends.
        weight_bytes: Of a published parameter.
        checkpoint_every: Steps between two checkpoints; 0: none.
    """

    samples: int
    prompt_tokens: float
    response_tokens: float
    longest_response_tokens: int
    capture: str
    servers: int
    trainer_gpus: int
    trainer_nodes: int
    is_packed: bool = True
    recompute: str = "full"
    has_reference: bool = False
    live_every: int = 0
    stores_answers: bool = True
    weight_bytes: float = 2
    checkpoint_every: int = 0

    @property
    def sampled_tokens(self) -> float:
        return self.samples * self.response_tokens

    @property
    def tokens(self) -> float:
        return self.samples * (self.prompt_tokens + self.response_tokens)


@dataclass(frozen=True, kw_only=True)
class Rate:
    """A number, where it comes from, and how it was found.

    Args:
        value: In the unit that ends the rate's name.
        source: One of `SOURCES`.
        how: The command that measured it, or why it is assumed.
    """

    value: float
    source: str
    how: str


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Rates of the engines, of one processor core, of networks and disks. GB are 10^9 bytes.

    Args:
        server_tokens_per_s: Sampled tokens of one server with all its requests.
        response_token_ms: Between two tokens of one response.
        trainer_tflops: Achieved by one GPU, waiting and communication included.
        client_request_us: Processor time of the client for a request and its answer.
        client_token_us: The same for a sampled token: its id and log-prob in JSON.
        client_gb_per_s: Bytes of payloads that the client receives, decodes and checks with one
            core.
        store_gb_per_s: Bytes of payloads that rank 0 encodes and stores with one core.
        reward_ms: Decoding and verifying one response.
        batch_token_us: Putting a token into the batch, and saving it.
        parts_gb_per_s: Building the parts of the routes, and writing them.
        verify_gb_per_s: Reading them and comparing their checksums.
        token_bytes: Host memory of a token on rank 0 beside its routes.
        json_token_bytes: Of a sampled token on the wire, beside its routes.
        network_gb_per_s: Between two hosts, one connection.
        disk_write_gb_per_s, disk_read_gb_per_s: One host at the disk that servers share.
        disk_total_gb_per_s: All hosts together.
        bucket_gb_per_s: Weights broadcast from trainer to server GPUs.
    """

    server_tokens_per_s: Rate
    response_token_ms: Rate
    trainer_tflops: Rate
    client_request_us: Rate
    client_token_us: Rate
    client_gb_per_s: Rate
    store_gb_per_s: Rate
    reward_ms: Rate
    batch_token_us: Rate
    parts_gb_per_s: Rate
    verify_gb_per_s: Rate
    token_bytes: Rate
    json_token_bytes: Rate
    network_gb_per_s: Rate
    disk_write_gb_per_s: Rate
    disk_read_gb_per_s: Rate
    disk_total_gb_per_s: Rate
    bucket_gb_per_s: Rate


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """A whole simulation."""

    model: Model
    job: Job
    rates: Rates


def read_inputs(path: Path) -> Inputs:
    """Return what a YAML file says.

    Raises:
        ConfigError: It cannot be read, or holds unknown, missing or impossible values.
    """
    with reading(path, "the simulation's inputs", ConfigError, also=(yaml.YAMLError,)):
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    whole = _mapping(content, str(path), [field.name for field in fields(Inputs)])
    rates = _mapping(whole["rates"], f"{path}: rates", [field.name for field in fields(Rates)])
    made = {name: _made(Rate, rate, f"{path}: rates.{name}") for name, rate in rates.items()}
    for name, rate in made.items():
        _require_choice(rate.source, "source of a rate", SOURCES, f"{path}: rates.{name}")
    inputs = Inputs(
        model=_made(Model, whole["model"], f"{path}: model"),
        job=_made(Job, whole["job"], f"{path}: job"),
        rates=Rates(**made),
    )
    _check(inputs, path)
    return inputs


def _check(inputs: Inputs, path: Path) -> None:
    """Refuse values that contradict each other."""
    model, job = inputs.model, inputs.job
    _require_choice(job.capture, "capture level", VALUE_BYTES, f"{path}: job.capture")
    _require_choice(job.recompute, "recomputation", FORWARDS_PER_UPDATE, f"{path}: job.recompute")
    for name, value, most_name, most in (
        ("model.top_k", model.top_k, "model.experts", model.experts),
        ("model.moe_layers", model.moe_layers, "model.layers", model.layers),
        (
            "model.active_parameters",
            model.active_parameters,
            "model.parameters",
            model.parameters,
        ),
        (
            "job.response_tokens",
            job.response_tokens,
            "job.longest_response_tokens",
            job.longest_response_tokens,
        ),
        ("job.trainer_nodes", job.trainer_nodes, "job.trainer_gpus", job.trainer_gpus),
    ):
        if value > most:
            raise ConfigError(
                f"{name} is larger than {most_name}",
                expected=f"at most {most:g}",
                got=f"{value:g}",
                where=path,
                fix=f"Correct one of {name} and {most_name}",
            )


def _made(kind: type[T], content: object, where: str) -> T:
    """Return a dataclass from a mapping, after a look at every value."""
    known: list[Field[Any]] = list(fields(kind))  # type: ignore[arg-type]
    required = [field.name for field in known if field.default is MISSING]
    values = _mapping(content, where, required, [field.name for field in known])
    types = {field.name: str(field.type) for field in known}
    for name, value in values.items():
        _require_type(value, types[name], name, f"{where}.{name}")
    return kind(**values)


def _mapping(
    content: object, where: str, required: list[str], known: list[str] | None = None
) -> Mapping[str, Any]:
    if not isinstance(content, Mapping):
        raise ConfigError(
            "a section of the inputs is not a mapping",
            expected=f"the keys {', '.join(required)}",
            got=repr(content),
            where=where,
            fix="Start from a file in tools/simulate/inputs",
        )
    for name in content:
        if name not in (known or required):
            error = unknown_name("key of the inputs", name, known or required)
            raise ConfigError(
                error.what, expected=error.expected, got=error.got, where=where, fix=error.fix
            )
    missing = [name for name in required if name not in content]
    if missing:
        raise ConfigError(
            "the inputs lack keys",
            expected=", ".join(missing),
            got=", ".join(map(str, content)) or "nothing",
            where=where,
            fix="Start from a file in tools/simulate/inputs",
        )
    return content


# Of these 0 means never or none.
MAY_BE_ZERO = ("live_every", "checkpoint_every", "prompt_tokens")


def _require_type(value: object, kind: str, name: str, where: str) -> None:
    """Refuse text for numbers, and numbers that are not positive."""
    expected = {"str": "text", "bool": "true or false", "int": "a positive whole number"}.get(
        kind, "a positive number"
    )
    classes: dict[str, type | tuple[type, ...]] = {"str": str, "bool": bool, "int": int}
    is_right = isinstance(value, classes.get(kind, (int, float)))
    if kind in ("int", "float"):
        lowest_ok = name in MAY_BE_ZERO
        is_right = is_right and not isinstance(value, bool)
        is_right = is_right and isinstance(value, int | float) and (value > 0 or lowest_ok)
        is_right = is_right and isinstance(value, int | float) and 0 <= value < float("inf")
    if not is_right:
        raise ConfigError(
            "a value of the inputs cannot be",
            expected=expected,
            got=repr(value),
            where=where,
            fix="YAML reads 1e9 as text: write 1.0e+9" if isinstance(value, str) else None,
        )


def _require_choice(value: str, kind: str, known: Any, where: str) -> None:
    if value not in known:
        error = unknown_name(kind, value, known)
        raise ConfigError(
            error.what, expected=error.expected, got=error.got, where=where, fix=error.fix
        )
