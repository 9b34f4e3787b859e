"""The configurations of the replay matrix (see replay_matrix.py for what is checked)."""

import dataclasses
import importlib.metadata
import itertools

from recipes.model.parallel import ParallelLayout

# Routers by name: fields of Megatron's configuration.
ROUTERS = {
    "softmax": {},
    "pre_softmax": {"moe_router_pre_softmax": True},
    "pre_softmax_scaled": {
        "moe_router_pre_softmax": True,
        "moe_router_topk_scaling_factor": 2.5,
    },
    "sigmoid": {"moe_router_score_function": "sigmoid"},
    "sigmoid_bias": {
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_topk_scaling_factor": 1.5,
    },
    "sqrtsoftplus_bias": {
        "moe_router_score_function": "sqrtsoftplus",
        "moe_router_enable_expert_bias": True,
    },
    "groups": {
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_num_groups": 4,
        "moe_router_group_topk": 2,
    },
    "softmax_groups": {
        "moe_router_pre_softmax": True,
        "moe_router_num_groups": 4,
        "moe_router_group_topk": 2,
    },
    "fp64": {"moe_router_dtype": "fp64"},
    "aux_loss": {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.1},
    "seq_aux_loss": {"moe_router_load_balancing_type": "seq_aux_loss", "moe_aux_loss_coeff": 0.1},
    "global_aux_loss": {
        "moe_router_load_balancing_type": "global_aux_loss",
        "moe_aux_loss_coeff": 0.1,
    },
    "z_loss": {"moe_z_loss_coeff": 0.1},
    "shared_experts": {"moe_shared_expert_intermediate_size": 16},
    "top_4": {"moe_router_topk": 4},
}
# Oldest megatron-core that has it, where it is not all.
ROUTERS_FROM = {"sqrtsoftplus_bias": "0.18"}
VERSION = importlib.metadata.version("megatron-core")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One configuration."""

    layout: ParallelLayout = ParallelLayout()
    dispatcher: str = "alltoall"
    recompute: str = "none"
    router: str = "softmax"
    is_packed: bool = False
    dense: tuple[int, ...] = ()  # layers without experts
    num_layers: int = 4
    is_ragged: bool = False  # microbatches of different lengths
    padding_mask: bool = False
    is_contiguous: bool = False  # slices of context parallelism; zigzag otherwise
    has_mtp: bool = False  # one multi-token-prediction layer
    is_latent: bool = False  # multi-head latent attention, as DeepSeek-V3's
    pattern: str = ""  # of a HybridModel's layers; a GPTModel otherwise

    def runs_on(self, version: str) -> bool:
        """Whether stock megatron-core of this version can run it."""
        if self.recompute == "full" and self.pattern:
            return version >= "0.18"  # before, hybrid models did not recompute, whatever was set
        if self.is_latent:
            return version >= "0.19"
        if self.pattern and self.layout.virtual_pipeline > 1:
            return version >= "0.17"
        if self.recompute == "full" and self.has_mtp:
            # 0.18 passes a padding_mask to an MTP layer's recomputation, which takes none.
            return not version.startswith("0.18.")
        return version >= ROUTERS_FROM.get(self.router, "0.16")

    @property
    def name(self) -> str:
        sizes = dataclasses.asdict(self.layout)
        short = {"tensor": "tp", "pipeline": "pp", "virtual_pipeline": "vpp", "context": "cp"}
        short |= {"expert": "ep", "expert_tensor": "etp"}
        short |= {"first_stage_layers": "first", "last_stage_layers": "last"}
        is_etp = sizes["expert_tensor"] != sizes["tensor"]
        parts = [
            f"{short[name]}{size}"
            for name, size in sizes.items()
            if (size or 1) > 1 and (name != "expert_tensor" or is_etp)
        ]
        if sizes["expert_tensor"] == 1 and is_etp:
            parts.append("etp1")
        parts += [self.dispatcher] if self.dispatcher != "alltoall" else []
        parts += [f"recompute_{self.recompute}"] if self.recompute != "none" else []
        parts += [self.router] if self.router != "softmax" else []
        parts += ["packed"] if self.is_packed else ["padded"]
        parts += [f"dense{''.join(map(str, self.dense))}"] if self.dense else []
        parts += ["ragged"] if self.is_ragged else []
        parts += ["padding_mask"] if self.padding_mask else []
        parts += ["contiguous"] if self.is_contiguous else []
        parts += ["mtp"] if self.has_mtp else []
        parts += ["latent"] if self.is_latent else []
        parts += ["hybrid"] if self.pattern else []
        return "-".join(parts)


def cases(num_ranks: int) -> list[Case]:
    """All cases of a world of this many ranks that the installed megatron-core can run."""
    found = {1: _single, 2: _pairs, 4: _quads}[num_ranks]()
    return [case for case in found if case.runs_on(VERSION)]


def _single() -> list[Case]:
    recomputes = ("none", "full", "block", "moe")
    found = [
        Case(recompute=recompute, is_packed=is_packed)
        for recompute, is_packed in itertools.product(recomputes, (False, True))
    ]
    found += [Case(router=router) for router in ROUTERS if router != "softmax"]
    found += [
        Case(router=router, recompute=recompute)
        for router in ("sigmoid_bias", "groups", "aux_loss", "pre_softmax")
        for recompute in ("full", "moe")
    ]
    found += [
        Case(dense=(0,)),
        Case(dense=(1, 3), recompute="full"),
        Case(is_ragged=True),
        Case(is_ragged=True, is_packed=True, recompute="full"),
        Case(padding_mask=True, router="aux_loss"),
        Case(has_mtp=True),
        Case(has_mtp=True, is_packed=True),
        Case(has_mtp=True, recompute="full", dense=(0,)),
        Case(is_latent=True, router="groups", recompute="full"),
        Case(is_latent=True, router="groups", is_packed=True, recompute="moe"),
        Case(pattern="*E*-*E"),
        Case(pattern="*E*-*E", recompute="full", is_packed=True),
    ]
    return found


def _pairs() -> list[Case]:
    layouts = {
        "tp": ParallelLayout(tensor=2),
        "pp": ParallelLayout(pipeline=2),
        "vpp": ParallelLayout(pipeline=2, virtual_pipeline=2),
        "cp": ParallelLayout(context=2),
        "ep": ParallelLayout(expert=2),
        "etp1": ParallelLayout(tensor=2, expert=2, expert_tensor=1),
    }
    # Stages of 3 + 1 layers, and of 4 + 2 in two rounds.
    uneven = ParallelLayout(pipeline=2, first_stage_layers=3)
    uneven_vpp = ParallelLayout(pipeline=2, virtual_pipeline=2, first_stage_layers=4)
    found = [
        Case(layout=layout, recompute=recompute, is_packed=is_packed)
        for layout in layouts.values()
        for recompute, is_packed in (("none", False), ("full", True), ("moe", False))
    ]
    found += [
        Case(layout=layouts["ep"], dispatcher="allgather"),
        Case(layout=layouts["ep"], dispatcher="allgather", recompute="full"),
        Case(layout=layouts["tp"], dispatcher="allgather"),
        Case(layout=layouts["pp"], dense=(0,), recompute="full"),
        Case(layout=layouts["vpp"], dense=(0, 3)),
        Case(layout=layouts["vpp"], is_ragged=False, router="groups", recompute="full"),
        Case(layout=layouts["tp"], router="groups"),
        Case(layout=layouts["tp"], router="aux_loss", padding_mask=True),
        Case(layout=layouts["tp"], router="seq_aux_loss", recompute="moe"),
        Case(layout=layouts["cp"], is_packed=True, is_ragged=True),
        Case(layout=layouts["ep"], is_ragged=True),
        Case(layout=layouts["cp"], is_contiguous=True, recompute="full"),
        Case(layout=layouts["cp"], is_contiguous=True, is_packed=True, is_ragged=True),
        Case(layout=layouts["pp"], has_mtp=True),
        Case(layout=layouts["pp"], has_mtp=True, recompute="full"),
        Case(layout=layouts["tp"], has_mtp=True),
        Case(layout=layouts["cp"], has_mtp=True),
        Case(layout=layouts["pp"], pattern="*E*|-*E", recompute="full"),
        Case(layout=layouts["vpp"], pattern="*E|*-|*E|-E"),
        Case(layout=layouts["cp"], pattern="*E*-*E", is_contiguous=True),
        Case(layout=layouts["tp"], pattern="*E*-*E"),
        Case(layout=layouts["ep"], pattern="*E*-*E", is_packed=True),
        Case(layout=layouts["etp1"], is_latent=True, router="groups", recompute="full"),
        Case(layout=layouts["cp"], is_latent=True, router="groups", is_packed=True),
        Case(layout=layouts["pp"], is_latent=True, router="groups", is_packed=True),
        Case(layout=uneven, dense=(0,), recompute="full"),
        Case(layout=uneven, is_latent=True, router="groups", dense=(0,), is_packed=True),
        Case(layout=uneven_vpp, num_layers=6, dense=(0, 3)),
        Case(layout=ParallelLayout()),  # data parallelism
        Case(layout=ParallelLayout(), is_packed=True, recompute="full"),
    ]
    return found


def _quads() -> list[Case]:
    layouts = [
        ParallelLayout(tensor=2, pipeline=2),
        ParallelLayout(tensor=2, context=2),
        ParallelLayout(tensor=2, expert=2),
        ParallelLayout(tensor=2, expert=4, expert_tensor=1),
        ParallelLayout(pipeline=2, expert=2),
        ParallelLayout(pipeline=2, context=2),
        ParallelLayout(pipeline=2, virtual_pipeline=2, tensor=2),
        ParallelLayout(pipeline=2, virtual_pipeline=2, context=2),
        ParallelLayout(pipeline=4),
        ParallelLayout(context=2, expert=2),
    ]
    found = [
        Case(layout=layout, recompute=recompute, is_packed=is_packed)
        for layout in layouts
        for recompute, is_packed in (("full", False), ("none", True))
    ]
    return found + [
        Case(layout=layouts[1], is_contiguous=True),
        Case(layout=layouts[5], is_contiguous=True, is_packed=True, recompute="full"),
        Case(layout=layouts[0], has_mtp=True),
        Case(layout=layouts[0], pattern="*E*|-*E", recompute="full"),
    ]
