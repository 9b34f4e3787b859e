"""The installed frameworks are as the adapters expect them; a difference is one line."""

import ast
import importlib.machinery
import inspect
import sys
from pathlib import Path

import checkouts
import pytest

from routing_replay.adapters import contracts, seams

# Calls that the adapters count on: function, and what it must say.
VERL = "verl/workers/engine/megatron/transformer_impl.py"
WORKER = "verl/workers/engine_workers.py"
SKYRL = "skyrl/backends/skyrl_train/workers/megatron/megatron_model_wrapper.py"
CALLS = [
    ("verl/__init__.py", "", "_ep.load()"),
    (VERL, "MegatronEngine.forward_backward_batch", "prepare_micro_batches(data=data"),
    (VERL, "MegatronEngine.forward_backward_batch", "partial(self.forward_step"),
    (VERL, "MegatronEngineWithLMHead.forward_step", "batch: TensorDict = next(batch_iter)"),
    (VERL, "MegatronEngineWithLMHead.forward_step", "forward_fn(model, input_ids"),
    (WORKER, "TrainingWorker.infer_batch", "self.engine.disable_adapter() if no_lora_adapter"),
    (WORKER, "TrainingWorker.train_mini_batch", "list(chain.from_iterable(val))"),
    ("verl/trainer/ppo/v1/trainer_base.py", "", "rename_dict(output['metrics'], 'actor/')"),
    ("verl/workers/utils/losses.py", "ppo_loss", "rollout_is_weights=rollout_is_weights"),
    (SKYRL, "MegatronModelWrapper.forward", "setup_per_microbatch_replay_forward("),
    (SKYRL, "MegatronModelWrapper.forward", "with router_replay_schedule(replay_enabled):"),
    (SKYRL, "MegatronModelWrapper.forward", "make_batch_generator(micro_batches"),
    (
        SKYRL,
        "MegatronModelWrapper.forward_backward_mini_batch",
        "batch.pop('rollout_expert_indices'",
    ),
    (SKYRL, "MegatronModelWrapper.forward_backward_mini_batch", "metadata_layout=metadata_layout"),
    *(
        (f"{name}/backends/megatron_utils/{file}", function, call)
        for name in ("slime", "miles")
        for file, function, call in (
            ("initialize.py", "init", "load_function(args.custom_megatron_init_path)"),
            ("model.py", "forward_only", "get_forward_backward_func()"),
            ("model.py", "train_one_step", "get_forward_backward_func()"),
            ("actor.py", "MegatronTrainRayActor.compute_log_prob", "store_prefix=store_prefix"),
        )
    ),
    (
        "nemo_rl/models/megatron/train.py",
        "forward_with_post_processing_fn",
        "set_router_replay_forward(model, routed_experts_cp_sharded)",
    ),
    (
        "nemo_rl/models/megatron/train.py",
        "megatron_forward_backward",
        "use_router_replay=use_router_replay",
    ),
    (
        "nemo_rl/models/policy/workers/megatron_policy_worker.py",
        "",
        "requires routed_experts for",
    ),
]


def folders_of(package):
    """Where a package lies: a checkout for what no package index has."""
    return [checkouts.checkout_of(package)] if package in checkouts.VARIABLES else sys.path


@pytest.mark.parametrize("name", contracts.FRAMEWORKS)
def test_a_frameworks_names_and_signatures_are_as_the_adapter_expects(name):
    entry = contracts.framework(name)
    assert list(seams.compare(entry, folders_of(entry.package))) == []


@pytest.mark.parametrize(("path", "function", "call"), CALLS)
def test_a_framework_calls_what_the_adapter_counts_on(path, function, call):
    package, _, rest = path.partition("/")
    spec = importlib.machinery.PathFinder.find_spec(package, folders_of(package))
    assert spec is not None and spec.origin is not None, f"{package} is not installed"
    tree = ast.parse((Path(spec.origin).parent / rest).read_text())
    for name in function.split(".") if function else ():
        found = [n for n in tree.body if getattr(n, "name", None) == name]
        assert found, f"{path}: {function} does not exist"
        tree = found[-1]
    text = ast.unparse(tree)
    assert inspect.cleandoc(call) in text, f"{path}: {function} no longer says {call}"
