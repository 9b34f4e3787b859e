"""The legs of one step, each with what bounds it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .inputs import FORWARDS_PER_UPDATE, OPTIMIZER_BYTES, SOURCES, Inputs

GIGA, TERA = 1e9, 1e12
MILLI, MICRO = 1e-3, 1e-6
BASE64 = 4 / 3


@dataclass(frozen=True, kw_only=True)
class Design:
    """A way to run a step.

    Args:
        name: For tables.
        is_beside_servers: Answers are decoded and rewarded, and their routes written, beside the
            server that sampled them; the routes go from there to the nodes that train them (Ray).
        has_buckets: Weights go from GPU to GPU in flattened buckets, not through a disk.
        ahead: Steps that are sampled while a step is trained. With several, responses run on while
            weights are published, so that the longest one may take as many steps.
    """

    name: str
    is_beside_servers: bool = False
    has_buckets: bool = False
    ahead: int = 0


@dataclass(frozen=True, kw_only=True)
class Leg:
    """One part of a step.

    Args:
        name: What is done.
        clock: The clock of the recipe's metrics that it falls under, `time/CLOCK_s`.
        seconds: That the step takes longer for it.
        bound: What bounds it.
        rates: Names of the rates that it follows from.
        network_bytes: That the busiest process sends or receives.
        processor_s: Of the busiest process on a CPU.
        host_bytes: Memory of the busiest process.
    """

    name: str
    clock: str
    seconds: float
    bound: str
    rates: tuple[str, ...] = ()
    network_bytes: float = 0.0
    processor_s: float = 0.0
    host_bytes: float = 0.0

    def source(self, inputs: Inputs) -> str:
        """Return how firm it is: the weakest source of its rates, and computed at best."""
        sources = [getattr(inputs.rates, name).source for name in self.rates]
        return max(["computed", *sources], key=SOURCES.index)


def legs(inputs: Inputs, design: Design) -> list[Leg]:
    """Return the legs of a step of one design, in their order."""
    return [
        *_sampling(inputs, design),
        *_files(inputs, design),
        *_passes(inputs),
        _weights(inputs, design),
        *_checkpoint(inputs),
    ]


def step_seconds(inputs: Inputs, design: Design) -> float:
    """Return the seconds of a whole step.

    Legs follow one another. Ahead, sampling with its rewards and files runs beside the passes;
    routes reach the other nodes and weights the servers in between, while nothing samples. What a
    retraction costs, tokens that are prefilled again, is not counted.
    """
    by_clock: dict[str, float] = {}
    for leg in legs(inputs, design):
        part = "ahead" if leg.clock == "rollout" and leg.name not in AFTER_SAMPLING else leg.clock
        by_clock[part] = by_clock.get(part, 0.0) + leg.seconds
    if not design.ahead:
        return sum(by_clock.values())
    sampling = by_clock.pop("ahead")
    training = sum(by_clock.pop(clock, 0.0) for clock in PASSES)
    return max(sampling, training) + sum(by_clock.values())


def limit_seconds(inputs: Inputs) -> float:
    """Return the seconds below which no design comes: servers and trainer busy without a pause."""
    generation = inputs.job.sampled_tokens / (
        inputs.job.servers * _rate(inputs, "server_tokens_per_s")
    )
    return max(generation, sum(leg.seconds for leg in _passes(inputs)))


PASSES = ("old_log-probs", "live_log-probs", "reference_log-probs", "update")
AFTER_SAMPLING = ("routes to the nodes", "verification")
CLIENT_RATES = (
    *("client_request_us", "client_token_us", "client_gb_per_s"),
    *("reward_ms", "parts_gb_per_s", "token_bytes"),
)


def client_seconds(inputs: Inputs, hosts: int = 1) -> float:
    """Return the client's processor seconds of a step, on the busiest of so many hosts."""
    job, model = inputs.job, inputs.model
    payload = job.tokens * model.route_bytes(job.capture) * BASE64
    seconds = job.samples * _rate(inputs, "client_request_us") * MICRO
    seconds += job.sampled_tokens * _rate(inputs, "client_token_us") * MICRO
    seconds += payload / (_rate(inputs, "client_gb_per_s") * GIGA)
    seconds += job.samples * _rate(inputs, "reward_ms") * MILLI
    seconds += _kept_bytes(inputs) / (_rate(inputs, "parts_gb_per_s") * GIGA)
    if job.stores_answers:
        seconds += payload / (_rate(inputs, "store_gb_per_s") * GIGA)
    return seconds / hosts


def wire_bytes(inputs: Inputs) -> float:
    """Return the bytes of a step's answers as JSON: routes in base64, ids and log-probs."""
    job = inputs.job
    payload = job.tokens * inputs.model.route_bytes(job.capture) * BASE64
    return payload + job.sampled_tokens * _rate(inputs, "json_token_bytes")


def _rate(inputs: Inputs, name: str) -> float:
    value: float = getattr(inputs.rates, name).value
    return value


def _sampling(inputs: Inputs, design: Design) -> Iterator[Leg]:
    """Generation, and what the client needs beyond it."""
    job, hosts = inputs.job, inputs.job.servers if design.is_beside_servers else 1
    together = job.sampled_tokens / (job.servers * _rate(inputs, "server_tokens_per_s"))
    alone = _longest_response_s(inputs) / max(1, design.ahead)
    generation = max(together, alone)
    yield Leg(
        name="generation",
        clock="rollout",
        seconds=generation,
        bound="servers' tokens per second" if together >= alone else "the longest response",
        rates=("server_tokens_per_s", "response_token_ms"),
    )
    processor_s = client_seconds(inputs, hosts)
    stores = ("store_gb_per_s",) if job.stores_answers else ()
    # A group's routes are held until its last response ends: at most those of the whole step.
    per_token = inputs.model.route_bytes(job.capture) + _rate(inputs, "token_bytes")
    yield Leg(
        name="client beyond generation",
        clock="rollout",
        seconds=max(0.0, processor_s - generation),
        bound="one processor core: decoding holds the interpreter",
        rates=(*CLIENT_RATES, *stores),
        network_bytes=wire_bytes(inputs) / hosts,
        processor_s=processor_s,
        host_bytes=job.tokens * per_token / hosts,
    )


