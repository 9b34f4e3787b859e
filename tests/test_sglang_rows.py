"""Which rows are true, on fakes: the cases that two runs on one machine cannot tell apart."""

from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from routing_replay.capture import CaptureSettings
from routing_replay.errors import PayloadError, ServerError
from routing_replay.routes.origin import Origin
from routing_replay.routes.payload import decode_compact
from routing_replay.sglang import plugin, prefixes, rows, versions
from routing_replay.sglang.gates import gate_probs, pack, score_function, unpack
from routing_replay.sglang.host_cache import NUM_SETTLES, HostRows
from routing_replay.sglang.logits import LogitSampler
from routing_replay.sglang.slots import KeptRows, SlotRows

NUM_EXPERTS, NUM_LAYERS, TOP_K = 8, 2, 3


@pytest.fixture(autouse=True)
def newest(monkeypatch):
    monkeypatch.setattr(versions, "installed", lambda: (0, 5, 23))


class FakeEngine:
    """Slots, a capturer and forward passes; pass n writes ids that only pass n writes."""

    def __init__(self, num_slots=64, level="gates", has_names=False):
        settings = CaptureSettings(level=level)
        shape = (num_slots, NUM_LAYERS, TOP_K)
        self.capturer = SimpleNamespace(
            settings=settings,
            slots=SlotRows(shape, NUM_EXPERTS, ("gates", "weights"), has_names=has_names),
            layers={0, 1},
            num_layers=NUM_LAYERS,
            topk_size=TOP_K,
            num_experts=NUM_EXPERTS,
            sampler=None,
            host_rows=None,
            cause_of_others=Origin.EVICTED,
        )
        self.pool = SimpleNamespace(req_to_token=torch.zeros(4, 32, dtype=torch.int32))

    def forward(self, slots, number, origin, version=0, tokens=None):
        """Pass `number` computes these slots, of a prompt of `tokens`; returns its rows."""
        ids_TLK = np.broadcast_to(np.arange(TOP_K) + number, (len(slots), NUM_LAYERS, TOP_K))
        stamp = self.capturer.slots.stamps.stamp(origin, version)
        step = KeptRows(
            start=0,
            ids_TLK=ids_TLK.astype(np.uint8),
            values={
                "gates": np.full(ids_TLK.shape, 0.25, np.float16),
                "weights": np.full(ids_TLK.shape, number, np.float32),
            },
            stamp_T=np.full(len(slots), stamp, np.int32),
            logits=None,
        )
        self.capturer.slots.put(np.array(slots), step)
        self.capturer.slots.settle(np.array(slots))
        if tokens is not None and self.capturer.slots.has_names:
            hashes_T = prefixes.prefix_hashes(tokens, before=hash(None) % 2**64)
            self.capturer.slots.name(np.array(slots), hashes_T)
        return step

    def prefill(self, req, slots, number, start=0, version=0):
        """Pass `number` prefills the positions from `start` on, as `keep_prefill` sees it."""
        self.pool.req_to_token[req.kv.req_pool_idx, start : start + len(slots)] = torch.tensor(
            slots
        )
        step = self.forward(slots, number, Origin.PREFILL, version)
        output = SimpleNamespace(
            extents=[(start, len(slots))],
            finalize=lambda: None,
            rows=lambda: step,
            out_cache_loc=torch.tensor(slots),
            capturer=self.capturer,
        )
        result = SimpleNamespace(routed_experts_output=output, copy_done=None)
        rows.keep_prefill(SimpleNamespace(reqs=[req], decoding_reqs=None), result)

    def decode(self, req, slot, number, version=0):
        """Pass `number` consumes the last token, at `slot`, and samples another."""
        position = len(req.origin_input_ids) + len(req.output_ids) - 1
        self.pool.req_to_token[req.kv.req_pool_idx, position] = slot
        self.forward([slot], number, Origin.DECODE, version)
        req.output_ids.append(0)

    def routes(self, req):
        payload = rows.collect(self.capturer, req, self.pool)
        return decode_compact(payload.numpy().tobytes())[0]


