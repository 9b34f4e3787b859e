"""The configurations of the replay matrix, and what is checked for each on real Megatron.

For every case, on every rank, with the real pipeline schedule:

    (a) a pass's own routes, recorded and replayed, give bitwise the stock losses and gradients
    (b) random distinct routes per (microbatch, layer, token): every router, in the forward and in
        every recomputation, dispatched exactly its rows, and the others live
    (c) attached but outside every scope, the model is bitwise the stock model
    (d) the rollout's combine weights: see replay_weights.py
"""

import contextlib
import dataclasses
import types

import context_slices
import numpy as np
import torch
from replay_cases import ROUTERS, Case, cases
from replay_models import hybrid_chunks

from routing_replay.routes.table import RouteTable

EXPERTS, TOP_K, VOCAB, HIDDEN = 8, 2, 64, 32
NUM_MICROBATCHES = 4


class Batch:
    """The step's sequences, and how this rank cuts them into microbatches.

    Every microbatch holds two sequences; the last tokens of the second are padding (row -1).
    """

    def __init__(self, case: Case, dp_rank: int, dp_size: int, cp_rank: int, cp_size: int):
        self.case, self.cp = case, (cp_rank, cp_size)
        generator = np.random.default_rng(7)
        self.lengths = []  # tokens of each sequence, over all data-parallel ranks
        for number in range(NUM_MICROBATCHES * dp_size):
            longest = 16 + 8 * (number % 3) if case.is_ragged else 16
            self.lengths += [longest, longest - 5]
        self.tokens = [generator.integers(0, VOCAB, n) for n in self.lengths]
        self.mine = range(dp_rank * NUM_MICROBATCHES, (dp_rank + 1) * NUM_MICROBATCHES)

    def microbatches(self, rows_of):
        """Local tensors of this rank's microbatches, sliced by context parallelism.

        Args:
            rows_of: (sequence, num_tokens) -> its rows.
        """
        for number in self.mine:
            pair = (2 * number, 2 * number + 1)
            longest = max(self.lengths[s] for s in pair)
            longest += -longest % 8  # tensor and context parallelism divide it
            tokens = np.zeros((2, longest), np.int64)
            rows = np.full((2, longest), -1, np.int64)
            positions = np.tile(np.arange(longest), (2, 1))
            for line, s in enumerate(pair):
                tokens[line, : self.lengths[s]] = self.tokens[s]
                rows[line, : self.lengths[s]] = rows_of(s, self.lengths[s])
            is_padding = np.zeros((2, longest), bool)
            for line, s in enumerate(pair):
                is_padding[line, self.lengths[s] :] = True
            yield self._local(tokens, positions, rows, is_padding)

    def _local(self, tokens, positions, rows, is_padding):
        rank, size = self.cp
        length = tokens.shape[1]
        mine = context_slices.positions(rank, size, length, self.case.is_contiguous)
        tokens, positions, rows = tokens[:, mine], positions[:, mine], rows[:, mine]
        is_padding = is_padding[:, mine]
        if self.case.is_packed:
            tokens, positions, rows = (x.reshape(1, -1) for x in (tokens, positions, rows))
        device = torch.cuda.current_device()  # the CPU, where there is no CUDA
        return {
            "tokens": torch.from_numpy(np.ascontiguousarray(tokens)).to(device),
            "positions": torch.from_numpy(np.ascontiguousarray(positions)).to(device),
            "rows": torch.from_numpy(np.ascontiguousarray(rows)),
            "packed": _packed(length) if self.case.is_packed else None,
            "padding_mask": torch.from_numpy(is_padding).to(device)
            if self.case.padding_mask
            else None,
        }


def _packed(length):
    from megatron.core.packed_seq_params import PackedSeqParams

    bounds = torch.tensor([0, length, 2 * length], dtype=torch.int32)
    bounds = bounds.to(torch.cuda.current_device())
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        max_seqlen_q=length,
        max_seqlen_kv=length,
    )


