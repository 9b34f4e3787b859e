"""SGLang's routed-experts capturer, with gates or combine weights, origin and weight version."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from sglang.srt.layers.moe import get_moe_runner_backend
from sglang.srt.state_capturer.base import TopkCaptureOutput
from sglang.srt.state_capturer.routed_experts import RoutedExpertsCapturer

from .. import kernels
from ..capture import CaptureSettings
from ..errors import ServerError
from ..routes.origin import Origin
from ..routes.routes import RouterLogits
from . import versions
from .gates import gate_probs, pack, parse_version, score_function, unpack
from .host_cache import HostRows
from .logits import LogitSampler
from .plugin import hook_features
from .refusals import refuse_unsupported
from .routers import check_routers
from .slots import KeptRows, SlotRows
from .weights import CombineWeights, RouterArguments

logger = logging.getLogger(__name__)
OUTSIDE_CACHES = (
    *("enable_hierarchical_cache", "enable_lmcache", "enable_flexkv"),
    "enable_unified_cache_external_linker",
)
CHAIN_ALGORITHMS = ("EAGLE", "EAGLE3", "NEXTN", "STANDALONE")


class CaptureOutput(TopkCaptureOutput):
    """One step's rows on their way to the host, with the step's origin and weight version.

    Args:
        stock: SGLang's own output: slots, and rows as they stand in the device's buffer.
        capturer: Whose slots are set when the rows arrive.
        forward_batch: The step, at its launch.
    """

    def __init__(self, stock: TopkCaptureOutput, capturer: Capturer, forward_batch: Any):
        ids_TLK, self.values = stock.topk, capturer.step_values(len(stock.topk))
        if capturer.settings.has_gates:
            ids_TLK, gates_TLK = unpack(stock.topk)
            self.values["gates"] = gates_TLK.contiguous()
        # Compact before the copy to the host; 16-bit ids are below 2^15, so signed ones will do.
        is_small = capturer.slots.ids_NLK.itemsize == 1
        ids_TLK = ids_TLK.to(torch.uint8 if is_small else torch.int16)
        super().__init__(stock.out_cache_loc, ids_TLK, stock.host_cache)
        self.capturer = capturer
        self.origin = capturer.origin_of(forward_batch.forward_mode)
        self.is_verify = forward_batch.forward_mode.is_target_verify()
        self.weight_version = capturer.weight_version
        # First position and number of rows of each request of a prefill; padding may follow.
        starts, counts = forward_batch.extend_prefix_lens_cpu, forward_batch.extend_seq_lens_cpu
        self.extents = list(zip(starts or (), counts or (), strict=True))
        # A mixed batch ends with one row for each of its decoding requests.
        self.num_decode_rows = 0
        self.logit_rows_N: np.ndarray | None = None
        self.logits_NLE: torch.Tensor | None = None
        if capturer.sampler is not None:
            # Rows of drafts still change places.
            num_rows = 0 if self.is_verify else len(ids_TLK)
            self.logit_rows_N, self.logits_NLE = capturer.sampler.sample(num_rows)

    def map_device_tensors(self, copy: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Copy to the host with the function that SGLang >= 0.5.15 passes."""
        super().map_device_tensors(copy)
        self._copy_ours(copy)

    def copy_to_cpu(self) -> None:
        """Copy to the host as SGLang <= 0.5.14 does."""
        super().copy_to_cpu()
        self._copy_ours(lambda tensor: tensor.to("cpu", non_blocking=True))

    def copy_now(self) -> None:
        """Copy everything at once: without overlap SGLang does not."""
        self.out_cache_loc: torch.Tensor = self.out_cache_loc.cpu()
        self.topk: torch.Tensor = self.topk.cpu()
        self._copy_ours(torch.Tensor.cpu)

    def _copy_ours(self, copy: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.values = {name: copy(values_TLK) for name, values_TLK in self.values.items()}
        if self.logits_NLE is not None:
            self.logits_NLE = copy(self.logits_NLE)

    def accept(self, accepted_SD: torch.Tensor) -> None:
        """Put the rows of accepted drafts where SGLang moves their keys and values.

        It moves those of a request's path through its tree of drafts to the front of its slots.

        Args:
            accepted_SD: For each request the rows of its path, then -1; on the device.
        """
        accepted_SD = accepted_SD.to(self.topk.device)  # without overlap the rows are on the host
        index_SD = torch.arange(len(self.topk), device=self.topk.device)
        index_SD = index_SD.view(len(accepted_SD), -1)
        front_SD = index_SD[:, : accepted_SD.shape[1]]
        front_SD.copy_(torch.where(accepted_SD >= 0, accepted_SD, front_SD))
        index_T = index_SD.flatten()
        self.topk = self.topk[index_T]
        self.values = {name: values_TLK[index_T] for name, values_TLK in self.values.items()}
        self.origin = Origin.DECODE

    def finalize(self) -> None:
        """Put the rows at their slots. Called once the copies are done."""
        slots_T = self.out_cache_loc.numpy()
        self.capturer.slots.put(slots_T, self.rows())
        self.capturer.slots.settle(slots_T)
        if self.capturer.host_rows is not None:
            self.capturer.host_rows.settle()

    def rows(self) -> KeptRows:
        """Return the step's rows from 0 on, one request after another."""
        stamps, num_rows = self.capturer.slots.stamps, len(self.topk)
        stamp_T = np.full(num_rows, stamps.stamp(self.origin, self.weight_version), np.int32)
        if self.num_decode_rows:
            stamp_T[-self.num_decode_rows :] = stamps.stamp(Origin.DECODE, self.weight_version)
        logits = None
        if self.logits_NLE is not None and self.logit_rows_N is not None:
            logits = RouterLogits(rows_N=self.logit_rows_N, values_NLE=self.logits_NLE.numpy())
        return KeptRows(
            start=0,
            ids_TLK=self.topk.numpy().view(self.capturer.slots.ids_NLK.dtype),
            values={name: values_TLK.numpy() for name, values_TLK in self.values.items()},
            stamp_T=stamp_T,
            logits=logits,
        )


class Capturer(RoutedExpertsCapturer):
    """Replaces SGLang's class through the plugin framework; one per process.

    Raises:
        ServerError: A feature under which rows could be wrong, or a hook that is missing.
    """

    def __init__(self, model_config: Any, *, num_tokens: int, **named: Any):
        self.settings = CaptureSettings.from_environment()
        server_args = versions.server_args()
        refuse_unsupported(server_args, get_moe_runner_backend().value, self.settings)
        targets = versions.targets_of(versions.installed())
        of_features = targets.of_features(server_args)
        hook_features(targets, of_features)
        versions.check_hooks([*targets.required(self.settings.hooks_routers), *of_features])
        self.num_experts = num_experts_of(model_config.hf_text_config)
        # SGLang's own host buffer is not used: it gets one slot.
        # SGLang's buffer has room for a chunk, or for so many requests.
        named["max_running_requests"] = largest_step(
            server_args, model_config.context_len, num_tokens, named["max_running_requests"]
        )
        super().__init__(model_config, num_tokens=1, **named)
        self.weight_version = parse_version(getattr(server_args, "weight_version", None))
        # Filled by the routers that report: dense and hash-routed layers never do.
        self.layers: set[int] = set()
        self.sampler = self._sampler(num_tokens) if self.settings.has_logits else None
        shape = (num_tokens, self.num_layers, self.topk_size)
        self.weights = None
        if self.settings.has_weights:
            self.weights = CombineWeights(self.device_cache.buffer, self.topk_size)
        captured = ["gates"] * self.settings.has_gates + ["weights"] * self.settings.has_weights
        self.slots = SlotRows(
            shape, self.num_experts, captured, self.sampler, has_outside_cache(server_args)
        )
        if self.settings.has_kernel:
            kernels.require_device(self.device_cache.buffer.device)
        # Why a shared slot may hold the row of another prefix.
        is_half = versions.is_disaggregated(server_args)
        self.cause_of_others = Origin.TRANSFERRED if is_half else Origin.EVICTED
        self.architecture = ", ".join(model_config.hf_config.architectures or ())
        self._router: RouterArguments | None = None
        self.host_rows: HostRows | None = None
        # Pipeline stages join their rows: of the stages before this one, of the pass at hand.
        self.is_pipelined = getattr(server_args, "pp_size", 1) > 1
        self.incoming: dict[str, torch.Tensor] = {}
        # Of the last forward pass: a speculative worker may lose it, or move its rows.
        self.last_output: CaptureOutput | None = None
        self._report_memory()

    @staticmethod
    def create(**named: Any) -> RoutedExpertsCapturer | None:
        """Return the capturer of this process, if routes are wanted, after a look at the model.

        Raises:
            ServerError: As `check_routers`, and as the constructor.
        """
        # By the class: SGLang has put this one behind the stock class's name in every module.
        capturer = super(Capturer, Capturer).create(**named)
        # SGLang 0.5.23 passes the model; of the older versions some do not.
        if capturer is not None and "model" in named:
            check_routers(named["model"], capturer.settings, capturer.architecture)
        return capturer

    def route(self, stock: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        """Run SGLang's post-processing of a selection; `capture` within it knows the router."""
        self._router = RouterArguments(
            logits_TE=argument_of(stock, "router_logits", arguments, named),
            weights_TX=argument_of(stock, "topk_weights", arguments, named),
            topk_config=argument_of(stock, "topk_config", arguments, named),
        )
        try:
            return stock(*arguments, **named)
        finally:
            self._router = None

    def capture(self, layer_id: int, topk_indices: torch.Tensor) -> None:
        """Write one layer's rows; runs inside CUDA graphs, so static shapes and no sync."""
        self.layers.add(layer_id)
        if self.weights is not None:
            self.weights.write(layer_id, len(topk_indices), self._router)
        if not self.settings.has_gates:
            super().capture(layer_id, topk_indices)
            return
        ids_TK = topk_indices[:, : self.topk_size]
        logits_TE, function = self._scores(len(ids_TK))
        if self.sampler is not None:
            self.sampler.write(layer_id, len(ids_TK), logits_TE)
        # Under DeepEP SGLang gathers the rows of other ranks before it writes them.
        is_local = not hasattr(self, "gather_buffer")
        if self.settings.has_kernel and is_local and logits_TE is not None and function is not None:
            slots_TK = self.device_cache.buffer[: len(ids_TK), layer_id, : self.topk_size]
            _capture_gates(logits_TE, ids_TK, function, slots_TK)
            return
        gates_TK = None
        if logits_TE is not None and function is not None:
            gates_TK = gate_probs(logits_TE, ids_TK, function)
        packed_TX = pack(ids_TK, gates_TK)
        num_shared = topk_indices.shape[1] - self.topk_size
        # Columns of fused shared experts never reach the host; they only keep the width.
        if num_shared:
            packed_TX = torch.nn.functional.pad(packed_TX, (0, num_shared))
        super().capture(layer_id, packed_TX)

    def on_forward_end(
        self,
        forward_batch: Any,
        can_run_graph: bool,
        cuda_graph_batch: int | None,
        no_copy_to_cpu: bool = False,
    ) -> CaptureOutput:
        """Return the step's rows; they reach the host with the other results, in order.

        Raises:
            ServerError: No router of the model reports its selections.
        """
        # A stage may have dense layers only.
        if not (self.layers or self.is_pipelined) and len(forward_batch.out_cache_loc):
            raise no_router_reports(self.architecture)
        stock = super().on_forward_end(
            forward_batch, can_run_graph, cuda_graph_batch, no_copy_to_cpu=True
        )
        output = CaptureOutput(versions.with_own_rows(stock), self, forward_batch)
        self.last_output = output
        if not (no_copy_to_cpu or self.is_pipelined):
            output.copy_now()
        return output

    def origin_of(self, forward_mode: Any) -> Origin:
        """Return the origin of a forward pass's rows.

        A verified chain of drafts is accepted from its front, where its rows already are. The rows
        of a tree, or of an algorithm that is not known here, are nobody's until they are accepted.
        """
        if forward_mode.is_target_verify():
            return Origin.DECODE if is_chain(versions.server_args()) else Origin.SPECULATIVE
        return Origin.DECODE if forward_mode.is_decode() else Origin.PREFILL

    def step_values(self, num_tokens: int) -> dict[str, torch.Tensor]:
        """Return what a step captured beside SGLang's own buffer, on the device."""
        if self.weights is None:
            return {}
        # A copy: the next step may overwrite the buffer before this one is on the host.
        return {"weights": self.weights.step_TLK[:num_tokens].clone()}

    def save_to_host(self, num_slots: int, device: torch.Tensor, host: torch.Tensor) -> None:
        """Let rows follow keys and values to a cache on the host.

        Args:
            num_slots: Slots of that cache.
            device, host: Slots of the copy, in the same order.
        """
        if self.host_rows is None:
            self.host_rows = HostRows(self.slots, num_slots)
            logger.info(
                "routing_replay: %.1f MiB of rows for the cache on the host",
                self.host_rows.host.host_bytes / 2**20,
            )
        self.host_rows.save(device.cpu().numpy(), host.cpu().numpy())

    def load_from_host(self, host: torch.Tensor, device: torch.Tensor) -> None:
        """Let rows follow keys and values back; rows that never went there stay unknown."""
        if self.host_rows is not None:
            self.host_rows.load(host.cpu().numpy(), device.cpu().numpy())

    def _scores(self, num_tokens: int) -> tuple[torch.Tensor | None, str | None]:
        """Return the logits of the selection at hand, and how the router scores them."""
        if self._router is None:
            return None, None
        logits_TE, topk_config = self._router.logits_TE, self._router.topk_config
        # A kernel that scores and selects at once has no logits: SGLang passes none, [0, E].
        if len(logits_TE) != num_tokens:
            return None, None
        return logits_TE, score_function(topk_config)

    def _sampler(self, num_slots: int) -> LogitSampler:
        buffer = self.device_cache.buffer
        return LogitSampler(
            (buffer.shape[0], self.num_layers, self.num_experts),
            num_slots,
            self.settings.logit_fraction,
            buffer.device,
        )

    def _report_memory(self) -> None:
        host, device = self.slots.host_bytes, self.device_cache.get_buffer_size_bytes()
        if self.sampler is not None:
            device += self.sampler.device_bytes
        if self.weights is not None:
            device += self.weights.device_bytes
        logger.info(
            "routing_replay captures %s: %.1f MiB of device memory, %.1f MiB of host memory",
            self.settings.level,
            device / 2**20,
            host / 2**20,
        )


def has_outside_cache(server_args: Any) -> bool:
    """Return whether slots are filled without a forward pass of this server."""
    has_cache = any(getattr(server_args, name, False) for name in OUTSIDE_CACHES)
    return has_cache or versions.is_disaggregated(server_args)


def is_chain(server_args: Any) -> bool:
    """Return whether drafts are chains, whose accepted tokens stay in their slots."""
    is_eagle = server_args.speculative_algorithm in CHAIN_ALGORITHMS
    return is_eagle and server_args.speculative_eagle_topk == 1


def largest_step(server_args: Any, context: int, num_slots: int, max_running_requests: int) -> int:
    """Return the most tokens of a forward pass, as far as SGLang's own buffer does not count them.

    Args:
        server_args: SGLang's arguments.
        context: Longest sequence of the model.
        num_slots: KV slots: a token of a pass has one of its own.
        max_running_requests: Requests that decode at a time; each verifies all its drafts.
    """
    num_drafts = getattr(server_args, "speculative_num_draft_tokens", None) or 1
    largest = max_running_requests * num_drafts
    if (server_args.chunked_prefill_size or 0) <= 0:
        # Requests fill `max_prefill_tokens`; a single one may be as long as the context.
        largest = max(largest, min(num_slots, max(server_args.max_prefill_tokens, context)))
    return int(largest)


def _capture_gates(
    logits_TE: torch.Tensor, ids_TK: torch.Tensor, function: str, slots_TK: torch.Tensor
) -> None:
    from ..kernels.gates import capture_gates  # loads Triton

    capture_gates(logits_TE, ids_TK, function, slots_TK)


def argument_of(
    function: Callable[..., Any], name: str, arguments: tuple[Any, ...], named: dict[str, Any]
) -> Any:
    """Return an argument of a call, whether it was passed by name or by position."""
    return named[name] if name in named else arguments[_parameters(function).index(name)]


@functools.cache
def _parameters(function: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(function).parameters)


def num_experts_of(config: Any) -> int:
    """Return the routed experts per layer; the families name them differently.

    Raises:
        ServerError: The configuration names no number of experts.
    """
    names = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts")
    for name in names:
        if getattr(config, name, None):
            return int(getattr(config, name))
    raise ServerError(
        "the model's configuration names no number of experts",
        expected=" or ".join(names),
        got=type(config).__name__,
        fix="Start a dense model without --enable-return-routed-experts",
    )


def no_router_reports(architecture: str) -> ServerError:
    """Return the error of a model whose routers never call the capture."""
    return ServerError(
        "no router of this model reports its experts",
        expected="a model of SGLang's own whose MoE layers select with its TopK module",
        got=architecture,
        fix="SGLang serves it through its transformers backend, or selects inside a kernel. Use "
        "--model-impl sglang if SGLang has the model; otherwise its routes cannot be captured",
    )