class FakeRequest:
    def __init__(self, num_prompt, pool_index=0, level="gates", start=0):
        self.origin_input_ids, self.output_ids = [0] * num_prompt, []
        self.kv = SimpleNamespace(req_pool_idx=pool_index)
        self.return_routed_experts, self.is_retracted = True, False
        self.routed_experts_start_len, self.input_embeds = start, None
        self.sampling_params = SimpleNamespace(custom_params={"routing_replay": level})

    @property
    def output_ids_through_stop(self):
        return self.output_ids


def passes(routes):
    """Which forward pass each row is of: the smallest of its ids."""
    return routes.expert_ids_TLK[:, 0].min(-1).tolist()


def test_a_request_keeps_its_own_prefill_when_the_tree_gives_it_other_slots():
    engine, req = FakeEngine(), FakeRequest(4)
    engine.forward([20, 21, 22, 23], 5, Origin.PREFILL)  # another request, the same prompt
    engine.prefill(req, [0, 1, 2, 3], 1)
    req.output_ids.append(0)
    # The radix tree has the prompt already: this request's slots become the other's.
    engine.pool.req_to_token[0, :4] = torch.tensor([20, 21, 22, 23])
    engine.decode(req, 30, 2)
    assert passes(engine.routes(req)) == [1, 1, 1, 1, 2]


@pytest.mark.parametrize("has_names", [False, True])
def test_a_cached_prefix_has_the_rows_of_the_pass_that_computed_it(has_names):
    engine, req = FakeEngine(has_names=has_names), FakeRequest(4)
    engine.forward([20, 21], 5, Origin.PREFILL, version=3, tokens=[0, 0])
    engine.pool.req_to_token[0, :2] = torch.tensor([20, 21])
    engine.prefill(req, [2, 3], 1, start=2, version=4)
    req.output_ids.append(0)
    routes = engine.routes(req)
    assert passes(routes) == [5, 5, 1, 1]
    assert routes.weight_version_T.tolist() == [3, 3, 4, 4]


def test_a_slot_that_was_filled_without_a_forward_pass_is_not_covered():
    """Another cache, a storage backend or another server put the prefix there."""
    engine, req = FakeEngine(has_names=True), FakeRequest(4)
    engine.forward([20, 21, 22], 5, Origin.PREFILL, tokens=[0, 0, 7])  # of another prompt
    engine.pool.req_to_token[0, :3] = torch.tensor([20, 21, 22])
    engine.prefill(req, [2], 1, start=3)
    req.output_ids.append(0)
    routes = engine.routes(req)
    # The prompt 0, 0, 0, 0 shares two tokens with it; slot 22 holds the row of another third one.
    assert passes(routes)[:2] == [5, 5]
    assert routes.origin_T.tolist() == [Origin.PREFILL] * 2 + [Origin.EVICTED, Origin.PREFILL]
    assert routes.weight_version_T.tolist() == [0, 0, -1, 0]


class TransferredBatch:
    """Requests whose prompts came into their slots from another server."""

    def __init__(self, engine, req, slots):
        self.engine, self.reqs, self.slots, self.streamed = engine, [req], slots, []

    def prepare_for_prebuilt(self):
        self.engine.pool.req_to_token[0, : len(self.slots)] = torch.tensor(self.slots)
        self.out_cache_loc = torch.tensor(self.slots)

    def _maybe_collect_routed_experts(self, req):
        req.routed_experts = rows.collect(self.engine.capturer, req, self.engine.pool)

    def process_batch_result_prebuilt(self, batch):
        self.streamed += [getattr(req, "routed_experts", None) for req in batch.reqs]


