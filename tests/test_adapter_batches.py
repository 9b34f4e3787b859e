"""What adapters share and no engine is needed for: forms of routes, numbers, R2's memory, flags."""

import base64
import sys
import types

import numpy as np
import pytest
import torch

from routing_replay.adapters.batch import RecordedRoutes, StepBatch
from routing_replay.adapters.patches import after_import, rebind
from routing_replay.adapters.routes import of_nested, of_packed, of_padded, routes_of
from routing_replay.adapters.settings import AdapterSettings
from routing_replay.errors import (
    ConfigError,
    PayloadError,
    PreflightError,
    ReplayError,
    RoutesError,
)
from routing_replay.routes.origin import Origin, num_uncovered
from routing_replay.routes.payload import encode
from routing_replay.routes.routes import Routes
from routing_replay.routes.shape import MoEShape
from routing_replay.routes.table import RouteTable

SHAPE = MoEShape(layers=(1, 2), num_experts=8, top_k=2)
TOKENS = [[5, 6, 7, 8], [9, 4], [5, 3, 2]]  # 3 + 1 + 2 rows


def random_ids(num_rows: int, seed: int = 0) -> np.ndarray:
    scores = np.random.default_rng(seed).random((num_rows, 2, 8))
    return np.argsort(scores, -1)[..., :2].astype(np.int32)


def recorded(tokens, ids) -> RouteTable:
    """A table as R2 records it: of source training, with a row for each token but the last."""
    routes = [routes_of(one, len(t), SHAPE) for one, t in zip(ids, tokens, strict=True)]
    return RouteTable.from_routes(routes, "training")


class TestForms:
    IDS = [random_ids(len(tokens), seed) for seed, tokens in enumerate(TOKENS)]

    def check(self, routed):
        table = StepBatch(TOKENS, routed).table(SHAPE)
        expected = np.concatenate([ids[:-1] for ids in self.IDS]).swapaxes(0, 1)
        assert (table.expert_ids_LTK == expected).all()
        assert table.covered_T.all() and table.offsets_S1.tolist() == [0, 3, 4, 6]

    def test_arrays_of_the_routed_layers(self):
        self.check(self.IDS)

    def test_tensors_of_all_layers(self):
        self.check([torch.from_numpy(np.pad(ids, ((0, 0), (1, 0), (0, 0)))) for ids in self.IDS])

    def test_a_jagged_tensor(self):
        parts = [torch.from_numpy(ids) for ids in self.IDS]
        self.check(of_nested(torch.nested.as_nested_tensor(parts, layout=torch.jagged)))

    def test_a_batch_padded_on_either_side(self):
        values_BS, mask_BS = np.zeros((3, 5, 2, 2), np.int32), np.zeros((3, 5))
        for b, (ids, start) in enumerate(zip(self.IDS, (1, 0, 2), strict=True)):
            values_BS[b, start : start + len(ids)] = ids
            mask_BS[b, start : start + len(ids)] = 1
        self.check(of_padded(torch.from_numpy(values_BS), torch.from_numpy(mask_BS)))

    def test_a_packed_batch(self):
        self.check(of_packed(np.concatenate(self.IDS), torch.tensor([0, 4, 6, 9])))

    def test_payloads_of_sglang(self):
        texts = [base64.b64encode(np.pad(ids[:-1], ((0, 0), (1, 0), (0, 0)))) for ids in self.IDS]
        compact = base64.b64encode(encode(routes_of(self.IDS[1], 2, SHAPE)))
        self.check([text.decode() for text in [texts[0], compact, texts[2]]])

    def test_missing_rows_are_not_covered(self):
        ids = random_ids(4)
        ids[1, 0, 1] = ids[2] = 255
        routes = routes_of(ids.astype(np.uint8), 5, SHAPE, missing=255)
        assert routes.covered_T.tolist() == [True, False, False, True]
        zeros = random_ids(4)
        zeros[2:] = 0  # how several frameworks fill what the engine did not send
        assert routes_of(zeros, 5, SHAPE).covered_T.tolist() == [True, True, False, False]

    def test_routes_of_fewer_tokens_leave_the_other_rows_uncovered(self):
        routes = routes_of(random_ids(2), 5, SHAPE)
        assert num_uncovered([routes]) == {"not_captured": 2}
        assert routes.covered_T.tolist() == [True, True, False, False]

    def test_routes_of_fewer_tokens_keep_causes_versions_and_gates(self):
        short = Routes(
            expert_ids_TLK=np.where([[[False]], [[True]]], random_ids(2), 0).astype(np.uint8),
            layers=SHAPE.layers,
            num_experts=8,
            covered_T=np.array([False, True]),
            origin_T=np.array([Origin.EVICTED, Origin.DECODE], np.uint8),
            weight_version_T=np.array([-1, 3]),
            gate_probs_TLK=np.full((2, 2, 2), [[[0]], [[0.25]]], np.float16),
        )
        routes = routes_of(short, 5, SHAPE)
        assert num_uncovered([routes]) == {"evicted": 1, "not_captured": 2}
        assert routes.weight_version_T.tolist() == [-1, 3, -1, -1]
        assert routes.gate_probs_TLK[:2].tolist() == short.gate_probs_TLK.tolist()

    def test_routes_of_more_tokens_are_refused(self):
        with pytest.raises(RoutesError, match="belong to other tokens"):
            routes_of(random_ids(5), 4, SHAPE)

    def test_routes_of_another_model_are_refused(self):
        with pytest.raises(PayloadError, match="out of range"):
            routes_of(random_ids(3) + 8, 4, SHAPE)
        with pytest.raises(PayloadError, match="another number of layers"):
            routes_of(random_ids(3)[:, :1], 4, SHAPE)

    def test_tokens_and_routes_that_were_filtered_apart_are_refused(self):
        with pytest.raises(RoutesError, match="different numbers of sequences"):
            StepBatch(TOKENS, self.IDS[:2])

    def test_a_batch_without_routes_is_refused(self):
        with pytest.raises(ReplayError, match="no routes"):
            StepBatch(TOKENS).table(SHAPE)


