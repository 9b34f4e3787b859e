"""What the ranks of the world in `test_megatron_cpu.py` compute."""

import megatron_batches
import torch
from megatron_worlds import megatron

from recipes.model import cpu, model
from recipes.model.local_modules import AllGatherAttention, zigzag_positions
from recipes.model.parallel import ParallelLayout
from recipes.model.weights import load_hf

# isort: split
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.packed_seq_params import PackedSeqParams

HEADS, GROUPS, HEAD = 4, 2, 8


def run(rank, folder, batch, reference_norm):
    layouts = {
        "one": ParallelLayout(),
        "tp2": ParallelLayout(tensor=2),
        "ep2": ParallelLayout(expert=2),
        "cp2": ParallelLayout(context=2),
    }
    return {
        "again": cpu.enable_cpu(),
        "names": _cuda_names(),
        "dropout": _recomputed_dropout(),
        "attention": {packed: _attention(packed) for packed in (False, True)},
        "training": {
            (name, dtype): _train(folder, layout, batch, dtype)
            for name, layout in layouts.items()
            for dtype in (torch.float32, torch.bfloat16)
        },
        "uneven": _uneven_parts(),
    }


def _cuda_names():
    """Where tensors land that Megatron's code would put on CUDA."""
    tensors = [
        torch.ones(2, device="cuda"),
        torch.ones(2, device=torch.device("cuda", 0)),
        torch.ones(2).cuda(),
        torch.ones(2).to("cuda:0"),
        torch.ones(2).to(torch.cuda.current_device()),
        torch.tensor([1.0, 1.0], pin_memory=True),
        torch.nn.Linear(2, 2).cuda().weight,
    ]
    return {tensor.device.type for tensor in tensors}, torch.ones(2).type()


def _recomputed_dropout():
    """Largest difference between gradients with and without recomputing a dropout."""
    with megatron(ParallelLayout(tensor=2)):
        gradients, masks = [], []
        for recomputed in (False, True):
            tensor_parallel.model_parallel_cuda_manual_seed(5, force_reset_rng=True)
            values = torch.linspace(1, 2, 64).requires_grad_()

            def work(x):
                with tensor_parallel.get_cuda_rng_tracker().fork():
                    return torch.nn.functional.dropout(x, 0.5) * x

            if recomputed:
                output = tensor_parallel.checkpoint(work, False, values)
            else:
                output = work(values)
            torch.rand(3)  # the generator moves on before backward
            output.sum().backward()
            gradients.append(values.grad)
            masks.append(output.detach() == 0)
        return (gradients[0] - gradients[1]).abs().max().item(), masks[0].tolist()


def _attention(packed):
    """Errors of output and gradients over two context-parallel ranks against a plain formula."""
    lengths = [12, 4] if packed else [16, 16]
    generator = torch.Generator().manual_seed(3)
    shapes = {"q": HEADS, "k": GROUPS, "v": GROUPS}
    whole = [
        {k: torch.randn(n, heads, HEAD, generator=generator) for k, heads in shapes.items()}
        for n in lengths
    ]
    weights = [torch.randn(n, HEADS * HEAD, generator=generator) for n in lengths]
    expected = [_plain_attention(x, w) for x, w in zip(whole, weights, strict=True)]
    with megatron(ParallelLayout(context=2)):
        group = parallel_state.get_context_parallel_group()
        rows = [zigzag_positions(group.rank(), 2, n // 2) for n in lengths]
        module = _attention_module(group)
        join = torch.cat if packed else lambda parts: torch.stack(parts, dim=1)
        local = {
            k: join([x[k][r] for x, r in zip(whole, rows, strict=True)]).requires_grad_()
            for k in shapes
        }
        bounds = torch.tensor([0, *lengths]).cumsum(0).int()
        params = PackedSeqParams(qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds)
        output = module(
            local["q"], local["k"], local["v"], None, packed_seq_params=params if packed else None
        )
        scale = join([w[r] for w, r in zip(weights, rows, strict=True)])
        (output * scale).sum().backward()
        want = join([e["output"][r] for e, r in zip(expected, rows, strict=True)])
        errors = [(output - want).abs().max().item()]
        for k in shapes:
            want = join([e[k][r] for e, r in zip(expected, rows, strict=True)])
            errors.append((local[k].grad - want).abs().max().item())
        return errors


def _attention_module(group):
    class Config:
        kv_channels, attention_dropout = HEAD, 0.0

    class Groups:
        cp = group

    return AllGatherAttention(Config, 1, None, "self", pg_collection=Groups)


def _plain_attention(inputs, weight):
    """softmax(q k^T / sqrt(d)) v, causal, one sequence; with the gradients of sum(weight * it)."""
    q, k, v = (inputs[name].clone().requires_grad_() for name in "qkv")
    repeat = HEADS // GROUPS
    keys, values = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    scores = torch.einsum("qhd,khd->hqk", q, keys) / HEAD**0.5
    hidden = torch.ones(len(q), len(q)).triu(1).bool()
    output = torch.einsum(
        "hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), values
    )
    output = output.flatten(1)
    (output * weight).sum().backward()
    return {"output": output.detach(), "q": q.grad, "k": k.grad, "v": v.grad}


def _train(folder, layout, batch, dtype):
    """Gradient norm of the first step and the gains of two: Megatron's schedule, DDP, optimizer."""
    with megatron(layout):
        config = model.transformer_config(folder, layout, dtype=dtype)
        chunks = model.build_model(config, layout)
        load_hf(chunks, folder)
        config.finalize_model_grads_func = finalize_model_grads
        chunks = [
            DistributedDataParallel(
                config=config,
                ddp_config=DistributedDataParallelConfig(use_distributed_optimizer=False),
                module=chunk,
            )
            for chunk in chunks
        ]
        bf16 = dtype == torch.bfloat16
        optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam", lr=1e-2, bf16=bf16, params_dtype=dtype, clip_grad=1.0
            ),
            chunks,
        )
        norms, losses = [], []
        for _ in range(2):
            for chunk in chunks:
                chunk.zero_grad_buffer()
            optimizer.zero_grad()
            losses.append(megatron_batches.megatron_backward(chunks, batch))
            done, norm, _ = optimizer.step()
            assert done
            norms.append(float(norm))
        return norms, losses


def _uneven_parts():
    """Gathering and reducing parts of unequal sizes over two ranks, as experts' shards need."""
    with megatron(ParallelLayout(tensor=2)):
        group = parallel_state.get_tensor_model_parallel_group()
        sizes = [3, 1]
        rank = group.rank()
        own = torch.full((sizes[rank], 2), rank + 1.0, requires_grad=True)
        whole = tensor_parallel.gather_from_sequence_parallel_region(
            own, group=group, output_split_sizes=sizes
        )
        (whole * (rank + 1)).sum().backward()
        return whole.tolist(), own.grad.tolist()
