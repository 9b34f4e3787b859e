"""The adapters of slime, miles and NeMo-RL on modules with their signatures: what they rebind.

Their own code runs in tests/frameworks, against checkouts.
"""

import copy
import functools
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from recipes.model import cpu  # noqa: F401  (makes Megatron importable)
from routing_replay.adapters import contracts, nemo_rl, slime
from routing_replay.errors import ConfigError, ReplayError

ROUTES = [torch.tensor([[[0, 1]], [[2, 3]]]), torch.tensor([[[1, 2]]])]
TOKENS = [torch.tensor([5, 6, 7]), torch.tensor([8, 9])]


class Iterator:
    """Their DataIterator: microbatches by index."""

    def __init__(self, rollout_data, micro_batch_indices):
        self.rollout_data = rollout_data
        self.micro_batch_indices = micro_batch_indices
        self.offset = 0

    def get_next(self, keys):
        indices = self.micro_batch_indices[self.offset]
        self.offset += 1
        return {key: [self.rollout_data[key][i] for i in indices] for key in keys}


def get_batch(data_iterator, keys, pad_multiplier=128, allgather_cp=False):
    """Their get_batch in short: concatenated, padded with 0."""
    tokens = torch.cat(data_iterator.get_next(["tokens"])["tokens"])
    padding = -len(tokens) % pad_multiplier
    return {"tokens": torch.nn.functional.pad(tokens, (0, padding))[None]}


def forward_only(f, args, model, data_iterator, num_microbatches, store_prefix=""):
    return model[0].trainer_calls.append(store_prefix)


@pytest.fixture
def package(monkeypatch):
    """A package slime of four modules; its logger keeps what it gets."""
    logged = []
    backend = "slime.backends.megatron_utils"
    modules = {
        f"{backend}.model": {
            "get_batch": get_batch,
            "get_forward_backward_func": lambda *_: None,
        },
        f"{backend}.actor": {"forward_only": forward_only},
        f"{backend}.initialize": {},
        "slime.observability.logging_utils": {
            "log": lambda args, metrics, step_key: logged.append((step_key, metrics))
        },
    }
    for name, names in modules.items():
        module = ModuleType(name)
        module.__dict__.update(names)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(contracts, "require", lambda name: None)
    monkeypatch.setenv("ENABLE_ROUTING_REPLAY", "1")
    return SimpleNamespace(
        actor=sys.modules[f"{backend}.actor"],
        model=sys.modules[f"{backend}.model"],
        logging=sys.modules["slime.observability.logging_utils"],
        logged=logged,
    )


def arguments(**changes):
    values = {
        "use_rollout_routing_replay": True,
        "use_routing_replay": True,
        "data_pad_size_multiplier": 4,
        "allgather_cp": False,
    }
    return SimpleNamespace(**values | changes)


def trainer_of(args):
    return slime._Trainer("slime", args, slime.AdapterSettings(mode="R3"))


def call(iterator, role="actor", forward_only=True):
    chunk = SimpleNamespace(role=role, trainer_calls=[])
    return SimpleNamespace(data_iterator=[iterator], chunks=[chunk], forward_only=forward_only)


def rollout():
    return Iterator({"tokens": TOKENS, "rollout_routed_experts": ROUTES}, [[1], [0, 1]])


def test_their_own_replay_is_switched_off_in_the_trainer(package, monkeypatch):
    args = arguments()
    slime.init(args)
    assert not args.use_rollout_routing_replay and not args.use_routing_replay
    assert slime.os.environ["ENABLE_ROUTING_REPLAY"] == "0"


@pytest.mark.parametrize(
    ("flags", "mode"),
    [
        ({}, "R3"),
        ({"use_rollout_routing_replay": False}, "R2"),
        ({"routing_replay_mode": "R2"}, "R2"),
    ],
)
def test_their_flags_and_the_configuration_choose_the_mode(package, monkeypatch, flags, mode):
    modes = []
    monkeypatch.setattr(slime, "_Trainer", lambda *passed: modes.append(passed[2].mode))
    slime.init(arguments(**flags))
    assert modes == [mode]


def test_a_disabled_adapter_leaves_their_replay_on(package):
    args = arguments(routing_replay_mode="disabled")
    slime.init(args)
    assert args.use_rollout_routing_replay and package.actor.forward_only is forward_only


def test_an_adapter_without_a_replay_flag_is_refused(package):
    args = arguments(use_rollout_routing_replay=False, use_routing_replay=False)
    with pytest.raises(ConfigError, match="the adapter is loaded, and no replay is asked for"):
        slime.init(args)


def test_only_the_actors_passes_replay(package):
    trainer, iterator = trainer_of(arguments()), rollout()
    assert trainer._batch_of(call(iterator)) is not None
    assert trainer._batch_of(call(iterator, role="critic")) is None
    seen = []
    stock = lambda *passed, store_prefix="": seen.append(trainer._batch_of(call(iterator)))  # noqa: E731
    ours = trainer._forward_only(stock)
    ours(store_prefix="ref_")
    ours(store_prefix="teacher_")
    ours(store_prefix="")
    assert [batch is None for batch in seen] == [True, True, False]


def test_a_reference_pass_that_fails_does_not_silence_the_actor(package):
    trainer = trainer_of(arguments())

    def fails(*passed, store_prefix):
        raise ValueError

    with pytest.raises(ValueError):
        trainer._forward_only(fails)(store_prefix="ref_")
    assert trainer._batch_of(call(rollout())) is not None