def test_numbers_are_rows_plus_one_and_the_last_token_is_padding():
    numbers = StepBatch([torch.tensor(t) for t in TOKENS]).numbers()
    assert [n.tolist() for n in numbers] == [[1, 2, 3, 0], [4, 0], [5, 6, 0]]


class TestRecordedRoutes:
    def test_mini_batches_find_their_sequences_in_any_order(self):
        ids = [random_ids(len(t) - 1, seed) for seed, t in enumerate(TOKENS)]
        memory = RecordedRoutes()
        memory.add(recorded(TOKENS[:2], ids[:2]), [np.array(t) for t in TOKENS[:2]])
        memory.add(recorded(TOKENS[2:], ids[2:]), [np.array(t) for t in TOKENS[2:]])
        for order in ([2, 0], [1]):
            table = memory.table(StepBatch([TOKENS[i] for i in order]))
            expected = np.concatenate([ids[i] for i in order]).swapaxes(0, 1)
            assert table.source == "training" and table.covered_T.all()
            assert (table.expert_ids_LTK == expected).all()

    def test_a_pass_over_a_part_of_a_batch_adds_that_part(self):
        ids = [random_ids(len(t) - 1, seed) for seed, t in enumerate(TOKENS)]
        first, second = recorded(TOKENS, ids), recorded(TOKENS, ids)
        first.covered_T[3:], second.covered_T[:3] = False, False
        memory = RecordedRoutes()
        for part in (first, second):
            memory.add(part, [np.array(t) for t in TOKENS])
        assert memory.table(StepBatch(TOKENS)).covered_T.all()

    def test_a_pass_after_an_update_starts_anew(self):
        memory, old, new = RecordedRoutes(), random_ids(3, 1), random_ids(3, 2)
        for ids in (old, new):
            memory.add(recorded(TOKENS[:1], [ids]), [np.array(TOKENS[0])])
            table = memory.table(StepBatch(TOKENS[:1]))
            assert table.covered_T.all() and (table.expert_ids_LTK == ids.swapaxes(0, 1)).all()

    def test_equal_sequences_share_the_rows_on_which_they_agree(self):
        first, second = random_ids(3, 1), random_ids(3, 1)
        second[1] = (first[1] + 1) % 8
        memory = RecordedRoutes()
        memory.add(recorded([TOKENS[0]] * 2, [first, second]), [np.array(TOKENS[0])] * 2)
        table = memory.table(StepBatch([TOKENS[0]]))
        assert table.covered_T.tolist() == [True, False, True]

    def test_an_update_without_recording_and_one_of_other_tokens_are_refused(self):
        memory = RecordedRoutes()
        with pytest.raises(ReplayError, match="no pass of the old policy"):
            memory.table(StepBatch(TOKENS))
        memory.add(recorded(TOKENS[:1], [random_ids(3)]), [np.array(TOKENS[0])])
        with pytest.raises(ReplayError, match="was not in the old policy's pass"):
            memory.table(StepBatch([[5, 6, 7, 9, 1]]))