class Job:
    """A model under Megatron's own schedule.

    Args:
        case: The configuration; Megatron is initialized for its layout.
        **overrides: Fields of Megatron's configuration.
    """

    def __init__(self, case: Case, **overrides):
        from megatron.core import parallel_state as ps

        from recipes.model.model import build_model

        self.case = case
        self.config = _config(case, **overrides)
        if case.pattern:
            self.chunks = hybrid_chunks(self.config, case.layout, case.pattern)
        else:
            self.chunks = build_model(self.config, case.layout)
        _spread_expert_bias(self.chunks)
        self.batch = Batch(
            case,
            ps.get_data_parallel_rank(),
            ps.get_data_parallel_world_size(),
            ps.get_context_parallel_rank(),
            ps.get_context_parallel_world_size(),
        )

    def run(self, replay=None, rows_of=None, forward_only=False):
        """One step: losses of this rank's microbatches, and gradients by parameter name.

        Args:
            replay: Handle whose microbatches are announced; None runs stock.
            rows_of: (sequence, num_tokens) -> rows; none by default.
            forward_only: No backward: gradients are None.
        """
        from megatron.core.pipeline_parallel import get_forward_backward_func

        losses = []
        rows_of = rows_of or (lambda s, n: np.full(n, -1, np.int64))
        for chunk in self.chunks:
            chunk.zero_grad(set_to_none=True)
            _reset_statistics(chunk)

        def forward_step(iterator, model):
            batch = next(iterator)
            around = replay.microbatch(batch["rows"]) if replay else contextlib.nullcontext()
            with around:
                output = model(
                    batch["tokens"],
                    batch["positions"],
                    None,
                    labels=batch["tokens"],
                    packed_seq_params=batch["packed"],
                    padding_mask=batch["padding_mask"],
                )

            def loss(output):
                losses.append(output.detach().clone())
                return output.float().mean(), {}

            return output, loss

        iterators = [iter(self.batch.microbatches(rows_of)) for _ in self.chunks]
        with torch.no_grad() if forward_only else contextlib.nullcontext():
            get_forward_backward_func()(
                forward_step_func=forward_step,
                data_iterator=iterators if len(self.chunks) > 1 else iterators[0],
                model=self.chunks if len(self.chunks) > 1 else self.chunks[0],
                num_microbatches=NUM_MICROBATCHES,
                seq_length=self._sequence_length(),
                micro_batch_size=1 if self.case.is_packed else 2,
                forward_only=forward_only,
            )
        gradients = {
            f"{i}.{name}": None if p.grad is None else p.grad.clone()
            for i, chunk in enumerate(self.chunks)
            for name, p in chunk.named_parameters()
        }
        return losses, gradients

    def _sequence_length(self):
        # The pipeline's buffers: all microbatches are alike unless sizes are sent along.
        return (2 if self.case.is_packed else 1) * 16


def _config(case, **more):
    from recipes.model.model import transformer_config

    overrides = {"moe_router_topk": TOP_K, **ROUTERS[case.router]}
    overrides |= {"mtp_num_layers": 1} if case.has_mtp else {}
    if case.pattern:
        overrides |= {"is_hybrid_model": True, "moe_layer_freq": 1, "qk_layernorm": False}
    return transformer_config(
        _latent_hf_config(case) if case.is_latent else _hf_config(case),
        case.layout,
        spec="local",  # on a GPU too: the matrix needs no Transformer Engine
        recompute=case.recompute,
        dispatcher=case.dispatcher,
        variable_seq_lengths=case.is_ragged,
        moe_router_bias_update_rate=0.0,
        init_method=torch.nn.init.normal_,  # wide, so that experts differ and margins are large
        **(overrides | more),
    )


def _hf_config(case):
    from recipes.model.tiny import tiny_config

    return tiny_config(
        layers=len(case.pattern.replace("|", "")) or case.num_layers,
        hidden=HIDDEN,
        experts=EXPERTS,
        top_k=TOP_K,
        vocab=VOCAB,
        heads=2,
        head_dim=16,
        expert_size=16,
        dense_size=32,
        mlp_only_layers=list(case.dense),
        max_position_embeddings=256,
    )