def test_the_passes_of_a_rollout_share_one_batch_and_the_next_has_its_own(package):
    trainer, first, second = trainer_of(arguments()), rollout(), rollout()
    batch = trainer._batch_of(call(first))
    assert trainer._batch_of(call(first, forward_only=False)) is batch
    assert trainer._batch_of(call(second)) is not batch
    assert batch.lengths == [3, 2] and batch.routed is ROUTES


def test_row_numbers_are_laid_out_as_tokens_and_the_iterator_stays(package):
    trainer, iterator = trainer_of(arguments()), rollout()
    numbers = trainer._batch_of(call(iterator)).numbers()
    # Rows 0, 1 of the first sequence and 2 of the second, plus 1; the last tokens and padding: 0.
    assert trainer._lay_out(iterator, numbers).tolist() == [[3, 0, 0, 0]]
    assert iterator.offset == 0 and iterator.rollout_data["tokens"] is TOKENS
    iterator.offset = 1
    assert trainer._lay_out(iterator, numbers).tolist() == [[1, 2, 0, 3, 0, 0, 0, 0]]


def test_metrics_of_an_update_go_with_their_own(package):
    trainer = trainer_of(arguments())
    trainer.job.metrics = {"routing_replay/coverage": 0.5}
    package.logging.log(None, {"train/loss": 1.0}, step_key="train/step")
    package.logging.log(None, {"rollout/reward": 1.0}, step_key="rollout/step")
    assert package.logged == [
        ("train/step", {"train/loss": 1.0, "train/routing_replay/coverage": 0.5}),
        ("rollout/step", {"rollout/reward": 1.0}),
    ]


def test_a_compact_sample_holds_one_byte_a_slot():
    sample = SimpleNamespace(rollout_routed_experts=ROUTES[0].int())
    compact = functools.partial(slime.compact, rollout_id=0, evaluation=False)
    few, many = SimpleNamespace(num_experts=256), SimpleNamespace(num_experts=257)
    assert compact(many, copy.copy(sample)).rollout_routed_experts.dtype == torch.int32
    routes = compact(few, sample).rollout_routed_experts
    assert routes.dtype == torch.uint8 and torch.equal(routes, ROUTES[0].to(torch.uint8))
    assert compact(few, SimpleNamespace(rollout_routed_experts=None)) is not None


@pytest.fixture
def worker(monkeypatch):
    monkeypatch.setattr(contracts, "require", lambda name: None)
    monkeypatch.setenv("ROUTING_REPLAY_MODE", "R3")
    return nemo_rl._Worker()


def padded_batch():
    routed = torch.full((2, 4, 1, 2), -1, dtype=torch.int8)
    ids = torch.zeros(2, 4, dtype=torch.int64)
    for row, (tokens, experts) in enumerate(zip(TOKENS, ROUTES, strict=True)):
        ids[row, : len(tokens)] = tokens
        routed[row, : len(experts)] = experts
    return {"input_ids": ids, "input_lengths": torch.tensor([3, 2]), "routed_experts": routed}


def test_nemo_rl_gets_row_numbers_in_place_of_routes(worker):
    data = padded_batch()
    taken = worker.take_routes(lambda data, *rest: data)(data, "cfg", 2)
    assert taken["routed_experts"].shape == (2, 4, 1, 1)
    assert taken["routed_experts"][..., 0, 0].tolist() == [[1, 2, 0, 0], [3, 0, 0, 0]]
    assert data["routed_experts"].shape == (2, 4, 1, 2)
    assert worker._batch.lengths == [3, 2] and worker._batch.missing == -1


def test_nemo_rls_reference_passes_stay_stock(worker):
    worker.take_routes(lambda data: data)(padded_batch())
    step = functools.partial(print, use_router_replay=True)
    assert worker.batch_of(SimpleNamespace(forward_step_func=step)) is worker._batch
    step = functools.partial(print, use_router_replay=False)
    assert worker.batch_of(SimpleNamespace(forward_step_func=step)) is None
    assert worker.batch_of(SimpleNamespace(forward_step_func=print)) is None


def test_a_replaying_pass_of_nemo_rl_without_routes_is_an_error(worker):
    data = padded_batch()
    del data["routed_experts"]
    worker.take_routes(lambda data: data)(padded_batch())
    worker.take_routes(lambda data: data)(data)
    step = functools.partial(print, use_router_replay=True)
    with pytest.raises(ReplayError, match="a batch of the actor has no routes"):
        worker.batch_of(SimpleNamespace(forward_step_func=step))


def test_nemo_rls_own_replay_is_replaced_by_an_announcement(monkeypatch, worker):
    entered = []
    worker.job = SimpleNamespace(enter=lambda numbers: entered.append(numbers.tolist()))
    monkeypatch.setattr(nemo_rl, "_worker", lambda: worker)
    module = ModuleType("nemo_rl.models.megatron.train")
    module.get_forward_backward_func = lambda: None
    module.set_router_replay_forward = lambda model, routed_experts: entered.append("stock")
    module.set_router_replay_backward = lambda model: entered.append("stock")
    module.clear_router_replay = lambda model=None: entered.append("stock")
    nemo_rl.patch_train(module)
    module.set_router_replay_forward(None, torch.tensor([[[[1]], [[0]]]]))
    module.set_router_replay_backward(None)
    module.clear_router_replay()
    assert entered == [[[1, 0]]]


def test_nemo_rl_without_our_mode_is_left_alone(monkeypatch):
    monkeypatch.delenv("ROUTING_REPLAY_MODE", raising=False)
    module = ModuleType("nemo_rl.models.policy.workers.megatron_policy_worker")
    module.get_microbatch_iterator = stock = lambda data: data
    nemo_rl.patch_worker(module)
    assert module.get_microbatch_iterator is stock
