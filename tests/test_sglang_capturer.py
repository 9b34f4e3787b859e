"""The capturer inside SGLang's own router functions, without a server."""

import os
import subprocess
import sys
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from recipes.serving import cpu
from routing_replay.capture import CaptureSettings
from routing_replay.errors import ServerError
from routing_replay.routes.origin import Origin
from routing_replay.sglang.gates import unpack
from routing_replay.sglang.logits import LogitSampler
from routing_replay.sglang.slots import SlotRows
from routing_replay.sglang.weights import CombineWeights

pytestmark = [
    # Both workers of `make test` collect this file; the one that runs it imports SGLang.
    pytest.mark.skipif(not find_spec("sglang"), reason="SGLang is not installed"),
    # SGLang and what it imports warn of their own code.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning"),
]
# Triton decides at its import whether it interprets: the kernel has a process of its own.
HAS_KERNEL = os.environ.get("TRITON_INTERPRET") == "1"
NUM_LAYERS, NUM_EXPERTS, TOP_K = 2, 4, 2
IDS_TK = torch.tensor([[1, 2], [0, 3], [3, 2]], dtype=torch.int32)
LOGITS_TE = torch.tensor([[0.0, 2.0, 1.0, 0.0], [3.0, 0.0, 0.0, 1.0], [0.0, 0.0, 1.0, 1.0]])


@pytest.fixture(scope="module", autouse=True)
def kernels():
    """SGLang's modules import their CUDA kernels by name."""
    with pytest.MonkeyPatch.context() as patch:
        if not torch.cuda.is_available():
            patch.syspath_prepend(cpu.STUBS)
        yield


@pytest.fixture
def capturer():
    """A capturer with SGLang's own device buffer; what a server's start would add is left out."""
    from sglang.srt.state_capturer.base import BaseDeviceCache
    from sglang.srt.state_capturer.routed_experts import set_global_experts_capturer

    from routing_replay.sglang.capturer import Capturer

    capturer = Capturer.__new__(Capturer)
    capturer.settings = CaptureSettings(level="logits", has_kernel=HAS_KERNEL)
    capturer.layers, capturer.architecture = set(), "TinyForCausalLM"
    capturer.num_fused_shared_experts, capturer.topk_size = 0, TOP_K
    capturer.device_cache = BaseDeviceCache(8, NUM_LAYERS, TOP_K, "cpu", "test")
    capturer.sampler = LogitSampler((8, NUM_LAYERS, NUM_EXPERTS), 16, 1.0, "cpu")
    capturer._router, capturer.weights, capturer.is_pipelined = None, None, False
    set_global_experts_capturer(capturer)
    yield capturer
    set_global_experts_capturer(None)


def route(capturer, *arguments, **named):
    """A layer's selection through our hook and SGLang's own post-processing."""
    from sglang.srt.layers.moe.topk import TopKConfig, _post_process_topk_ids

    weights_TK, config = torch.ones(IDS_TK.shape), TopKConfig(top_k=TOP_K)
    if named:
        named |= {"topk_ids": IDS_TK.clone(), "topk_weights": weights_TK, "topk_config": config}
        return capturer.route(_post_process_topk_ids, **named)
    return capturer.route(_post_process_topk_ids, IDS_TK.clone(), weights_TK, config, *arguments)


def captured(capturer, layer):
    ids_TLK, gates_TLK = unpack(capturer.device_cache.buffer[: len(IDS_TK)])
    return ids_TLK[:, layer].tolist(), gates_TLK[:, layer].numpy()


def test_gates_are_the_same_whether_logits_are_passed_by_name_or_by_position(capturer):
    route(capturer, router_logits=LOGITS_TE, layer_id=0)
    route(capturer, LOGITS_TE, 1)
    expected_TK = LOGITS_TE.softmax(-1).gather(1, IDS_TK.long()).half().numpy()
    for layer in (0, 1):
        ids, gates_TK = captured(capturer, layer)
        assert ids == IDS_TK.tolist()
        # The kernel sums in another order: half a unit of float16's eleventh bit.
        np.testing.assert_allclose(gates_TK, expected_TK, rtol=2**-11 if HAS_KERNEL else 0)
    assert capturer.layers == {0, 1}


