"""SGLang's routed-experts capturer, with gates and with knowledge of what wrote each row."""

from __future__ import annotations

import logging

import numpy as np
import torch
from sglang.srt.layers.moe import get_moe_runner_backend
from sglang.srt.state_capturer.base import TopkCaptureOutput
from sglang.srt.state_capturer.routed_experts import RoutedExpertsCapturer

from ..capture import CaptureSettings
from ..routes.routes import Origin
from . import versions
from .gates import gate_probs, pack, parse_version, score_function, unpack
from .logits import LogitSampler, SampledLogits
from .refusals import refuse_unsupported
from .slots import KeptRows, SlotRows

logger = logging.getLogger(__name__)


class CaptureOutput(TopkCaptureOutput):
    """One step's rows on their way to the host, with what is known of the step.

    Args:
        stock: SGLang's own output: slots, and rows as they stand in the device's buffer.
        capturer: Whose slots are set when the rows arrive.
        forward_batch: The step, at its launch.
    """

    def __init__(self, stock: TopkCaptureOutput, capturer: Capturer, forward_batch):
        ids_TLK, self.gates_TLK = stock.topk, None
        if capturer.settings.has_gates:
            ids_TLK, gates_TLK = unpack(stock.topk)
            self.gates_TLK = gates_TLK.contiguous()
        # Compact before the copy to the host; 16-bit ids are below 2^15, so signed ones will do.
        is_small = capturer.slots.ids_NLK.itemsize == 1
        ids_TLK = ids_TLK.to(torch.uint8 if is_small else torch.int16)
        super().__init__(stock.out_cache_loc, ids_TLK, stock.host_cache)
        self.capturer = capturer
        is_decode = forward_batch.forward_mode.is_decode()
        self.origin = Origin.DECODE if is_decode else Origin.PREFILL
        self.weight_version = capturer.weight_version
        # First position and number of rows of each request of a prefill; padding may follow.
        starts, counts = forward_batch.extend_prefix_lens_cpu, forward_batch.extend_seq_lens_cpu
        self.extents = list(zip(starts or (), counts or (), strict=True))
        # A mixed batch ends with one row for each of its decoding requests.
        self.num_decode_rows = 0
        self.logit_rows_N, self.logits_NLE = None, None
        if capturer.sampler is not None:
            self.logit_rows_N, self.logits_NLE = capturer.sampler.sample(len(ids_TLK))

    def map_device_tensors(self, copy):
        """SGLang >= 0.5.15 passes the function that copies to the host."""
        super().map_device_tensors(copy)
        self._copy_ours(copy)

    def copy_to_cpu(self):
        """SGLang <= 0.5.14 copies so."""
        super().copy_to_cpu()
        self._copy_ours(lambda tensor: tensor.to("cpu", non_blocking=True))

    def copy_now(self):
        """Without overlap nobody else copies."""
        self.out_cache_loc, self.topk = self.out_cache_loc.cpu(), self.topk.cpu()
        self._copy_ours(torch.Tensor.cpu)

    def _copy_ours(self, copy):
        if self.gates_TLK is not None:
            self.gates_TLK = copy(self.gates_TLK)
        if self.logits_NLE is not None:
            self.logits_NLE = copy(self.logits_NLE)

    def finalize(self):
        """Put the rows at their slots. Called once the copies are done."""
        self.capturer.slots.put(self.out_cache_loc.numpy(), self.rows())

    def rows(self) -> KeptRows:
        """The step's rows; its requests' one after another, from 0."""
        stamps, num_rows = self.capturer.slots.stamps, len(self.topk)
        stamp_T = np.full(num_rows, stamps.stamp(self.origin, self.weight_version), np.int32)
        if self.num_decode_rows:
            stamp_T[-self.num_decode_rows :] = stamps.stamp(Origin.DECODE, self.weight_version)
        logits = None
        if self.logits_NLE is not None:
            logits = SampledLogits(rows_N=self.logit_rows_N, values_NLE=self.logits_NLE.numpy())
        return KeptRows(
            start=0,
            ids_TLK=self.topk.numpy().view(self.capturer.slots.ids_NLK.dtype),
            gates_TLK=None if self.gates_TLK is None else self.gates_TLK.numpy(),
            stamp_T=stamp_T,
            logits=logits,
        )


