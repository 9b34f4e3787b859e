"""A user's training script on megatron.training 0.19.2, which knows nothing of routing_replay.

Beside it: a witness that saves what the routers dispatched.

    python -m torch.distributed.run ... megatron_lm_script.py --witness FOLDER FLAGS OF MEGATRON
"""

from __future__ import annotations

import functools
import sys
from functools import partial
from pathlib import Path

import torch

import megatron_lm_cpu  # isort: skip
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDatasetConfig, MockGPTDataset
from megatron.core.enums import ModelType
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.core.transformer.moe.router import TopKRouter
from megatron.training import get_args, pretrain
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args


class Witness:
    """Saves the tokens and the dispatched experts of every training microbatch."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.tokens: list[torch.Tensor] = []
        self.maps: dict[int, list[torch.Tensor]] = {}
        self.losses: list[float] = []
        self.is_training = False

    def watch_routers(self) -> None:
        stock = TopKRouter.forward

        @functools.wraps(stock)
        def forward(router, *args, **kwargs):
            probs, routing_map = stock(router, *args, **kwargs)
            is_recompute = torch._C._current_graph_task_id() != -1
            if self.is_training and not is_recompute:
                self.maps.setdefault(router.layer_number - 1, []).append(routing_map.clone())
            return probs, routing_map

        TopKRouter.forward = forward

    def save(self) -> None:
        rank = torch.distributed.get_rank()
        state = {"tokens": self.tokens, "maps": self.maps, "losses": self.losses}
        torch.save(state, self.folder / f"rank{rank}.pt")


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


def loss(witness, is_training, mask, output):
    total = (output.view(-1).float() * mask.view(-1).float()).sum()
    count = mask.sum().int()
    if is_training:
        witness.losses.append(float(total))
    return total, count, {"lm loss": torch.stack([total.detach(), count.float()])}


def forward_step(witness, iterator, model):
    batch = next(iterator)
    witness.is_training = model.training
    if model.training:
        witness.tokens.append(batch["tokens"])
    output = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
    return output, partial(loss, witness, model.training, batch["loss_mask"])


def main() -> None:
    megatron_lm_cpu.allow_no_cuda()
    place = sys.argv.index("--witness")
    witness = Witness(Path(sys.argv[place + 1]))
    del sys.argv[place : place + 2]
    witness.watch_routers()
    args = parse_and_validate_args(args_defaults={"tokenizer_type": "NullTokenizer"})
    config = pretrain_cfg_container_from_args(args, gpt_config_from_args(args))
    step = partial(forward_step, witness)
    pretrain(config, datasets, ModelType.encoder_or_decoder, step)
    witness.save()


if __name__ == "__main__":
    main()