def _latent_hf_config(case):
    from transformers import DeepseekV3Config

    return DeepseekV3Config(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=32,
        moe_intermediate_size=16,
        num_hidden_layers=case.num_layers,
        first_k_dense_replace=len(case.dense),
        num_attention_heads=2,
        num_key_value_heads=2,
        q_lora_rank=24,
        kv_lora_rank=16,
        qk_nope_head_dim=12,
        qk_rope_head_dim=8,
        v_head_dim=12,
        n_routed_experts=EXPERTS,
        n_shared_experts=1,
        num_experts_per_tok=TOP_K,
        n_group=1,
        topk_group=1,
        max_position_embeddings=256,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )


def _spread_expert_bias(chunks):
    """A bias that changes selections: zeros would not show a bias that is forgotten."""
    generator = torch.Generator().manual_seed(3)
    for chunk in chunks:
        for name, buffer in chunk.named_buffers():
            if name.endswith("expert_bias"):
                buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.3)


def _reset_statistics(chunk):
    """Every run starts from the same counters, which some losses read."""
    for name, buffer in chunk.named_buffers():
        if name.endswith(("local_tokens_per_expert", "global_tokens_per_expert", "ga_steps")):
            buffer.zero_()


def random_table(job: Job, model) -> RouteTable:
    """Distinct experts, drawn for every (layer, row); every fifth row uncovered."""
    table = RouteTable.empty(model, job.batch.lengths, source="rollout")
    generator = np.random.default_rng(11)
    scores = generator.random((len(model.layers), table.num_rows, model.num_experts))
    table.expert_ids_LTK[:] = np.argsort(scores, axis=-1)[..., : model.top_k]
    table.covered_T[:] = np.arange(table.num_rows) % 5 != 4
    return table


def error_of(function):
    """Type and message of what a call raises."""
    try:
        function()
    except Exception as error:
        return type(error).__name__, str(error)
    return None


def replayed(job: Job, replay, table: RouteTable) -> tuple[list, int]:
    """Run a job with a table; return what its routers dispatched otherwise, and their calls."""
    oracle = DispatchedRows(job, table)
    with replay.replaying(table):
        job.run(replay, table.rows)
    oracle.remove()
    return oracle.wrong, oracle.calls


class DispatchedRows:
    """Oracle of (b): what each router really dispatched, against the table, call by call.

    The order of tokens inside a router is taken from Megatron itself: the rows are sent through its
    own sequence-parallel scatter, as the embeddings are.
    """

    def __init__(self, job: Job, table: RouteTable):
        from megatron.core.transformer.moe.router import TopKRouter

        self.job, self.table, self.wrong, self.calls = job, table, [], 0
        self.live_rows = self.mtp_calls = 0
        expected = list(job.batch.microbatches(table.rows))
        self.rows = [self._router_order(batch["rows"]) for batch in expected]
        self.forwards: dict[int, int] = {}
        self.hooks, self.mtp_hooks = [], []
        for chunk in job.chunks:
            for name, module in chunk.named_modules():
                if isinstance(module, TopKRouter) and name.startswith("mtp."):
                    self.mtp_hooks.append(module.register_forward_hook(self._check_mtp))
                elif isinstance(module, TopKRouter):
                    self.hooks.append(module.register_forward_hook(self._check))

    def _router_order(self, rows):
        from megatron.core.tensor_parallel import scatter_to_sequence_parallel_region

        rows_SB = rows.t().contiguous().double()
        if self.job.config.sequence_parallel:
            rows_SB = rows_SB.to(torch.cuda.current_device())
            rows_SB = scatter_to_sequence_parallel_region(rows_SB).cpu()
        return rows_SB.reshape(-1).long()

    def _check(self, router, arguments, output):
        routing_map_TE = output[1].cpu()
        layer = router.layer_number - 1
        self.calls += 1
        is_recompute = torch._C._current_graph_task_id() != -1
        if is_recompute:
            # Backward order differs by schedule: the rows must be those of SOME microbatch that is
            # not yet recomputed; random rows make a coincidence impossible.
            matching = [
                n for n, rows in enumerate(self.rows) if self._fits(routing_map_TE, rows, layer)
            ]
            if len(matching) != 1:
                self.wrong.append((layer, "recompute", matching))
            return
        number = self.forwards.get(layer, 0)
        self.forwards[layer] = number + 1
        if not self._fits(routing_map_TE, self.rows[number], layer):
            self.wrong.append((layer, "forward", number))
        self.live_rows += int((self.rows[number] < 0).sum())

    def _check_mtp(self, router, arguments, output):
        """An MTP router numbers its layers from 1 as the decoder does; it must route live."""
        self.mtp_calls += 1
        with torch.no_grad():
            logits_TE = router.gating(arguments[0]).reshape(-1, EXPERTS)
        expected_TE = torch.zeros_like(output[1])
        expected_TE.scatter_(1, logits_TE.topk(self.table.shape.top_k).indices, True)
        if not torch.equal(output[1], expected_TE):
            self.wrong.append((router.layer_number - 1, "an MTP router did not route live"))

    def _fits(self, routing_map_TE, rows_T, layer):
        if len(rows_T) != len(routing_map_TE):
            return False
        replayed_T = rows_T >= 0
        ids = self.table.gather([layer], rows_T[replayed_T].numpy())[0]
        expected = torch.zeros_like(routing_map_TE[replayed_T])
        expected.scatter_(1, torch.from_numpy(ids.astype(np.int64)), True)
        all_K = (routing_map_TE.sum(1) == self.table.shape.top_k).all()
        return bool(all_K) and torch.equal(routing_map_TE[replayed_T], expected)

    def remove(self):
        for hook in self.hooks + self.mtp_hooks:
            hook.remove()