class Capturer(RoutedExpertsCapturer):
    """Takes the place of SGLang's class through the plugin framework; one per process.

    Raises:
        ServerError: A feature under which rows could be wrong, or a hook that is missing.
    """

    def __init__(self, model_config, *, num_tokens: int, **named):
        from .plugin import targets

        self.settings = CaptureSettings.from_environment()
        server_args = versions.server_args()
        refuse_unsupported(server_args, get_moe_runner_backend().value, self.settings)
        versions.check_hooks(targets())
        # SGLang's own host buffer is not used: it gets one slot.
        super().__init__(model_config, num_tokens=1, **named)
        self.weight_version = parse_version(getattr(server_args, "weight_version", None))
        # Learnt from the routers that report: dense and hash-routed layers never do.
        self.layers: set[int] = set()
        self.num_experts = num_experts_of(model_config.hf_text_config)
        self.sampler = self._sampler(num_tokens) if self.settings.has_logits else None
        shape = (num_tokens, self.num_layers, self.topk_size)
        self.slots = SlotRows(shape, self.num_experts, self.settings.has_gates, self.sampler)
        self._router = None
        self._report_memory()

    def route(self, stock, *arguments, **named):
        """SGLang's post-processing of a layer's choice; within it `capture` knows the logits."""
        # SGLang names its arguments here in every version; their order is not the same in all.
        self._router = (named["router_logits"], named["topk_config"])
        try:
            return stock(*arguments, **named)
        finally:
            self._router = None

    def capture(self, layer_id: int, topk_indices: torch.Tensor):
        """Write one layer's rows; runs inside CUDA graphs, so static shapes and no sync."""
        self.layers.add(layer_id)
        if self.settings.has_gates:
            topk_indices = self._with_gates(layer_id, topk_indices)
        super().capture(layer_id, topk_indices)

    def on_forward_end(
        self, forward_batch, can_run_graph, cuda_graph_batch, no_copy_to_cpu: bool = False
    ) -> CaptureOutput:
        """The step's rows; they reach the host with the other results, in order."""
        stock = super().on_forward_end(
            forward_batch, can_run_graph, cuda_graph_batch, no_copy_to_cpu=True
        )
        output = CaptureOutput(versions.with_own_rows(stock), self, forward_batch)
        if not no_copy_to_cpu:
            output.copy_now()
        return output

    def _with_gates(self, layer_id: int, ids_TX: torch.Tensor) -> torch.Tensor:
        ids_TK = ids_TX[:, : self.topk_size]
        gates_TK = None
        if self._router is not None:
            logits_TE, topk_config = self._router
            function = score_function(topk_config)
            if function is not None:
                gates_TK = gate_probs(logits_TE, ids_TK, function)
            if self.sampler is not None:
                self.sampler.write(layer_id, logits_TE)
        packed_TK = pack(ids_TK, gates_TK)
        num_shared = ids_TX.shape[1] - self.topk_size
        # Columns of fused shared experts never reach the host; they only keep the width.
        return torch.nn.functional.pad(packed_TK, (0, num_shared)) if num_shared else packed_TK

    def _sampler(self, num_slots: int) -> LogitSampler:
        buffer = self.device_cache.buffer
        return LogitSampler(
            (buffer.shape[0], self.num_layers, self.num_experts),
            num_slots,
            self.settings.logit_fraction,
            buffer.device,
        )

    def _report_memory(self):
        host, device = self.slots.host_bytes, self.device_cache.get_buffer_size_bytes()
        if self.sampler is not None:
            device += self.sampler.device_bytes
        logger.info(
            "routing_replay captures %s: %.1f MiB of device memory, %.1f MiB of host memory",
            self.settings.level,
            device / 2**20,
            host / 2**20,
        )


def num_experts_of(config) -> int:
    """Routed experts per layer; the families name them differently."""
    names = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts")
    return next(int(getattr(config, name)) for name in names if getattr(config, name, None))
