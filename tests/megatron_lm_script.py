"""A user's training script on megatron.training, 0.17 to 0.19, which knows nothing of adapters.

    python -m torch.distributed.run ... megatron_lm_script.py --witness FOLDER FLAGS OF MEGATRON

`--packed` packs each sample as two segments; `--own-loop TABLE` replays without an adapter.
"""

from __future__ import annotations

import argparse
import inspect
import sys
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import megatron_lm_on_cpu  # isort: skip
import loop_witness
import megatron_lm_spec
from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDatasetConfig, MockGPTDataset
from megatron.core.enums import ModelType
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.utils import get_batch_on_this_cp_rank
from megatron.training import get_args, pretrain, training


def datasets(sizes, vp_stage=None):
    args = get_args()
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=None,
        blend_per_split=None,
        split="90,5,5",
        tokenizer=build_tokenizer(args),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    return BlendedMegatronDatasetBuilder(MockGPTDataset, sizes, lambda *a: True, config).build()


datasets.is_distributed = True


def get_batch(iterator, vp_stage, batches):
    """The chunk's batch: nothing on the middle stages, as in Megatron's pretrain_gpt.py."""
    is_first = mpu.is_pipeline_first_stage(ignore_virtual=vp_stage is None, vp_stage=vp_stage)
    is_last = mpu.is_pipeline_last_stage(ignore_virtual=vp_stage is None, vp_stage=vp_stage)
    if not (is_first or is_last):
        return None
    batch = next(iterator)
    if is_first:
        batches.append(batch["tokens"])
    if mpu.get_context_parallel_world_size() > 1:
        return get_batch_on_this_cp_rank(batch, is_hybrid_cp=False)
    return batch


def packed(tokens):
    """Two segments of a line of tokens."""
    length = tokens.shape[1]
    bounds = torch.tensor([0, length // 2, length], dtype=torch.int32)
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        max_seqlen_q=length // 2,
        max_seqlen_kv=length // 2,
    )


def forward_step(witness, options, own_loop, iterator, model):
    from megatron.core.utils import get_attr_wrapped_model

    whole: list[torch.Tensor] = []
    batch = get_batch(iterator, get_attr_wrapped_model(model, "vp_stage"), whole)
    witness.begin(model, whole[0] if whole else None)
    if batch is None:
        return model(None, None, None, labels=None), partial(witness.loss, model.training, None)
    named = {"labels": batch["labels"]}
    if options.packed:
        named["packed_seq_params"] = packed(batch["tokens"])
    call = model if own_loop is None else partial(own_loop.forward, model)
    output = call(batch["tokens"], batch["position_ids"], None, **named)
    return output, partial(witness.loss, model.training, batch["loss_mask"])


def provider(pre_process=True, post_process=True, vp_stage=None, config=None, pg_collection=None):
    """The model as scripts of 0.17 and 0.18 build it."""
    from megatron.core.models.gpt import GPTModel
    from megatron.training.arguments import core_transformer_config_from_args

    args = get_args()
    config = config or core_transformer_config_from_args(args)
    return GPTModel(
        config=config,
        transformer_layer_spec=megatron_lm_spec.layer_spec(config, vp_stage),
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        pre_process=pre_process,
        post_process=post_process,
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
        vp_stage=vp_stage,
    )


def draw_routers_alike() -> None:
    """Give routers the same first weights under every layout.

    Megatron draws them from the process's own generator: under context parallelism they are others
    than on one rank, while all other weights are the same.
    """
    stock = TopKRouter.reset_parameters

    def reset_parameters(router):
        state = torch.get_rng_state()
        torch.default_generator.manual_seed(1)
        stock(router)
        torch.set_rng_state(state)

    TopKRouter.reset_parameters = reset_parameters


def train(step) -> None:
    """Call pretrain as each version wants it."""
    names = inspect.signature(pretrain).parameters
    defaults = {"tokenizer_type": "NullTokenizer"}
    if "cfg_container" not in names:
        pretrain(datasets, provider, ModelType.encoder_or_decoder, step, args_defaults=defaults)
        return
    from megatron.training import argument_utils
    from megatron.training.arguments import parse_and_validate_args

    args = parse_and_validate_args(args_defaults=defaults)
    make = argument_utils.pretrain_cfg_container_from_args
    if list(names)[2] == "model_provider":  # 0.18
        pretrain(make(args), datasets, provider, ModelType.encoder_or_decoder, step)
        return
    config = make(args, argument_utils.gpt_config_from_args(args))
    pretrain(config, datasets, ModelType.encoder_or_decoder, step)


def main() -> None:
    megatron_lm_on_cpu.allow_no_cuda()
    draw_routers_alike()
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--witness")
    parser.add_argument("--own-loop")
    parser.add_argument("--packed", action="store_true")
    options, rest = parser.parse_known_args()
    sys.argv[1:] = rest
    witness = loop_witness.Witness(options.witness)
    witness.watch_routers()
    own_loop = loop_witness.OwnLoop(options.own_loop, training) if options.own_loop else None
    train(partial(forward_step, witness, options, own_loop))
    witness.save()


if __name__ == "__main__":
    main()