@pytest.mark.parametrize("num_new", [1, 3])
def test_a_prompt_that_another_server_has_prefilled_has_no_rows(monkeypatch, num_new):
    """Neither those that its slots hold, nor, from an earlier turn, those of the same tokens."""
    engine, req = FakeEngine(has_names=True), FakeRequest(4)
    engine.capturer.cause_of_others = Origin.TRANSFERRED
    monkeypatch.setattr(plugin, "_capturer", lambda: engine.capturer)
    engine.forward([20, 21], 5, Origin.DECODE, tokens=[0, 0])
    engine.forward([22, 23], 6, Origin.DECODE, tokens=[7, 8])
    batch = TransferredBatch(engine, req, [20, 21, 22, 23])
    req.output_ids.append(0)  # the other server sampled it
    req.update_finish_state = lambda: None
    req.finished = lambda: len(req.output_ids) == num_new
    plugin._prepare_transferred(TransferredBatch.prepare_for_prebuilt, batch)
    plugin._end_transferred(TransferredBatch.process_batch_result_prebuilt, batch, batch)
    # An answer of that token alone leaves with its rows; others have none before they end.
    assert [rows_T is None for rows_T in batch.streamed] == [num_new > 1]
    for number in range(1, num_new):
        engine.decode(req, 30 + number, number)
    routes = engine.routes(req)
    assert routes.origin_T.tolist() == [Origin.TRANSFERRED] * 4 + [Origin.DECODE] * (num_new - 1)
    assert passes(routes)[4:] == list(range(1, num_new))
    assert not routes.expert_ids_TLK[:4].any()


def test_an_answer_that_is_retracted_after_a_transfer_keeps_its_rows(monkeypatch):
    """Its tokens come back, into other slots, from a copy or from the other server."""
    engine, req = FakeEngine(has_names=True), FakeRequest(3)
    engine.capturer.cause_of_others = Origin.TRANSFERRED
    monkeypatch.setattr(plugin, "_capturer", lambda: engine.capturer)
    prepare = TransferredBatch.prepare_for_prebuilt
    plugin._prepare_transferred(prepare, TransferredBatch(engine, req, [0, 1, 2]))
    req.output_ids.append(0)
    engine.decode(req, 3, 1)
    engine.decode(req, 4, 2)
    rows.keep_retracted(engine.capturer, req, engine.pool)
    engine.forward(range(5), 5, Origin.PREFILL)  # the slots change hands
    plugin._prepare_transferred(prepare, TransferredBatch(engine, req, [10, 11, 12, 13, 14]))
    engine.decode(req, 15, 3)
    routes = engine.routes(req)
    assert routes.origin_T.tolist() == [Origin.TRANSFERRED] * 3 + [Origin.DECODE] * 3
    assert passes(routes)[3:] == [1, 2, 3]


def test_the_output_of_a_request_is_shared_under_its_own_tokens():
    engine = FakeEngine(has_names=True)
    first, second = FakeRequest(2), FakeRequest(5, pool_index=1)
    engine.prefill(first, [0, 1], 1)
    first.output_ids.append(0)
    engine.decode(first, 2, 2)
    engine.decode(first, 3, 3)
    first.kv.kv_committed_len = 5  # under overlap the last token is in flight when it ends
    engine.pool.req_to_token[0, 4] = 4
    rows.name_output(engine.capturer, first, engine.pool)
    engine.forward([4], 4, Origin.DECODE)
    engine.pool.req_to_token[1, :5] = torch.arange(5)
    second.output_ids.append(0)
    routes = engine.routes(second)
    assert passes(routes) == [1, 1, 2, 3, 4]
    # The next step that writes the slot takes the name away.
    engine.forward([4], 5, Origin.DECODE)
    assert engine.routes(second).origin_T[4] == Origin.EVICTED