class TestSettings:
    def test_keys_of_a_configuration_win_over_variables(self):
        settings = AdapterSettings.from_mapping(
            {"routing_replay_mode": "R2", "lr": 1, "routing_replay_agreement_every": 3},
            {"ROUTING_REPLAY_MODE": "R3", "ROUTING_REPLAY_AGREEMENT_TOKENS": "7"},
        )
        assert (settings.mode, settings.agreement_every, settings.agreement_tokens) == ("R2", 3, 7)
        assert settings.replay_config.mode == "R2"

    def test_an_adapter_that_loads_unasked_is_off(self):
        assert not AdapterSettings.from_environment({}, mode="disabled").is_enabled
        asked = AdapterSettings.from_environment({"ROUTING_REPLAY_MODE": "R3"}, mode="disabled")
        assert asked.is_enabled

    def test_unknown_names_are_refused_with_the_nearest(self):
        with pytest.raises(ConfigError, match="Did you mean 'routing_replay_mode'"):
            AdapterSettings.from_mapping({"routing_replay_modes": "R3"}, {})
        with pytest.raises(ConfigError, match="Did you mean 'R3'"):
            AdapterSettings(mode="r3")
        with pytest.raises(ConfigError, match="max_uncovered is out of range"):
            AdapterSettings(max_uncovered=1.5)
        with pytest.raises(ConfigError, match="max_uncovered is not a number.*got '5%'"):
            AdapterSettings.from_environment({"ROUTING_REPLAY_MAX_UNCOVERED": "5%"})
        asked, _ = AdapterSettings.from_arguments(["--routing-replay-max-uncovered", "0.05"], {})
        assert asked.max_uncovered == 0.05

    @pytest.mark.parametrize(("mode", "message"), [("R2", "old-policy pass"), ("R3", "no routes")])
    def test_a_loop_without_rollouts_needs_a_file(self, mode, message):
        with pytest.raises(ConfigError, match=message):
            AdapterSettings(mode=mode).require_routes_file()


class TestPatches:
    def module(self):
        module = types.ModuleType("framework.train")
        module.step = lambda batch, model: ("stock", batch)
        return module

    def test_a_function_is_replaced_once_and_calls_the_stock_one(self):
        module = self.module()
        for _ in range(2):
            rebind(module, "step", lambda stock: lambda *a: ("ours", stock(*a)), ("model",))
        assert module.step(1, 2) == ("ours", ("stock", 1))

    def test_another_signature_is_refused_with_both_texts(self):
        with pytest.raises(PreflightError, match=r"the parameters data.*got \(batch, model\)"):
            rebind(self.module(), "step", lambda stock: stock, ("data",))
        with pytest.raises(PreflightError, match=r"framework\.train\.run.*no run"):
            rebind(self.module(), "run", lambda stock: stock)

    def test_a_module_is_patched_after_its_import_and_not_before(self, tmp_path, monkeypatch):
        (tmp_path / "patched_module.py").write_text("value = 1\n")
        monkeypatch.syspath_prepend(tmp_path)
        after_import("patched_module", lambda module: setattr(module, "value", module.value + 1))
        assert "patched_module" not in sys.modules
        import patched_module

        assert patched_module.value == 2
