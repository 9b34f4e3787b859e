"""What the ranks of the world in `test_megatron_weights.py` compute."""

import contextlib
import os
from collections import Counter

import megatron_batches
import torch
from megatron_worlds import megatron
from safetensors.torch import load_file
from te_stand_ins import te_spec

from recipes.model import model
from recipes.model.buckets import Buckets
from recipes.model.checkpoint_files import CheckpointWriter
from recipes.model.parallel import ParallelLayout
from recipes.model.saving import save_hf, written_tensors
from recipes.model.weights import load_hf, named_hf_tensors
from routing_replay.errors import CheckpointError

# isort: split
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)

QWEN_LAYOUTS = {
    "one": (ParallelLayout(), {}),
    "tp2": (ParallelLayout(tensor=2), {}),
    "tp2-etp1": (ParallelLayout(tensor=2, expert_tensor=1), {}),
    "pp2-first1": (ParallelLayout(pipeline=2, first_stage_layers=1), {}),
    "pp2-vpp2": (ParallelLayout(pipeline=2, virtual_pipeline=2), {}),
    "ep2-alltoall": (ParallelLayout(expert=2), {"dispatcher": "alltoall"}),
    "ep2-allgather": (ParallelLayout(expert=2), {"dispatcher": "allgather"}),
    "cp2": (ParallelLayout(context=2), {}),
    "tp2-ep2-etp2": (ParallelLayout(tensor=2, expert=2), {}),
    "tp2-cp2": (ParallelLayout(tensor=2, context=2), {}),
    "cp2-ep4": (ParallelLayout(context=2, expert=4), {}),
    "tp2-pp2-ep2": (ParallelLayout(tensor=2, pipeline=2, expert=2, expert_tensor=1), {}),
    "full-recompute": (ParallelLayout(tensor=2), {"recompute": "full"}),
    "moe-recompute": (ParallelLayout(expert=2), {"recompute": "moe"}),
}
GLM_LAYOUTS = {
    "one": (ParallelLayout(), {}),
    "tp2-ep2": (ParallelLayout(tensor=2, expert=2, expert_tensor=1), {}),
}
LATENT_LAYOUTS = {
    "one": (ParallelLayout(), {}),
    "tp2-ep2": (ParallelLayout(tensor=2, expert=2, expert_tensor=1), {}),
    "tp2-cp2": (ParallelLayout(tensor=2, context=2), {}),
}
LAYOUTS = {
    "qwen": QWEN_LAYOUTS,
    "glm": GLM_LAYOUTS,
    "deepseek": LATENT_LAYOUTS,
}
# Less than an embedding, more than many tensors together.
BUCKET_BYTES = 10_000
# The saved model is one SGD step away from the loaded one; large enough to change every logit.
LEARNING_RATE = 0.5


def run(rank, folders, reference_path, out):
    """Everything in one world; a dict of results, of which rank 0's are complete."""
    reference = torch.load(reference_path)
    results = {}
    for family, layouts in LAYOUTS.items():
        for name, (layout, options) in layouts.items():
            results[family, name] = _check(
                folders[family], layout, options, reference[family], f"{out}/{family}-{name}"
            )
    layout = ParallelLayout(tensor=2, expert=2)
    for grouped in (True, False):
        with te_spec():
            results["te", grouped] = _check(
                folders["qwen"],
                layout,
                {"moe_grouped_gemm": grouped, "te": True},
                reference["qwen"],
                f"{out}/te-{grouped}",
            )
    results["tied"] = _check_tied(folders["tied"], reference["tied"])
    results["bf16"] = _check_bf16(folders["qwen"], out)
    _save_both_ways(rank, folders["tied"], out)
    results["errors"] = {kind: _load_error(folder) for kind, folder in folders["broken"].items()}
    results["full disk"] = _full_disk(rank, folders["qwen"], out)
    return results


def _build(folder, layout, te=False, **options):
    config = model.transformer_config(folder, layout, **options)
    if te:
        config.layer_spec = "te"  # of stand-ins, which have no fused kernels
    return config, model.build_model(config, layout)