def test_rows_follow_keys_and_values_to_the_host_and_back():
    engine, req = FakeEngine(has_names=True), FakeRequest(4)
    engine.forward([20, 21, 22], 5, Origin.PREFILL, version=3, tokens=[0, 0, 0])
    fourth = prefixes.prefix_hashes([0] * 4, before=hash(None) % 2**64)[3]
    engine.capturer.slots.expect(23, int(fourth))
    host = HostRows(engine.capturer.slots, num_slots=8)
    host.save(np.arange(20, 24), np.array([7, 3, 1, 5]))
    engine.forward([23], 4, Origin.DECODE, version=3)  # in flight when the prefix was saved
    host.settle()
    engine.forward([20, 21, 22, 23], 2, Origin.PREFILL, tokens=[7] * 4)  # the slots change hands
    host.load(np.array([7, 3, 1, 5]), np.arange(40, 44))
    engine.pool.req_to_token[0, :4] = torch.arange(40, 44)
    req.output_ids.append(0)
    routes = engine.routes(req)
    assert passes(routes) == [5, 5, 5, 4]
    assert routes.weight_version_T.tolist() == [3] * 4
    np.testing.assert_array_equal(routes.gate_probs_TLK, np.float16(0.25))
    # What the host holds of another prefix is not this request's.
    host.load(np.array([0, 3, 1, 5]), np.arange(40, 44))
    assert engine.routes(req).origin_T.tolist() == [Origin.EVICTED, 1, 1, 2]


def test_a_chunk_that_is_saved_before_its_result_has_its_rows_on_the_host():
    """SGLang stashes a chunk in its tree when it schedules the next one, before the result."""
    engine, req = FakeEngine(has_names=True), FakeRequest(4)
    engine.forward([20, 21], 3, Origin.PREFILL, tokens=[5, 6])  # what the slots held before
    host = engine.capturer.host_rows = HostRows(engine.capturer.slots, num_slots=8)
    host.save(np.array([20, 21]), np.array([0, 1]))
    engine.prefill(req, [20, 21], 5)
    host.load(np.array([0, 1]), np.array([40, 41]))
    other = FakeRequest(3, pool_index=1)
    engine.pool.req_to_token[1, :2] = torch.tensor([40, 41])
    engine.prefill(other, [22], 1, start=2)
    other.output_ids.append(0)
    assert passes(engine.routes(other)) == [5, 5, 1]
    for _ in range(NUM_SETTLES):
        host.settle()
    assert not host._saved  # nothing is looked at for ever


def test_prefixes_are_told_apart_and_continued():
    tokens = list(range(50))
    whole_T = prefixes.prefix_hashes(tokens)
    assert len(np.unique(whole_T)) == 50
    later_T = prefixes.prefix_hashes(tokens[20:], start=20, before=int(whole_T[19]))
    np.testing.assert_array_equal(later_T, whole_T[20:])
    swapped = [*tokens[:7], tokens[8], tokens[7], *tokens[9:]]
    is_same_T = prefixes.prefix_hashes(swapped) == whole_T
    # A sum of (position, token): the two tokens at 7 and 8 give another one at each position on.
    np.testing.assert_array_equal(is_same_T, np.arange(50) < 7)
    salted, req = FakeRequest(3), FakeRequest(3)
    salted.extra_key = "adapter"
    assert (prefixes.of_request(salted) != prefixes.of_request(req)).all()


def test_a_retracted_request_keeps_the_first_pass_of_every_token():
    engine, req = FakeEngine(), FakeRequest(3)
    engine.prefill(req, [0, 1, 2], 1)
    req.output_ids.append(0)
    engine.decode(req, 3, 2)
    # In flight under overlap when the request loses its slots: its token is thrown away.
    engine.pool.req_to_token[0, 4] = 4
    engine.forward([4], 5, Origin.DECODE)
    rows.keep_retracted(engine.capturer, req, engine.pool)
    engine.prefill(req, [10, 11, 12, 13, 14], 3, version=1)
    req.output_ids.append(0)
    engine.decode(req, 15, 4, version=1)
    routes = engine.routes(req)
    # 3 prompt rows and one decode of the first life; the thrown-away position is pass 3's.
    assert passes(routes) == [1, 1, 1, 2, 3, 4]
    assert routes.weight_version_T.tolist() == [0, 0, 0, 0, 1, 1]
    assert routes.origin_T.tolist() == [1, 1, 1, 2, 1, 2]


