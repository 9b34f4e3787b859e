"""Compile the kernels for a GPU that is not there, with the compiler that Triton brings."""

import dataclasses
import functools
import re
import subprocess
import tempfile

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from routing_replay.kernels import gates, router
from routing_replay.kernels.scores import tile_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled:
    """What counts of a compiled kernel.

    Attributes:
        num_wide_loads: Loads of 16 bytes from global memory.
        num_spilled_bytes: Registers that a thread keeps in memory.
    """

    num_wide_loads: int
    num_spilled_bytes: int


def compiled(kernel, signature, constants, capability, num_warps):
    """Compile as a launch does: pointers and strides are multiples of 16, unless excepted."""
    excepted = {kernel.arg_names[p.num] for p in kernel.params if p.do_not_specialize_on_alignment}
    aligned = {
        (number,): [["tt.divisibility", 16]]
        for number, (name, kind) in enumerate(signature.items())
        if (kind.startswith("*") or name.endswith("stride")) and name not in excepted
    }
    source = ASTSource(
        kernel,
        signature | dict.fromkeys(constants, "constexpr"),
        constexprs=constants,
        attrs=aligned,
    )
    target = GPUTarget("cuda", capability, 32)
    ptx = triton.compile(source, target=target, options={"num_warps": num_warps}).asm["ptx"]
    wide = re.findall(r"ld\.global\.(?:v4\.b32|v2\.b64)", ptx)
    return Compiled(num_wide_loads=len(wide), num_spilled_bytes=_spilled_bytes(ptx, capability))


def _spilled_bytes(ptx, capability):
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        architecture = re.search(r"\.target (\w+)", ptx).group(1)
        command = [get_ptxas(capability).path, "-v", f"--gpu-name={architecture}", file.name]
        run = subprocess.run([*command, "-o", "/dev/null"], capture_output=True, check=True)
    return sum(int(size) for size in re.findall(rb"(\d+) bytes spill", run.stderr))


def compile_router(
    capability, *, num_experts, top_k, dtype, form="softmax", has_live=False, num_groups=0
):
    """Forward and backward kernel; with live tokens, independent scores have a bias."""
    block_t, block_e = tile_of(num_experts, router.NUM_WARPS)
    shape = {"K": top_k, "E": num_experts, "BLOCK_T": block_t, "BLOCK_E": block_e}
    ids = "*u8" if num_experts <= 256 else "*i16"
    numbers = {"num_tokens": "i32", "scaling_factor": "fp32"}
    build = functools.partial(compiled, capability=capability, num_warps=router.NUM_WARPS)
    forward = build(
        router._forward_kernel,
        {
            "logits": f"*{dtype}",
            "ids": ids,
            "is_live": "*u8",
            "expert_bias": "*fp32",
            "probs": f"*{dtype}",
            "routing_map": "*u8",
            **numbers,
        },
        {
            "FORM": form,
            "HAS_LIVE": has_live,
            "HAS_BIAS": has_live and form in ("sigmoid", "sqrtsoftplus"),
            "NUM_GROUPS": num_groups,
            "BLOCK_G": triton.next_power_of_2(num_groups or 1),
            "GROUP_TOP_K": num_groups // 2,
            **shape,
        },
    )
    backward = build(
        router._backward_kernel,
        {
            "logits": f"*{dtype}",
            "ids": ids,
            "grad_probs": f"*{dtype}",
            "grad_logits": f"*{dtype}",
            **numbers,
        },
        {"FORM": form, **shape},
    )
    return forward, backward


def compile_gates(capability, *, num_experts, top_k, dtype, function):
    block_t, block_e = tile_of(num_experts, gates.NUM_WARPS)
    strides = ("logits_stride", "ids_stride", "packed_stride")
    return compiled(
        gates._capture_kernel,
        {"logits": f"*{dtype}", "ids": "*i32", "packed": "*i32", "num_tokens": "i32"}
        | dict.fromkeys(strides, "i32"),
        {
            "FUNCTION": function,
            "K": top_k,
            "E": num_experts,
            "BLOCK_T": block_t,
            "BLOCK_E": block_e,
            "BLOCK_K": triton.next_power_of_2(top_k),
        },
        capability,
        gates.NUM_WARPS,
    )