def _check(folder, layout, options, reference, out):
    """Errors against transformers: logits, gradients, names, and the save after an SGD step."""
    with megatron(layout):
        config, chunks = _build(folder, layout, **options)
        load_hf(chunks, folder)
        found = {"names": [name for chunk in chunks for name, _ in chunk.named_parameters()]}
        for kind, packed in (("stacked", False), ("packed", True)):
            found[kind] = _logit_error(chunks, config, reference, kind, packed)
        found["exact"] = _equals_file(chunks, folder)
        found["buckets"] = _gathers(chunks, folder)
        found["shares"] = _writes_shares(chunks, folder)
        wrapped = _with_gradient_buffers(config, chunks)
        megatron_batches.megatron_backward(wrapped, reference["batches"]["packed"], packed=True)
        found["gradient"] = _gradient_error(wrapped, reference["gradients"])
        _sgd_step(wrapped)
        if "te" not in options:
            logits = _logits(chunks, config, reference, "packed", True)
            save_hf(wrapped, out, source=folder, max_shard_bytes=200_000)
            found["after step"] = logits
    return found


def _check_tied(folder, reference):
    layout = ParallelLayout(pipeline=2, tensor=2)
    with megatron(layout):
        config, chunks = _build(folder, layout)
        load_hf(chunks, folder)
        return {
            "stacked": _logit_error(chunks, config, reference, "stacked", False),
            "exact": _equals_file(chunks, folder),
            "buckets": _gathers(chunks, folder),
        }


def _check_bf16(folder, out):
    """bfloat16 parameters: what is saved is the file's values in bfloat16."""
    layout = ParallelLayout(expert=2)
    with megatron(layout):
        _, chunks = _build(folder, layout, dtype=torch.bfloat16)
        load_hf(chunks, folder)
        save_hf(chunks, f"{out}/bf16", source=folder)
        save_hf(chunks, f"{out}/bf16-as-fp32", source=folder, dtype=torch.float32)
        save_hf(chunks, f"{out}/fp8", source=folder, form="fp8")
        load_hf(chunks, f"{out}/fp8")
        save_hf(chunks, f"{out}/bf16-of-fp8", source=f"{out}/fp8")
        return {parameter.dtype for chunk in chunks for parameter in chunk.parameters()}


def _save_both_ways(rank, folder, out):
    """Each form from all ranks, from rank 0 alone, and where rank 3 sees another folder."""
    layout = ParallelLayout(pipeline=2, expert=2)
    with megatron(layout):
        _, chunks = _build(folder, layout, dtype=torch.bfloat16)
        load_hf(chunks, folder)
        for form in ("checkpoint", "fp8", "fp8-grid"):
            save_hf(chunks, f"{out}/shares-{form}", source=folder, form=form)
            gathered = named_hf_tensors(chunks)
            save_hf(chunks, f"{out}/first-{form}", source=folder, form=form, tensors=gathered)
        own = f"{out}/disk-{int(rank == 3)}"
        save_hf(chunks, f"{own}/unshared", source=folder)


def die_in_save(rank, folder, out):
    """Rank 1 dies when it has written a file of a second save."""
    layout = ParallelLayout(expert=2)
    with megatron(layout):
        _, chunks = _build(folder, layout)
        load_hf(chunks, folder)
        save_hf(chunks, f"{out}/kept", source=folder)
        if rank == 1:
            CheckpointWriter.close = lambda self: self._flush() or os._exit(1)
        save_hf(chunks, f"{out}/kept", source=folder, dtype=torch.bfloat16)


def _load_error(folder):
    layout = ParallelLayout(pipeline=2, expert=2)
    with megatron(layout):
        try:
            _, chunks = _build(folder, layout)
            load_hf(chunks, folder)
        except CheckpointError as error:
            return str(error)
    return None


def _full_disk(rank, folder, out):
    """A save that runs into a file size limit (as a full disk: an OSError in a write)."""
    import resource

    layout = ParallelLayout(tensor=2)
    with megatron(layout):
        _, chunks = _build(folder, layout)
        load_hf(chunks, folder)
        save_hf(chunks, f"{out}/kept", source=folder)
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        for chunk in chunks:
            for parameter in chunk.parameters():
                parameter.data.zero_()
        if rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
        try:
            save_hf(chunks, f"{out}/kept", source=folder)
        except CheckpointError as error:
            return str(error)
        finally:
            if rank == 1:
                resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    return None


def _logits(chunks, config, reference, kind, packed):
    with torch.no_grad():
        return megatron_batches.megatron_logits(
            chunks, reference["batches"][kind], packed=packed, vocab_size=config.vocab_size
        )


