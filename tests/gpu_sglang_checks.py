"""SGLang's own `select_experts` with our capturer, in a CUDA graph; one by one on a CPU."""

import sys

import torch
from gpu_capture_checks import NUM_EXPERTS, NUM_LAYERS, NUM_SETS, TOP_K, Copies, Inputs, graph_of

SIZE = 16


def capturer_of(device):
    """A capturer with SGLang's own device buffer; what a server's start would add is left out."""
    from sglang.srt.state_capturer.base import BaseDeviceCache

    from routing_replay.capture import CaptureSettings
    from routing_replay.sglang.capturer import Capturer

    capturer = Capturer.__new__(Capturer)
    capturer.settings = CaptureSettings(level="gates")
    capturer.layers, capturer.architecture = set(), "TinyForCausalLM"
    capturer.num_fused_shared_experts, capturer.topk_size = 0, TOP_K
    capturer.device_cache = BaseDeviceCache(SIZE, NUM_LAYERS, TOP_K, device, "test")
    capturer.sampler = capturer._router = capturer.weights = None
    return capturer


def selected_rows(num_groups, num_steps):
    """Captured ids against those that SGLang returned, and gates against softmax or sigmoid."""
    if not torch.cuda.is_available():
        from recipes.serving import cpu

        sys.path.insert(0, cpu.STUBS)  # SGLang's modules import their CUDA kernels by name
    from sglang.srt.layers.moe import topk
    from sglang.srt.state_capturer.routed_experts import set_global_experts_capturer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    capturer, stock = capturer_of(device), topk._post_process_topk_ids
    set_global_experts_capturer(capturer)
    topk._post_process_topk_ids = lambda *a, **named: capturer.route(stock, *a, **named)
    try:
        return _compared(topk, capturer, num_groups, num_steps, device)
    finally:
        topk._post_process_topk_ids = stock
        set_global_experts_capturer(None)


def _compared(topk, capturer, num_groups, num_steps, device):
    from routing_replay.sglang.gates import gate_probs, unpack

    inputs = Inputs(device, SIZE, torch.float32)
    hidden = torch.zeros(SIZE, 8, device=device)
    bias_E = torch.linspace(-0.1, 0.1, NUM_EXPERTS, device=device) if num_groups else None
    config = topk.TopKConfig(
        top_k=TOP_K,
        renormalize=True,
        use_grouped_topk=num_groups is not None,
        num_expert_group=num_groups,
        topk_group=2 if num_groups else None,
        correction_bias=bias_E,
        torch_native=not torch.cuda.is_available(),  # SGLang's kernels are CUDA's
    )
    returned_LTK = torch.zeros(NUM_LAYERS, SIZE, TOP_K, dtype=torch.int32, device=device)

    def work():
        for layer in range(NUM_LAYERS):
            logits_TE = inputs.logits_LTE[layer]
            selected = topk.select_experts(hidden, logits_TE, config, layer_id=layer)
            returned_LTK[layer].copy_(selected.topk_ids)

    graph, copies, taken = graph_of(work), Copies(), []
    for step in range(num_steps):
        inputs.fill(step, SIZE)
        graph()
        taken.append((step, copies.take(capturer.device_cache.buffer), copies.take(returned_LTK)))
    copies.wait()
    wrong = []
    for step, packed_TLK, ids_LTK in taken:
        ids_TLK, gates_TLK = unpack(packed_TLK)
        if not torch.equal(ids_TLK.transpose(0, 1).int(), ids_LTK):
            wrong.append(f"step {step}: ids")
        for layer in range(NUM_LAYERS):
            logits_TE = inputs.logits[step % NUM_SETS, layer].cpu()
            function = "sigmoid" if num_groups else "softmax"
            expected_TK = gate_probs(logits_TE, ids_LTK[layer], function).half()
            # The GPU's exp is another function than the CPU's.
            if not torch.allclose(gates_TLK[:, layer], expected_TK, rtol=2**-10, atol=0):
                wrong.append(f"step {step}, layer {layer}: gates")
    return wrong[:10] + ([] if capturer.layers == set(range(NUM_LAYERS)) else ["layers"])