@pytest.mark.skipif(HAS_KERNEL, reason="this is the process that it starts")
def test_the_kernel_takes_the_place_of_the_torch_form_in_the_capturer():
    script = "import sys, pytest, routing_replay.kernels.gates as g; kernel = g.capture_gates\n"
    script += "calls = []; g.capture_gates = lambda *a: (calls.append(a), kernel(*a))\n"
    script += f"code = pytest.main(['-q', '-k', 'by_position or placeholder', {__file__!r}])\n"
    script += "sys.exit(code or len(calls) != 2)"  # two layers with logits, one without
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-W", "ignore", "-c", script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_placeholder_of_no_logits_leaves_ids_without_gates(capturer):
    capturer.sampler.step_TLE.fill_(7.0)  # of an earlier step
    route(capturer, LOGITS_TE.new_empty((0, NUM_EXPERTS)), 0)
    ids, gates_TK = captured(capturer, 0)
    assert ids == IDS_TK.tolist()
    assert np.isnan(gates_TK).all()
    assert capturer.sampler.step_TLE[: len(IDS_TK), 0].isnan().all()


def test_a_model_whose_routers_never_report_is_named_at_its_first_forward(capturer):
    step = SimpleNamespace(out_cache_loc=torch.arange(3))
    with pytest.raises(ServerError, match="no router of this model.*TopK.*got TinyForCausalLM"):
        capturer.on_forward_end(step, can_run_graph=False, cuda_graph_batch=None)


def model_of(*routers):
    """A model with SGLang's routers; what their constructor reads of a server is left out.

    Each is a layer's number, with fields of its configuration or without.
    """
    from sglang.srt.layers.moe.topk import TopK, TopKConfig

    model = torch.nn.ModuleList()
    for layer, *fields in routers:
        router = TopK.__new__(TopK)
        torch.nn.Module.__init__(router)
        router.layer_id = layer
        router.topk_config = TopKConfig(top_k=TOP_K, **dict(*fields))
        model.append(router)
    return model


def test_two_routers_with_one_layer_number_are_refused_unless_one_is_a_drafts():
    from routing_replay.sglang.routers import check_routers

    settings, draft = CaptureSettings(level="ids"), {"allow_routed_experts_capture": False}
    check_routers(model_of([0], [1]), settings, "Tiny")
    check_routers(model_of([0], [0, draft]), settings, "Tiny")
    with pytest.raises(ServerError, match=r"one layer number.*got 2 routers in layer 3 \[Tiny\]"):
        check_routers(model_of([3], [3]), settings, "Tiny")


def test_the_log_names_the_layers_that_have_no_gates(caplog):
    from routing_replay.sglang.routers import check_routers

    model = model_of([0], [1, {"custom_routing_function": min}])
    with caplog.at_level("INFO"):
        check_routers(model, CaptureSettings(level="gates"), "Tiny")
    assert "2 routers of the model are SGLang's TopK" in caplog.text
    assert "layers [1] report ids only" in caplog.text


@pytest.mark.parametrize(
    ("config", "factor"),
    [
        ({}, 1.0),
        # Scaled in the selection: the weights have it. Scaled after the experts: they do not.
        ({"routed_scaling_factor": 2.5, "apply_routed_scaling_factor_on_output": True}, 1.0),
        ({"routed_scaling_factor": 2.5}, 2.5),
    ],
)
def test_weights_are_the_factors_of_the_experts_in_the_layers_sum(capturer, config, factor):
    from sglang.srt.layers.moe.topk import TopKConfig, _post_process_topk_ids

    capturer.settings = CaptureSettings(level="weights")
    capturer.weights = CombineWeights(capturer.device_cache.buffer, TOP_K)
    weights_TK = torch.tensor([[0.75, 0.25], [0.625, 0.375], [0.5, 0.5]])
    arguments = (IDS_TK.clone(), weights_TK, TopKConfig(top_k=TOP_K, **config), LOGITS_TE, 1)
    capturer.route(_post_process_topk_ids, *arguments)
    assert torch.equal(capturer.weights.step_TLK[:3, 1], weights_TK * factor)
    # Ids are SGLang's own, without the packing of gates.
    assert capturer.device_cache.buffer[:3, 1].tolist() == IDS_TK.tolist()


def test_a_router_that_passes_the_post_processing_by_has_no_weights(capturer):
    capturer.settings = CaptureSettings(level="weights")
    capturer.weights = CombineWeights(capturer.device_cache.buffer, TOP_K)
    capturer.capture(0, IDS_TK)
    assert capturer.weights.step_TLK[:3, 0].isnan().all()