def test_a_second_retraction_in_the_middle_of_the_second_prefill_loses_nothing():
    engine, req = FakeEngine(), FakeRequest(3)
    engine.prefill(req, [0, 1, 2], 1)
    req.output_ids.append(0)
    engine.decode(req, 3, 2)
    rows.keep_retracted(engine.capturer, req, engine.pool)
    engine.prefill(req, [10, 11], 3)  # a chunk; the slots behind it hold anything
    engine.pool.req_to_token[0, 2:5] = torch.tensor([50, 51, 52])
    rows.keep_retracted(engine.capturer, req, engine.pool)
    engine.prefill(req, [10, 11, 12, 13, 14], 4)
    req.output_ids.append(0)
    assert passes(engine.routes(req)) == [1, 1, 1, 2, 4]


def test_a_request_aborted_between_two_chunks_vouches_for_the_first_only():
    engine, req = FakeEngine(), FakeRequest(5)
    engine.forward(list(range(10, 15)), 5, Origin.PREFILL)  # what the later slots held before
    engine.pool.req_to_token[0, :5] = torch.arange(10, 15)
    engine.prefill(req, [0, 1], 1)
    routes = engine.routes(req)
    assert routes.covered_T.tolist() == [True, True, False, False]
    assert passes(routes)[:2] == [1, 1]


def test_start_cuts_kept_rows_and_slots_alike():
    engine, req = FakeEngine(), FakeRequest(4, start=3)
    engine.prefill(req, [0, 1, 2, 3], 1)
    req.output_ids.append(0)
    engine.decode(req, 9, 2)
    assert passes(engine.routes(req)) == [1, 2]


def test_levels_below_the_servers_and_stock_clients_get_what_they_asked_for():
    engine, req = FakeEngine(), FakeRequest(2, level="ids")
    engine.prefill(req, [0, 1], 1)
    req.output_ids.append(0)
    assert engine.routes(req).gate_probs_TLK is None
    req.sampling_params.custom_params = None
    stock = rows.collect(engine.capturer, req, engine.pool)
    assert stock.dtype == torch.int32
    assert stock.tolist() == [[[1, 2, 3], [1, 2, 3]]] * 2


def test_weights_are_those_of_the_pass_that_computed_the_row():
    engine, req = FakeEngine(), FakeRequest(3, level="weights")
    engine.prefill(req, [4, 5, 6], 1)
    req.output_ids.append(0)
    engine.decode(req, 7, 2)
    engine.forward([4, 5], 3, Origin.PREFILL)  # another request's pass, on this one's slots
    routes = engine.routes(req)
    assert routes.combine_weights_TLK[:, 0, 0].tolist() == [1, 1, 1, 2]
    assert routes.gate_probs_TLK is None


def test_a_router_of_unknown_weights_leaves_the_ids_of_all_layers_alone():
    engine, req = FakeEngine(), FakeRequest(2, level="weights")
    engine.prefill(req, [0, 1], 1)
    req.output_ids.append(0)
    engine.capturer.slots.values["weights"][0, 1] = np.nan
    req.routing_replay_rows = []
    routes = engine.routes(req)
    assert routes.combine_weights_TLK is None
    assert routes.covered_T.all()


def test_a_payload_without_a_layer_says_that_no_router_reports():
    engine, req = FakeEngine(), FakeRequest(2)
    engine.prefill(req, [0, 1], 1)
    req.output_ids.append(0)
    engine.capturer.layers = set()
    with pytest.raises(PayloadError, match="no router of the server's model.*transformers backend"):
        engine.routes(req)


