"""Steps as an engine runs them: a CUDA graph for each size, copies to the host on another stream.

Each step fills the static inputs from one of a few sets, with padding rows behind the real ones,
repeats the graph, and copies what it wrote while the next step runs. All steps are compared at the
end, so that nothing waits in between.
"""

import torch

NUM_LAYERS, NUM_EXPERTS, TOP_K, NUM_SETS = 6, 128, 8, 8
SIZES = (64, 16, 1)  # of the graphs; they share a memory pool, the largest first


class Inputs:
    """Static tensors that graphs read, and the sets that fill them."""

    def __init__(self, device, size, dtype=torch.bfloat16):
        generator = torch.Generator().manual_seed(size)
        shape = (NUM_SETS, NUM_LAYERS, size, NUM_EXPERTS)
        logits = torch.randn(shape, generator=generator)
        ids = logits.topk(TOP_K, dim=-1).indices
        self.logits, self.ids = logits.to(device, dtype), ids.to(device, torch.int32)
        self.logits_LTE = self.logits[0].clone()
        self.ids_LTK = self.ids[0].clone()

    def fill(self, step, num_real):
        """Set `step`, of which only the first rows are real: padding has the ids -1."""
        self.logits_LTE.copy_(self.logits[step % NUM_SETS])
        self.ids_LTK.copy_(self.ids[step % NUM_SETS])
        self.ids_LTK[:, num_real:] = -1


def graph_of(work, pool=None):
    """Capture `work`; on a CPU, run it."""
    if not torch.cuda.is_available():
        return work
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # compiles, and fills the allocator's pool
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        work()
    return graph.replay


class Copies:
    """Copies to pinned memory on a stream of their own, as an engine's scheduler makes them."""

    def __init__(self):
        self.stream = torch.cuda.Stream() if torch.cuda.is_available() else None

    def take(self, values):
        """Return a host tensor that holds the values once `wait` has returned."""
        snapshot = values.clone()
        if self.stream is None:
            return snapshot
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            host.copy_(snapshot, non_blocking=True)
            snapshot.record_stream(self.stream)
        return host

    def wait(self):
        if self.stream is not None:
            torch.cuda.synchronize()


def captured_rows(device, function, has_kernel, num_steps):
    """Ids and gates of every real row of every step, against the torch form outside of graphs."""
    from routing_replay.sglang.gates import gate_probs, pack, unpack

    buffer_TLK = torch.zeros(max(SIZES), NUM_LAYERS, TOP_K, dtype=torch.int32, device=device)
    inputs = {size: Inputs(device, size) for size in SIZES}

    def write(size):
        for layer in range(NUM_LAYERS):
            logits_TE, ids_TK = inputs[size].logits_LTE[layer], inputs[size].ids_LTK[layer]
            slots_TK = buffer_TLK[:size, layer]
            if has_kernel:
                from routing_replay.kernels.gates import capture_gates

                capture_gates(logits_TE, ids_TK, function, slots_TK)
            else:
                slots_TK.copy_(pack(ids_TK, gate_probs(logits_TE, ids_TK, function)))

    pool = torch.cuda.graph_pool_handle() if torch.cuda.is_available() else None
    graphs = {size: graph_of(lambda s=size: write(s), pool) for size in SIZES}
    copies, taken = Copies(), []
    for step in range(num_steps):
        size = SIZES[step % len(SIZES)]
        num_real = step % size + 1
        inputs[size].fill(step, num_real)
        graphs[size]()
        taken.append((step, size, num_real, copies.take(buffer_TLK[:num_real])))
    copies.wait()
    wrong = []
    for step, size, num_real, packed_TLK in taken:
        logits_LTE, ids_LTK = (x[step % NUM_SETS] for x in (inputs[size].logits, inputs[size].ids))
        ids_TLK, gates_TLK = unpack(packed_TLK)
        for layer in range(NUM_LAYERS):
            expected_TK = ids_LTK[layer, :num_real]
            gates_TK = gate_probs(logits_LTE[layer, :num_real], expected_TK, function).half()
            if not torch.equal(ids_TLK[:, layer].int(), expected_TK.cpu()):
                wrong.append(f"step {step}, layer {layer}: ids")
            # A kernel sums in another order: half a unit of float16's eleventh bit.
            allowed = 2**-11 if has_kernel else 0
            if not torch.allclose(gates_TLK[:, layer], gates_TK.cpu(), rtol=allowed, atol=0):
                wrong.append(f"step {step}, layer {layer}: gates")
    return wrong[:10]


def replayed_rows(device, form, num_steps, num_tokens=64):
    """Weights, map and gradient of every step of a graph, against the kernel outside of graphs."""
    from routing_replay.kernels.router import RoutingRule, replay_routing

    inputs = Inputs(device, num_tokens, torch.float32)
    score_function = form.removeprefix("pre_")
    rule = RoutingRule(
        top_k=TOP_K, score_function=score_function, use_pre_softmax=form == "pre_softmax"
    )
    is_live_T = torch.zeros(num_tokens, dtype=torch.bool, device=device)
    grad_TE = torch.linspace(-1, 1, NUM_EXPERTS, device=device).expand(num_tokens, -1).contiguous()
    static = inputs.logits_LTE[0].requires_grad_()
    ids_TK = torch.zeros(num_tokens, TOP_K, dtype=torch.uint8, device=device)
    outputs = [torch.zeros(num_tokens, NUM_EXPERTS, device=device) for _ in range(3)]

    def step_of(logits_TE, ids_TK, is_live_T):
        weights_TE, map_TE = replay_routing(logits_TE, ids_TK.clone(), rule, is_live_T=is_live_T)
        (gradient_TE,) = torch.autograd.grad(weights_TE, logits_TE, grad_TE)
        return weights_TE.detach(), map_TE, gradient_TE

    def work():
        for output, values in zip(outputs, step_of(static, ids_TK, is_live_T), strict=True):
            output.copy_(values)

    graph, num_wrong = graph_of(work), torch.zeros((), dtype=torch.int64, device=device)
    generator = torch.Generator().manual_seed(2)
    order = torch.randperm(num_tokens, generator=generator).to(device)
    for step in range(num_steps):
        with torch.no_grad():
            static.copy_(inputs.logits[step % NUM_SETS, 0])
        ids_TK.copy_(inputs.ids[(step + 1) % NUM_SETS, 0])  # other experts than the logits'
        is_live_T.copy_(order % 7 == step % 7)
        graph()
        leaf_TE = inputs.logits[step % NUM_SETS, 0].clone().requires_grad_()
        expected = step_of(leaf_TE, ids_TK, is_live_T)
        for output, values in zip(outputs, expected, strict=True):
            num_wrong += (output != values.to(output.dtype)).sum()
    return [] if num_wrong.item() == 0 else [f"{num_wrong.item()} values differ"]
