"""SGLang's routed-experts capturer, with gates and with knowledge of what wrote each row."""

from __future__ import annotations

import contextlib
import logging

import numpy as np
import torch
from sglang.srt.layers.moe import get_moe_runner_backend
from sglang.srt.state_capturer.base import TopkCaptureOutput
from sglang.srt.state_capturer.routed_experts import RoutedExpertsCapturer

from ..routes import Origin
from . import versions
from .capture import Stamps, gate_probs, pack, parse_version, score_function
from .logits import LogitSampler, SampledLogits
from .refusals import refuse_unsupported
from .settings import CaptureSettings

logger = logging.getLogger(__name__)


class CaptureOutput(TopkCaptureOutput):
    """One step's rows on their way to the host, with what is known of the step.

    Args:
        stock: SGLang's own output: slots, packed rows and the host buffer.
        capturer: Whose stamps are set when the rows arrive.
        forward_batch: The step, at its launch.
    """

    def __init__(self, stock: TopkCaptureOutput, capturer: Capturer, forward_batch):
        super().__init__(stock.out_cache_loc, stock.topk, stock.host_cache)
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
            self.logit_rows_N, self.logits_NLE = capturer.sampler.sample(len(stock.topk))

    def map_device_tensors(self, copy):
        """SGLang >= 0.5.15 passes the function that copies to the host."""
        super().map_device_tensors(copy)
        if self.logits_NLE is not None:
            self.logits_NLE = copy(self.logits_NLE)

    def copy_to_cpu(self):
        """SGLang <= 0.5.14 copies so."""
        super().copy_to_cpu()
        if self.logits_NLE is not None:
            self.logits_NLE = self.logits_NLE.to("cpu", non_blocking=True)

    def copy_now(self):
        """Without overlap nobody else copies."""
        self.out_cache_loc, self.topk = self.out_cache_loc.cpu(), self.topk.cpu()
        if self.logits_NLE is not None:
            self.logits_NLE = self.logits_NLE.cpu()

    def finalize(self):
        """Put rows, stamps and logits at their slots. Called once the copies are done."""
        super().finalize()
        slots_T = self.out_cache_loc.numpy()
        self.capturer.stamps.stamp_N[slots_T] = self.stamp_T()
        if self.logits_NLE is not None:
            self.capturer.sampler.keep(slots_T, self.logit_rows_N, self.logits_NLE.numpy())

    def stamp_T(self) -> np.ndarray:
        """The stamp of each row."""
        stamps = self.capturer.stamps
        stamp_T = np.full(len(self.topk), stamps.stamp(self.origin, self.weight_version), np.int32)
        if self.num_decode_rows:
            stamp_T[-self.num_decode_rows :] = stamps.stamp(Origin.DECODE, self.weight_version)
        return stamp_T

    def logits(self) -> SampledLogits | None:
        """The sampled logits of the step's rows."""
        if self.logits_NLE is None:
            return None
        return SampledLogits(rows_N=self.logit_rows_N, values_NLE=self.logits_NLE.numpy())


class Capturer(RoutedExpertsCapturer):
    """Takes the place of SGLang's class through the plugin framework; one per process.

    Raises:
        ServerError: A feature under which rows could be wrong, or a hook that is missing.
    """

    def __init__(self, *arguments, **named):
        from .plugin import targets

        self.settings = CaptureSettings.from_environment()
        server_args = versions.server_args()
        refuse_unsupported(server_args, get_moe_runner_backend().value, self.settings)
        versions.check_hooks(targets())
        super().__init__(*arguments, **named)
        self.weight_version = parse_version(getattr(server_args, "weight_version", None))
        self.stamps = Stamps(self.host_cache.num_tokens)
        # Learnt from the routers that report: dense and hash-routed layers never do.
        self.layers: set[int] = set()
        config = named.get("model_config", arguments[0] if arguments else None).hf_text_config
        self.num_experts = num_experts_of(config)
        self.sampler = self._sampler() if self.settings.has_logits else None
        self._router = None
        self._report_memory()

    @contextlib.contextmanager
    def routing(self, router_logits_TE: torch.Tensor, topk_config):
        """Within it, `capture` knows the logits that the ids were chosen from."""
        self._router = (router_logits_TE, topk_config)
        try:
            yield
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

    def _sampler(self) -> LogitSampler:
        buffer = self.device_cache.buffer
        return LogitSampler(
            (buffer.shape[0], self.num_layers, self.num_experts),
            self.host_cache.num_tokens,
            self.settings.logit_fraction,
            buffer.device,
        )

    def _report_memory(self):
        host = self.host_cache.get_buffer_size_bytes() + self.stamps.stamp_N.nbytes
        device = self.device_cache.get_buffer_size_bytes()
        if self.sampler is not None:
            host, device = host + self.sampler.host_bytes, device + self.sampler.device_bytes
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