def check_case(case: Case) -> list[str]:
    """Run one case on this rank; returns what is wrong, nothing if all holds."""
    from replay_weights import weights_findings

    from routing_replay.config import ReplayConfig
    from routing_replay.megatron import attach

    job = Job(case)
    stock = job.run()
    wrong = []
    r2 = ReplayConfig(mode="R2", agreement_every=1, agreement_tokens=8)
    with attach(job.chunks, r2) as replay:
        wrong += differences("(c) attached, off", stock, job.run())
        with replay.recording(job.batch.lengths) as recorded:
            recording = job.run(replay, recorded.rows)
        wrong += differences("(a) recording", stock, recording)
        table = recorded.table()
        if not table.covered_T.all():
            wrong.append("(a) rows that were not recorded")
        with replay.replaying(table):
            again = job.run(replay, table.rows)
        wrong += differences("(a) own routes replayed", stock, again)
        wrong += _own_agreement(replay)
        wrong += _no_grad_record(job, replay, stock)
    with attach(job.chunks, dataclasses.replace(r2, mode="R3")) as replay:
        wrong += _random_routes(job, replay)
        wrong += _evaluation_in_the_middle(job, replay, stock)
    if not wrong:  # its oracle tells microbatches apart by the rows that were replayed
        wrong += weights_findings(job)
    wrong += differences("removed", stock, job.run())
    return [f"{case.name}: {text}" for text in wrong]


def _own_agreement(replay):
    metrics = {name: float(m.value()) for name, m in replay.metrics().items()}
    found = [] if metrics["routing_replay/exact_match"] == 1 else ["(a) own routes disagree"]
    lines = replay.receipt.lines
    if not all(line.is_right and line.num_replayed == line.num_expected for line in lines):
        found.append("(a) receipt")
    return found


def _no_grad_record(job, replay, stock):
    """R2 as it is used: recorded without gradients, replayed in training, each rank its own."""
    with replay.recording(job.batch.lengths) as recorded:
        job.run(replay, recorded.rows, forward_only=True)
    own = recorded.own_table()
    with replay.replaying(own):
        again = job.run(replay, recorded.rows)
    return differences("(a) recorded without gradients", stock, again)