def _longest_response_s(inputs: Inputs) -> float:
    return inputs.job.longest_response_tokens * _rate(inputs, "response_token_ms") * MILLI


def _files(inputs: Inputs, design: Design) -> Iterator[Leg]:
    """The step's batch and routes, from the client to the ranks that train them."""
    job, nodes = inputs.job, inputs.job.trainer_nodes
    batch = job.tokens * _rate(inputs, "batch_token_us") * MICRO
    yield _core_leg("batch", batch, "batch_token_us")
    kept = _kept_bytes(inputs)
    share = kept / nodes
    if nodes > 1:
        # Rank 0's node has its own share.
        sent = share if design.is_beside_servers else kept - share
        who = "a trainer node" if design.is_beside_servers else "rank 0's node"
        yield Leg(
            name="routes to the nodes",
            clock="rollout",
            seconds=sent / (_rate(inputs, "network_gb_per_s") * GIGA),
            bound=f"network of {who}",
            rates=("network_gb_per_s",),
            network_bytes=sent,
        )
    verify = share / (_rate(inputs, "verify_gb_per_s") * GIGA)
    yield Leg(
        name="verification",
        clock="rollout",
        seconds=verify,
        bound="one processor core of each node",
        rates=("verify_gb_per_s",),
        processor_s=verify,
        host_bytes=share,
    )


def _kept_bytes(inputs: Inputs) -> float:
    """Routes of a step as they are written: gates of a sample are left out."""
    capture = "ids" if inputs.job.capture == "gates" else inputs.job.capture
    return inputs.job.tokens * inputs.model.route_bytes(capture)


def _core_leg(name: str, seconds: float, rate: str) -> Leg:
    return Leg(
        name=name,
        clock="rollout",
        seconds=seconds,
        bound="one processor core of rank 0",
        rates=(rate,),
        processor_s=seconds,
    )


def _passes(inputs: Inputs) -> Iterator[Leg]:
    job = inputs.job
    length = job.prompt_tokens + job.response_tokens
    if not job.is_packed:
        length = job.prompt_tokens + job.longest_response_tokens
    flops = job.samples * length * inputs.model.forward_flops(length)
    forward = flops / (job.trainer_gpus * _rate(inputs, "trainer_tflops") * TERA)
    counts = {
        "old_log-probs": 1.0,
        "live_log-probs": 2 / job.live_every if job.live_every else 0.0,
        "reference_log-probs": float(job.has_reference),
        "update": float(FORWARDS_PER_UPDATE[job.recompute]),
    }
    for clock, count in counts.items():
        if count:
            yield Leg(
                name=clock.replace("_", " "),
                clock=clock,
                seconds=count * forward,
                bound="trainer's FLOP/s" + ("" if job.is_packed else ", most of it padding"),
                rates=("trainer_tflops",),
            )


def _weights(inputs: Inputs, design: Design) -> Leg:
    job, size = inputs.job, inputs.model.parameters * inputs.job.weight_bytes
    if design.has_buckets:
        return Leg(
            name="weights",
            clock="weights",
            seconds=size / (_rate(inputs, "bucket_gb_per_s") * GIGA),
            bound="network of a pipeline stage's source",
            rates=("bucket_gb_per_s",),
            network_bytes=size,
        )
    together = size * job.servers / _rate(inputs, "disk_total_gb_per_s")
    reading = max(size / _rate(inputs, "disk_read_gb_per_s"), together) / GIGA
    return Leg(
        name="weights",
        clock="weights",
        seconds=_writing_s(inputs) + reading,
        bound="the trainer's nodes writing, then the servers' reading",
        rates=("disk_write_gb_per_s", "disk_read_gb_per_s", "disk_total_gb_per_s"),
        network_bytes=size / job.trainer_nodes,
    )


def _writing_s(inputs: Inputs) -> float:
    """Seconds of a Hugging Face folder, of which each node of the trainer writes a share."""
    size = inputs.model.parameters * inputs.job.weight_bytes / GIGA
    per_node = size / inputs.job.trainer_nodes / _rate(inputs, "disk_write_gb_per_s")
    return max(per_node, size / _rate(inputs, "disk_total_gb_per_s"))


def _checkpoint(inputs: Inputs) -> Iterator[Leg]:
    """A checkpoint's share of a step: weights, then optimizer states by every rank."""
    job = inputs.job
    if not job.checkpoint_every:
        return
    states = inputs.model.parameters * OPTIMIZER_BYTES / GIGA
    per_node = states / job.trainer_nodes / _rate(inputs, "disk_write_gb_per_s")
    parallel = max(per_node, states / _rate(inputs, "disk_total_gb_per_s"))
    yield Leg(
        name=f"checkpoint, 1 in {job.checkpoint_every} steps",
        clock="checkpoint",
        seconds=(_writing_s(inputs) + parallel) / job.checkpoint_every,
        bound="the disk",
        rates=("disk_write_gb_per_s", "disk_total_gb_per_s"),
    )