def test_ids_and_gates_share_a_slot_without_loss():
    ids = torch.tensor([[0, 127, 32767]], dtype=torch.int32)
    gates = torch.tensor([[1.0, 2.0**-24, 0.333]])
    packed = pack(ids, gates)
    assert packed.dtype == torch.int32
    got_ids, got_gates = unpack(packed)
    assert got_ids.tolist() == ids.tolist()
    assert got_gates.tolist() == gates.half().tolist()
    # However the ids lie in memory: a column cut off, or transposed.
    wide = torch.arange(12, dtype=torch.int64).view(3, 4)
    for strided in (wide[:, :3], wide.T):
        assert unpack(pack(strided, torch.full(strided.shape, 0.5)))[0].tolist() == strided.tolist()
    assert unpack(pack(ids, None))[0].tolist() == ids.tolist()
    assert unpack(pack(ids, None))[1].isnan().all()


@pytest.mark.parametrize("function", ["softmax", "sigmoid", "sqrtsoftplus"])
def test_gates_are_the_scores_over_the_sum_of_all_scores(function):
    logits_TE = torch.randn(5, NUM_EXPERTS, generator=torch.Generator().manual_seed(1))
    scores_TE = {
        "softmax": logits_TE.exp(),
        "sigmoid": 1 / (1 + (-logits_TE).exp()),
        "sqrtsoftplus": (1 + logits_TE.exp()).log().sqrt(),
    }[function]
    ids_TK = logits_TE.topk(TOP_K).indices
    expected_TK = scores_TE.gather(1, ids_TK) / scores_TE.sum(1, keepdim=True)
    torch.testing.assert_close(gate_probs(logits_TE, ids_TK, function), expected_TK)
    # A padded row may hold any id; it must not end the process.
    assert gate_probs(logits_TE, ids_TK - 9, function).isfinite().all()


def test_the_score_function_is_the_routers_not_the_configurations():
    def config(**values):
        defaults = {"custom_routing_function": None, "use_grouped_topk": False}
        return SimpleNamespace(
            **defaults | {"correction_bias": None, "scoring_func": "softmax"} | values
        )

    assert score_function(config()) == "softmax"
    assert score_function(config(use_grouped_topk=True, correction_bias=1)) == "sigmoid"
    assert score_function(config(custom_routing_function=print)) is None


def test_the_ring_of_logits_forgets_overwritten_slots_and_its_oldest():
    sampler = LogitSampler((4, 1, 2), num_slots=8, fraction=0.5, device="cpu")
    assert len(sampler.ring_RLE) == 6  # half of 8 slots, and half as many again

    def keep(slots, sampled, value):
        values = np.full((len(sampled), 1, 2), value, np.float32)
        sampler.keep(np.array(slots), np.array(sampled, np.int64), values)

    def known():
        logits = sampler.of_slots(np.arange(8))
        values = logits.values_NLE[:, 0, 0].tolist()
        return dict(zip(logits.rows_N.tolist(), values, strict=True))

    keep([0, 1, 2, 3], [0, 1, 2, 3], 1.0)
    keep([2], [], 2.0)  # written again, not sampled
    assert known() == {0: 1.0, 1: 1.0, 3: 1.0}
    keep([4, 5, 6], [0, 1, 2], 3.0)  # two free entries, then the oldest: slot 0's
    assert known() == {1: 1.0, 3: 1.0, 4: 3.0, 5: 3.0, 6: 3.0}