def _random_routes(job, replay):
    table = random_table(job, replay.shape)
    oracle = DispatchedRows(job, table)
    try:
        with replay.replaying(table):
            job.run(replay, table.rows)
    finally:
        oracle.remove()
    found = [f"(b) {item}" for item in oracle.wrong]
    per_layer = {"none": 1, "full": 2, "moe": 2}.get(job.case.recompute)
    layers = sum(1 for _ in oracle.hooks)
    if per_layer and oracle.calls != per_layer * layers * NUM_MICROBATCHES:
        found.append(f"(b) {oracle.calls} router calls for {layers} layers")
    if bool(oracle.mtp_calls) != bool(oracle.mtp_hooks):
        found.append("(b) MTP routers did not run")
    if layers and not (oracle.live_rows or job.config.context_parallel_size > 1):
        found.append("(b) no live row was checked")  # a context rank may hold none
    return found


def _evaluation_in_the_middle(job, replay, stock):
    """Within a scope, `live()` passes are stock, and the scope's receipt does not count them."""
    table = random_table(job, replay.shape)
    live = types.SimpleNamespace(microbatch=lambda rows: replay.live())
    with replay.replaying(table):
        job.run(replay, table.rows)
        evaluation = job.run(live)
    found = differences("live() inside a scope", stock, evaluation)
    routed = {line.microbatch for line in replay.receipt.lines}
    return found + ([] if len(routed) <= NUM_MICROBATCHES else ["live() in the receipt"])


def differences(what, expected, found):
    """Names of what is not bitwise equal."""
    losses, gradients = expected
    wrong = []
    if len(losses) != len(found[0]) or any(
        not torch.equal(a, b) for a, b in zip(losses, found[0], strict=False)
    ):
        wrong.append(f"{what}: losses differ")
    for name, gradient in gradients.items():
        other = found[1].get(name)
        if (gradient is None) != (other is None) or (
            gradient is not None and not torch.equal(gradient, other)
        ):
            wrong.append(f"{what}: gradient of {name} differs")
            break
    return wrong


def run_cases(rank: int, names: list[str], num_ranks: int) -> list[str]:
    """Entry of a spawned rank: the named cases one after another; all findings."""
    from megatron_worlds import megatron

    by_name = {case.name: case for case in cases(num_ranks)}
    wrong = []
    for name in names:
        case = by_name[name]
        with megatron(case.layout), context_slices.slices(case.is_contiguous):
            wrong += [f"rank {rank}, {text}" for text in check_case(case)]
    return wrong


def run_with_fault(rank: int, fault: str) -> list[str]:
    """Entry of a spawned rank: one case, with a fault planted into replay. It must be noticed."""
    from megatron_worlds import megatron

    FAULTS[fault]()
    case = Case(recompute="full")
    with megatron(case.layout):
        return check_case(case)


def _plant_shifted_rows():
    """Every token gets its predecessor's routes."""
    gather = RouteTable.gather
    RouteTable.gather = lambda self, layers, rows_T: gather(self, layers, np.roll(rows_T, 1))


def _plant_swapped_layers():
    """Layers 0 and 1 get each other's routes."""
    gather = RouteTable.gather

    def swapped(self, layers, rows_T):
        ids_LTK = gather(self, layers, rows_T)
        if len(layers) > 1:
            ids_LTK[[0, 1]] = ids_LTK[[1, 0]]
        return ids_LTK

    RouteTable.gather = swapped


def _plant_live_recompute():
    """Recomputation routes live, as with a seam that is switched off before the backward."""
    from routing_replay.megatron.passes import ForwardPass
    from routing_replay.megatron.replaying_pass import ReplayingPass

    replay = ReplayingPass.select
    ReplayingPass.select = lambda self, seam, live, is_recompute: (
        ForwardPass.select(self, seam, live, True)
        if is_recompute
        else replay(self, seam, live, False)
    )


def _plant_batch_major_rows():
    """Rows in the order of input_ids, not of Megatron's [s, b, h]: shapes match, tokens do not."""
    from routing_replay.megatron import routers

    routers.router_order = lambda values_BS, tp_size, tp_rank: values_BS.reshape(-1)


FAULTS = {
    "batch_major_rows": _plant_batch_major_rows,
    "shifted_rows": _plant_shifted_rows,
    "swapped_layers": _plant_swapped_layers,
    "live_recompute": _plant_live_recompute,
}
