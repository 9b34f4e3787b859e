"""The engine by which verl's workers train and score: its Megatron engine, with replay.

verl lays out the numbers of the table's rows beside the tokens: through its micro-batches as one
more nested field, and into the model's layout by its own `preprocess_*_engine`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import Any

import torch
from tensordict import TensorDict
from verl.models.mcore.util import preprocess_bshd_engine, preprocess_thd_engine
from verl.utils import tensordict_utils
from verl.utils.device import get_device_name, get_vendor
from verl.utils.megatron_utils import unwrap_model
from verl.workers.engine.base import EngineRegistry
from verl.workers.engine.megatron.transformer_impl import MegatronEngineWithLMHead

from ..errors import PreflightError
from ..metrics.sinks import scalars
from . import contracts
from .batch import StepBatch
from .job import Job
from .routes import of_nested
from .settings import AdapterSettings
from .verl_preflight import require_replayable

NUMBERS = "routing_replay_numbers"
ROUTES = "routed_experts"


def register() -> None:
    """Make verl choose this engine for language models on this machine's devices.

    Raises:
        PreflightError: Another plugin has taken the place.
    """
    device = os.environ.get("VERL_ENGINE_DEVICE") or get_device_name()
    vendor = os.environ.get("VERL_ENGINE_VENDOR") or get_vendor()
    entry = EngineRegistry.register("language_model", "megatron", device=device, vendor=vendor)
    try:
        entry(RoutingReplayEngine)
    except AssertionError as error:
        raise PreflightError(
            "verl has another engine for this device already",
            expected=f"no engine of a plugin for {device}, {vendor}",
            got=error,
            fix="Name the plugins to load in VERL_USE_EXTERNAL_PLUGINS",
        ) from error


class RoutingReplayEngine(MegatronEngineWithLMHead):
    """verl's Megatron engine of an actor, with replay; a reference stays stock."""

    _is_reference = False
    _job: Job

    def __init__(self, model_config: Any, engine_config: Any, *args: Any, **named: Any):
        """Refuse, before verl changes Megatron for its own replay.

        Raises:
            PreflightError: Another version of verl, or a setting under which replay would be wrong.
        """
        contracts.require("verl")
        if not engine_config.forward_only:
            require_replayable(engine_config, model_config)
        super().__init__(model_config, engine_config, *args, **named)

    def initialize(self) -> None:
        settings = AdapterSettings.from_environment()
        super().initialize()
        self._job = Job(settings, framework=f"verl {version('verl')}")

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Without LoRA's adapter the actor is the reference."""
        self._is_reference = True
        try:
            with super().disable_adapter():
                yield
        finally:
            self._is_reference = False

    def forward_backward_batch(
        self, data: TensorDict, loss_function: Callable[..., Any], forward_only: bool = False
    ) -> Any:
        if self._is_reference or self.engine_config.forward_only:
            return super().forward_backward_batch(data, loss_function, forward_only)
        routed = data.get(ROUTES, None)
        batch = StepBatch(
            of_nested(data["input_ids"]), None if routed is None else of_nested(routed)
        )
        # The micro-batches carry row numbers where they carried routes.
        data = data.exclude(ROUTES)
        data[NUMBERS] = torch.nested.as_nested_tensor(batch.numbers(), layout=torch.jagged)
        with self._job.actor_pass(self.module, batch, is_update=not forward_only):
            output = super().forward_backward_batch(data, loss_function, forward_only)
        if output and not forward_only:  # the last pipeline stage; verl chains lists
            values = scalars(self._job.metrics)
            output["metrics"] |= {name: [value] for name, value in values.items()}
        return output

    def forward_step(
        self, batch_iter: Iterator[TensorDict], model: Any, *args: Any, **named: Any
    ) -> Any:
        batch = next(batch_iter)
        if NUMBERS not in batch.keys():  # noqa: SIM118 (a TensorDict iterates over its samples)
            return super().forward_step(iter([batch]), model, *args, **named)
        with self._job.microbatch(self._lay_out(batch, unwrap_model(model))):
            return super().forward_step(iter([batch]), model, *args, **named)

    def _lay_out(self, batch: TensorDict, model: Any) -> torch.Tensor:
        """The numbers as verl's `gptmodel_forward_model_engine` lays out `input_ids`."""
        settings, config = self.engine_config, model.config
        layout = {"pre_process": True, "use_fp8_padding": config.fp8 in ("e4m3", "hybrid")}
        numbers: torch.Tensor
        if not settings.use_remove_padding:
            length = tensordict_utils.get_non_tensor_data(batch, "forced_max_seqlen", None)
            numbers = preprocess_bshd_engine(batch[NUMBERS], forced_max_seqlen=length, **layout)[0]
            return numbers
        # As verl's fused forward: a layout of DeepSeek-V4's attention has a least size.
        is_dsv4 = getattr(config, "experimental_attention_variant", None) == "dsv4_hybrid"
        is_padded_to_window = settings.use_fused_kernels and is_dsv4
        numbers = preprocess_thd_engine(
            batch[NUMBERS],
            min_local_rows=config.csa_window_size if is_padded_to_window else None,
            pad_to_length_bucket=settings.pad_to_length_bucket if settings.pad_to_length else None,
            cp_layout=self._get_context_parallel_layout(model),
            **layout,
        )[0]
        return numbers