@pytest.fixture
def verified(capturer):
    """A step that verified trees of three drafts of two requests; draft n chose expert n % 4."""
    from routing_replay.sglang.capturer import CaptureOutput

    capturer.settings, capturer.sampler = CaptureSettings(level="weights"), None
    capturer.weight_version, capturer.host_rows = 4, None
    capturer.weights = CombineWeights(capturer.device_cache.buffer, TOP_K)
    capturer.slots = SlotRows((32, NUM_LAYERS, TOP_K), NUM_EXPERTS, ("weights",))
    capturer.origin_of = lambda mode: Origin.SPECULATIVE
    ids_TLK = (torch.arange(6)[:, None, None] + torch.tensor([0, 1])) % 4
    ids_TLK = ids_TLK.expand(6, NUM_LAYERS, TOP_K)
    capturer.weights.step_TLK[:6] = torch.arange(6.0)[:, None, None]
    stock = SimpleNamespace(out_cache_loc=torch.arange(10, 16), topk=ids_TLK, host_cache=None)
    mode = SimpleNamespace(is_target_verify=lambda: True)
    step = SimpleNamespace(forward_mode=mode, extend_prefix_lens_cpu=None, extend_seq_lens_cpu=None)
    return CaptureOutput(stock, capturer, step)


def test_rows_of_accepted_drafts_move_to_the_front_of_their_requests_slots(capturer, verified):
    # The first request accepted its drafts 0 and 2, the second its root alone.
    verified.accept(torch.tensor([[0, 2], [3, -1]]))
    verified.finalize()
    rows = capturer.slots.take(np.arange(10, 16), 0)
    assert rows.ids_TLK[:, 0, 0].tolist()[:4] == [0, 2, 2, 3]
    assert rows.values["weights"][:, 0, 0].tolist()[:4] == [0, 2, 2, 3]
    assert set(capturer.slots.stamps.origin(rows.stamp_T)) == {Origin.DECODE}
    assert set(capturer.slots.stamps.weight_version(rows.stamp_T)) == {4}


def test_rows_of_drafts_whose_acceptance_was_not_seen_are_not_covered(capturer, verified):
    verified.finalize()
    rows = capturer.slots.take(np.arange(10, 16), 0)
    assert set(capturer.slots.stamps.origin(rows.stamp_T)) == {Origin.SPECULATIVE}
    assert set(capturer.slots.stamps.weight_version(rows.stamp_T)) == {-1}


@pytest.mark.parametrize(
    ("algorithm", "top_k", "origin"),
    [
        ("EAGLE", 1, Origin.DECODE),
        ("EAGLE3", 4, Origin.SPECULATIVE),
        ("NGRAM", 1, Origin.SPECULATIVE),
        ("DFLASH", 1, Origin.SPECULATIVE),
    ],
)
def test_only_a_chain_of_drafts_has_its_rows_where_they_are_accepted(
    capturer, monkeypatch, algorithm, top_k, origin
):
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    from routing_replay.sglang import versions

    server_args = SimpleNamespace(speculative_algorithm=algorithm, speculative_eagle_topk=top_k)
    monkeypatch.setattr(versions, "server_args", lambda: server_args)
    assert capturer.origin_of(ForwardMode.TARGET_VERIFY) == origin
    assert capturer.origin_of(ForwardMode.EXTEND) == Origin.PREFILL
    assert capturer.origin_of(ForwardMode.DECODE) == Origin.DECODE


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"chunked_prefill_size": 512}, 8),
        # Without chunks: what requests fill together, or the longest single one, within the slots.
        ({"chunked_prefill_size": -1}, 1000),
        ({"chunked_prefill_size": -1, "max_prefill_tokens": 4000}, 2000),
        ({"chunked_prefill_size": 512, "speculative_num_draft_tokens": 6}, 48),
    ],
)
def test_the_buffer_holds_the_largest_step(arguments, expected):
    from routing_replay.sglang.capturer import largest_step

    server_args = SimpleNamespace(**{"max_prefill_tokens": 600} | arguments)
    largest = largest_step(server_args, context=1000, num_slots=2000, max_running_requests=8)
    assert largest == expected


def test_it_is_created_although_sglang_has_put_it_behind_the_stock_name(monkeypatch):
    """SGLang's hooks replace a class in every module that holds it, ours among them."""
    from routing_replay.sglang import capturer as module

    monkeypatch.setattr(module.RoutedExpertsCapturer, "create", staticmethod(lambda **named: None))
    monkeypatch.setattr(module, "RoutedExpertsCapturer", module.Capturer)
    assert module.Capturer.create(model_config=None) is None
