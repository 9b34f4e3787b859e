"""SGLang's routed-experts capturer, with gates and with knowledge of what wrote each row."""

from __future__ import annotations

import contextlib
import logging

import torch
from sglang.srt.state_capturer.base import TopkCaptureOutput
from sglang.srt.state_capturer.routed_experts import RoutedExpertsCapturer

from ..routes import Origin
from . import versions
from .capture import Stamps, gate_probs, pack, score_function
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
        self.weight_version = versions.weight_version()
        # First position and number of rows of each request of a prefill; padding may follow.
        starts, counts = forward_batch.extend_prefix_lens_cpu, forward_batch.extend_seq_lens_cpu
        self.extents = list(zip(starts or (), counts or (), strict=True))
        # A mixed batch ends with one row for each of its decoding requests.
        self.num_decode_rows = 0

    def finalize(self):
        """Put rows and stamps at their slots. Called once the copies are done."""
        super().finalize()
        self.capturer.stamps.stamp_N[self.out_cache_loc.numpy()] = self.stamp_T()

    def stamp_T(self):
        """The stamp of each row."""
        stamps = self.capturer.stamps
        stamp_T = torch.full((len(self.topk),), stamps.stamp(self.origin, self.weight_version))
        if self.num_decode_rows:
            stamp_T[-self.num_decode_rows :] = stamps.stamp(Origin.DECODE, self.weight_version)
        return stamp_T.int().numpy()


class Capturer(RoutedExpertsCapturer):
    """Takes the place of SGLang's class through the plugin framework; one per process."""

    def __init__(self, *arguments, **named):
        super().__init__(*arguments, **named)
        self.settings = CaptureSettings.from_environment()
        self.stamps = Stamps(self.host_cache.num_tokens)
        # Learnt from the routers that report: dense and hash-routed layers never do.
        self.layers: set[int] = set()
        self.num_experts = 0
        self._router = None
        versions.check_hooks()
        self._report_memory()

    @contextlib.contextmanager
    def routing(self, router_logits_TE: torch.Tensor, topk_config):
        """Within it, `capture` knows the logits that the ids were chosen from."""
        self.num_experts = router_logits_TE.shape[1]
        self._router = (router_logits_TE, topk_config)
        try:
            yield
        finally:
            self._router = None

    def capture(self, layer_id: int, topk_indices: torch.Tensor):
        """Write one layer's rows; runs inside CUDA graphs, so static shapes and no sync."""
        self.layers.add(layer_id)
        if self.settings.has_gates:
            topk_indices = self._with_gates(topk_indices)
        super().capture(layer_id, topk_indices)

    def on_forward_end(
        self, forward_batch, can_run_graph, cuda_graph_batch, no_copy_to_cpu: bool = False
    ) -> CaptureOutput:
        """The step's rows; they reach the host with the other results, in order."""
        stock = super().on_forward_end(
            forward_batch, can_run_graph, cuda_graph_batch, no_copy_to_cpu=True
        )
        output = CaptureOutput(stock, self, forward_batch)
        if not no_copy_to_cpu:
            output.out_cache_loc, output.topk = output.out_cache_loc.cpu(), output.topk.cpu()
        return output

    def _with_gates(self, ids_TX: torch.Tensor) -> torch.Tensor:
        ids_TK = ids_TX[:, : self.topk_size]
        gates_TK = None
        if self._router is not None:
            logits_TE, topk_config = self._router
            function = score_function(topk_config)
            if function is not None:
                gates_TK = gate_probs(logits_TE, ids_TK, function)
        packed_TK = pack(ids_TK, gates_TK)
        # Columns of fused shared experts never reach the host; they only keep the width.
        return torch.nn.functional.pad(packed_TK, (0, ids_TX.shape[1] - self.topk_size))

    def _report_memory(self):
        host = self.host_cache.get_buffer_size_bytes() + self.stamps.stamp_N.nbytes
        device = self.device_cache.get_buffer_size_bytes()
        logger.info(
            "routing_replay captures %s: %.1f MiB of device memory, %.1f MiB of host memory",
            self.settings.level,
            device / 2**20,
            host / 2**20,
        )