def _logit_error(chunks, config, reference, kind, packed):
    logits = _logits(chunks, config, reference, kind, packed)
    if logits is None:
        return None
    pairs = zip(logits, reference["logits"][kind], strict=True)
    return max((ours - theirs).abs().max().item() for ours, theirs in pairs)


def _equals_file(chunks, folder):
    """Whether `named_hf_tensors` gives back the file's tensors, each once and bit for bit."""
    pairs = list(named_hf_tensors(chunks))
    if torch.distributed.get_rank() > 0:
        return all(tensor is None for _, tensor in pairs)
    expected = load_file(f"{folder}/model.safetensors")
    if [name for name, _ in pairs] != list(dict(pairs)) or dict(pairs).keys() != expected.keys():
        return False
    return all(torch.equal(tensor, expected[name]) for name, tensor in pairs)


def _gathers(chunks, folder):
    """Whether buckets are the file's tensors in bfloat16, each on its stage's first rank alone."""
    expected = load_file(f"{folder}/model.safetensors")
    buckets = Buckets(chunks, BUCKET_BYTES, torch.bfloat16)
    gathered = [buckets.gather(bucket) for bucket in buckets.buckets]
    names = [name for bucket in buckets.buckets for name in bucket.parts]
    has_all = sorted(names) == sorted(expected)
    rank, stage = torch.distributed.get_rank(), parallel_state.get_pipeline_model_parallel_rank()
    stages = [0] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(stages, stage)
    is_source = rank == stages.index(stage)
    return has_all and all(
        (tensors is not None) == (is_source and bucket.source == rank)
        and all(torch.equal(t, _as_sent(n, expected[n])) for n, t in tensors or [])
        for bucket, tensors in zip(buckets.buckets, gathered, strict=True)
    )


def _writes_shares(chunks, folder):
    """Whether the ranks write each of the file's tensors once, and a stage's equally much."""
    expected = load_file(f"{folder}/model.safetensors")
    own = dict(written_tensors(chunks))
    ranks = [None] * torch.distributed.get_world_size()
    stage = parallel_state.get_pipeline_model_parallel_rank()
    size = sum(tensor.nbytes for tensor in own.values())
    torch.distributed.all_gather_object(ranks, (stage, size, list(own)))
    names = [name for *_, names in ranks for name in names]
    sizes = [size for of_stage, size, _ in ranks if of_stage == stage]
    # Whole tensors, and a layer's attention, are not divided.
    atoms = Counter()
    for name, tensor in expected.items():
        atoms[name.partition(".self_attn.")[0]] += tensor.nbytes
    return (
        sorted(names) == sorted(expected)
        and all(torch.equal(tensor, expected[name]) for name, tensor in own.items())
        and max(sizes) - min(sizes) <= max(atoms.values())
    )


def _as_sent(name, tensor):
    return tensor if name.endswith("e_score_correction_bias") else tensor.bfloat16()


def _with_gradient_buffers(config, chunks):
    config.finalize_model_grads_func = finalize_model_grads
    wrapped = [
        DistributedDataParallel(
            config=config, ddp_config=DistributedDataParallelConfig(), module=chunk
        )
        for chunk in chunks
    ]
    for chunk in wrapped:
        chunk.zero_grad_buffer()
    return wrapped


def _gradient_error(chunks, reference):
    """Largest error of a gradient, relative to the largest entry of its own tensor."""
    with _gradients_as_weights(chunks):
        pairs = list(named_hf_tensors(chunks))
    if torch.distributed.get_rank() > 0:
        return None
    gradients = {name: tensor for name, tensor in pairs if name in reference}
    assert gradients.keys() == reference.keys()
    return max(
        ((gradients[name] - reference[name]).abs().max() / reference[name].abs().max()).item()
        for name in gradients
        if reference[name].abs().max() > 0  # an expert without tokens
    )


@contextlib.contextmanager
def _gradients_as_weights(chunks):
    """The export gathers gradients, too, when they stand where the weights do."""
    parameters = [parameter for chunk in chunks for parameter in chunk.parameters()]
    weights = [parameter.data for parameter in parameters]
    for parameter in parameters:
        parameter.data = parameter.main_grad.clone()
    try:
        yield
    finally:
        for parameter, weight in zip(parameters, weights, strict=True):
            parameter.data = weight


def _sgd_step(chunks):
    for chunk in chunks:
        for parameter in chunk.parameters():
            parameter.data.sub_(LEARNING_RATE * parameter.main_grad)
