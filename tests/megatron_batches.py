"""Batches through real Megatron chunks under any layout, and what to compare them with.

A batch is a list of microbatches, a microbatch a list of sequences (1-D token ids).
`megatron_logits` and `megatron_backward` cut it as a trainer would: zigzag over context-parallel
ranks, stacked or packed.
"""

import dataclasses

import torch

from routing_replay.routes.token_rows import context_positions


@dataclasses.dataclass(frozen=True, kw_only=True)
class LocalMicrobatch:
    """What one rank feeds to the model for one microbatch; b, s are [1, tokens] when packed."""

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    packed_seq_params: object | None
    num_tokens: int  # of the microbatch, over all context-parallel ranks


def local_microbatch(sequences, packed) -> LocalMicrobatch:
    """This rank's part of a microbatch; unpacked sequences must be of one length."""
    from megatron.core.packed_seq_params import PackedSeqParams

    parts = [_local_positions(len(ids)) for ids in sequences]
    # The label of a token is the next one; of the last, the first (both sides follow this rule).
    rows = [
        [ids[part], ids.roll(-1)[part], part] for ids, part in zip(sequences, parts, strict=True)
    ]
    join = (lambda xs: torch.cat(xs)[None]) if packed else torch.stack
    input_ids, labels, position_ids = (join(list(xs)) for xs in zip(*rows, strict=True))
    params = None
    if packed:
        lengths = [len(ids) for ids in sequences]
        bounds = torch.tensor([0, *lengths]).cumsum(0).int()
        params = PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=bounds,
            cu_seqlens_kv=bounds,
            max_seqlen_q=max(lengths),
            max_seqlen_kv=max(lengths),
        )
    return LocalMicrobatch(
        input_ids=input_ids,
        labels=labels,
        position_ids=position_ids,
        packed_seq_params=params,
        num_tokens=sum(len(ids) for ids in sequences),
    )


def megatron_logits(chunks, batch, *, packed=False, vocab_size) -> list[torch.Tensor] | None:
    """Logits [tokens, V] of every sequence in order, on the last pipeline stage; None elsewhere."""
    from megatron.core import parallel_state, tensor_parallel

    def collect(output, non_loss_data=False):
        return tensor_parallel.gather_from_tensor_model_parallel_region(output)[..., :vocab_size]

    stored = _run(chunks, batch, packed, collect, forward_only=True, collect_non_loss_data=True)
    if not parallel_state.is_pipeline_last_stage(ignore_virtual=True):
        return None
    found = []
    for sequences, local in zip(batch, stored, strict=True):
        rows = list(_gather_context(local.flatten(0, 1) if packed else local.transpose(0, 1)))
        start = 0
        for index, ids in enumerate(sequences):
            part = len(ids) // _context()[1]
            own = [x[start : start + part] if packed else x[:, index] for x in rows]
            found.append(_in_order(own))
            start += part
    return found


def megatron_backward(chunks, batch, *, packed=False):
    """Runs forward and backward; leaves the gradients as Megatron's own schedule does."""

    def loss(output, num_tokens):
        total = output.sum() / num_tokens
        return total, {}

    _run(chunks, batch, packed, loss, forward_only=False)


def hf_loss(model, batch) -> torch.Tensor:
    """transformers' loss of the same batch: the mean over microbatches of the mean over tokens."""
    losses = []
    for sequences in batch:
        tokens = sum(len(ids) for ids in sequences)
        for ids in sequences:
            logits = model(ids[None]).logits[0]
            losses.append(
                torch.nn.functional.cross_entropy(logits, ids.roll(-1), reduction="sum")
                / (tokens * len(batch))
            )
    return sum(losses)


def _run(chunks, batch, packed, on_output, *, forward_only, **options):
    from megatron.core.pipeline_parallel import get_forward_backward_func

    microbatches = [local_microbatch(sequences, packed) for sequences in batch]
    iterators = [iter(microbatches) for _ in chunks]

    def step(iterator, model):
        microbatch = next(iterator)
        output = model(
            microbatch.input_ids,
            microbatch.position_ids,
            None,
            labels=None if forward_only else microbatch.labels,
            packed_seq_params=microbatch.packed_seq_params,
        )
        if forward_only:
            return output, on_output
        return output, lambda out: on_output(out, microbatch.num_tokens)

    return get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iterators if len(chunks) > 1 else iterators[0],
        model=chunks if len(chunks) > 1 else chunks[0],
        num_microbatches=len(batch),
        seq_length=max(sum(map(len, s)) if packed else len(s[0]) for s in batch),
        micro_batch_size=1 if packed else len(batch[0]),
        forward_only=forward_only,
        **options,
    )


def _context():
    from megatron.core import parallel_state

    return (
        parallel_state.get_context_parallel_rank(),
        parallel_state.get_context_parallel_world_size(),
    )


def _local_positions(length):
    return torch.from_numpy(context_positions([0, length], *_context()))


def _gather_context(local):
    from megatron.core import parallel_state

    size = _context()[1]
    gathered = [torch.empty_like(local) for _ in range(size)]
    torch.distributed.all_gather(
        gathered, local.contiguous(), group=parallel_state.get_context_parallel_group()
    )
    return gathered


def _in_order(per_rank):
    size = len(per_rank)
    if size == 1:
        return per_rank[0]
    chunks = [None] * (2 * size)
    for rank, rows in enumerate(per_rank):
        chunks[rank], chunks[2 * size - 1 - rank] = rows.chunk(2)
    return torch.cat(chunks)