def test_the_hooks_of_each_version_generation():
    old, new = versions.targets_of((0, 5, 12)), versions.targets_of((0, 5, 13))
    assert old.release.endswith("ScheduleBatch.release_req")
    assert old.output is not None and new.output is None
    assert versions.targets_of((0, 5, 18)).rename is None
    assert versions.targets_of((0, 5, 19)).rename is not None


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ({"pp_size": 1, "speculative_algorithm": None}, []),
        ({"enable_hierarchical_cache": True}, ["write", "load"]),
        ({"speculative_algorithm": "EAGLE"}, ["move_accept_tokens_to_target_kvcache"]),
        (
            {"speculative_algorithm": "NGRAM"},
            ["move_accept_tokens_to_target_kvcache", "forward_batch_generation"],
        ),
        (
            {"disaggregation_mode": "decode"},
            [
                "process_batch_result_disagg_prefill",
                "prepare_for_prebuilt",
                "process_batch_result_prebuilt",
            ],
        ),
        ({"pp_size": 2}, ["_pp_launch_batch", "_pp_prepare_tensor_dict", "_pp_prep_batch_result"]),
    ],
)
def test_only_the_features_of_a_server_are_hooked(arguments, names):
    server_args = SimpleNamespace(**arguments)
    hooked = versions.targets_of((0, 5, 23)).of_features(server_args)
    assert [name.rsplit(".", 1)[1] for name in hooked] == names
    # Older versions have none of them: such servers are refused.
    assert versions.targets_of((0, 5, 22)).of_features(server_args) == []


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("0.5.10.post1+cu130", (0, 5, 10)),
        ("0.5.12rc1", (0, 5, 12)),
        ("0.5.24.dev7+g0123abc", (0, 5, 24)),
    ],
)
def test_a_version_counts_as_its_release(text, numbers):
    assert versions.parse(text) == numbers


def test_what_is_no_version_is_an_error():
    with pytest.raises(ServerError, match="version of SGLang is not a version; got 'main'"):
        versions.parse("main")


def test_the_installed_sglang_has_everything_that_is_hooked():
    pytest.importorskip("sglang")
    from routing_replay.sglang.sources import check_sources

    root = Path(metadata.distribution("sglang").locate_file(""))
    assert check_sources(root, versions.parse(metadata.version("sglang"))) == []


def test_a_hook_that_sglang_only_logs_as_failed_stops_the_server():
    pytest.importorskip("sglang")
    target = "sglang.srt.managers.nowhere.function"
    with pytest.raises(ServerError, match=f"could not be hooked.*missing {target}"):
        versions.check_hooks([target])


def test_a_source_without_a_hooked_name_is_reported(tmp_path):
    from routing_replay.sglang.sources import check_sources

    problems = check_sources(tmp_path, (0, 5, 23))
    assert "layers.moe.topk._post_process_topk_ids does not exist" in problems


def test_a_call_site_that_hides_the_logits_is_reported(tmp_path):
    from routing_replay.sglang.sources import check_sources

    router = tmp_path / "sglang/srt/layers/moe/topk.py"
    router.parent.mkdir(parents=True)
    parameters = "topk_ids, topk_weights, topk_config, router_logits, layer_id"
    function = f"def _post_process_topk_ids({parameters}): ..."
    good = "_post_process_topk_ids(ids, weights, config, logits, 0)"
    router.write_text(f"{function}\n{good}\n_post_process_topk_ids(*arguments)\n")
    (tmp_path / "sglang/srt/model.py").write_text("_post_process_topk_ids(ids, topk_config=c)")
    problems = [p for p in check_sources(tmp_path, (0, 5, 23)) if " calls " in p]
    name = "calls _post_process_topk_ids without"
    assert problems == [
        f"layers/moe/topk.py:3 {name} router_logits, topk_config, topk_weights",
        f"model.py:1 {name} router_logits, topk_weights",
    ]


def test_rows_of_which_a_router_told_no_logits_are_left_out_of_the_sample():
    engine, req = FakeEngine(), FakeRequest(3, level="logits")
    shape = (64, NUM_LAYERS, NUM_EXPERTS)
    engine.capturer.slots.sampler = LogitSampler(shape, 64, 1.0, "cpu")
    engine.prefill(req, [0, 1, 2], 1)
    req.output_ids.append(0)
    values_NLE = np.ones((3, NUM_LAYERS, NUM_EXPERTS), np.float32)
    values_NLE[1, 0] = np.nan
    slots, rows_N = np.array([0, 1, 2]), np.arange(3)
    engine.capturer.slots.sampler.keep(slots, rows_N, values_NLE)
    assert engine.routes(req).router_logits.rows_N.tolist() == [0, 2]
