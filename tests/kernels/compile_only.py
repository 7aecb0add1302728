"""Compiles the kernels for GPUs that are not here, and prints what became of each as a JSON line.

    python -m tests.kernels.compile_only 80 90 120

The launchers run as they are, at shapes of real models on tensors without memory; what they would
launch is compiled instead. Not within a test: the interpreter and the compiler exclude each other.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels import (
    cross_entropy_triton,
    launch,
    lora_triton,
    nf4_triton,
    norm_triton,
    rope_triton,
    swiglu_triton,
)
from kernels.nf4 import NF4

MODULES = (cross_entropy_triton, lora_triton, nf4_triton, norm_triton, rope_triton, swiglu_triton)
TYPES = {
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
}
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Name and launch of each, at the shapes of an 8B model with 8192 tokens."""
    wide = partial(empty, dtype=torch.float32)
    for C in (128, 4096, 8192):
        x_NC, w_C, stat_N = empty(8192, C), empty(C), wide(8192)
        for residual_NC, bias_C, mean_N in ((None, None, None), (x_NC, w_C, stat_N)):
            rule = (1e-6, 0.0, mean_N is not None)
            name = f"{'layer' if rule[2] else 'rms'} {C}"
            yield name, partial(norm_triton._launch_fwd, x_NC, residual_NC, w_C, bias_C, rule)
            saved = (x_NC, w_C, mean_N, stat_N)
            needs = (True, bias_C is not None)
            yield name, partial(norm_triton._launch_bwd, x_NC, residual_NC, saved, 0.0, needs)
    for E in (64, 32):
        args = empty(8192, 32, 128), empty(2, 8192, E)
        yield f"turned {2 * E}", partial(rope_triton._launch, *args, is_backward=True)
    gate_NF = empty(8192, 14336)
    for kind in ("silu", "gelu", "gelu_tanh"):
        yield kind, partial(swiglu_triton._launch_fwd, gate_NF, gate_NF, kind)
        yield kind, partial(swiglu_triton._launch_bwd, gate_NF, gate_NF, gate_NF, kind)
    chunk = empty(4096, 128256), empty(4096, dtype=torch.int64), wide(4096)
    for rule in ((None, 0.0, 0.0), (30.0, 0.0, 0.0), (None, 1e-4, 0.1), (30.0, 1e-4, 0.1)):
        loss = partial(cross_entropy_triton.softmax_loss_triton, *chunk, rule, needs_gradient=True)
        yield "cap {}, z-loss {}, smoothing {}".format(*rule), loss
    x_NC, seed = empty(8192, 4096), empty(1, dtype=torch.int64)
    for R in (16, lora_triton.FUSED_RANK, lora_triton.MAX_RANK):
        a_RC, b_OR, h_NR = empty(R, 4096), empty(4096, R), empty(8192, R)
        ids = [empty(8192, dtype=torch.int32), empty(R, dtype=torch.int32)]
        for name, choice in ((f"rank {R}", []), (f"rank {R} of several adapters", ids)):
            shrink = partial(lora_triton._launch_shrink, x_NC, a_RC)
            yield name, partial(shrink, None, 0.0, choice)
            yield f"{name}, dropout", partial(shrink, seed, 0.1, choice)
            if R <= lora_triton.FUSED_RANK:
                yield name, partial(lora_triton._launch_dh_db, x_NC, b_OR, h_NR, choice)
        drop = partial(lora_triton._launch_drop_bwd, x_NC, h_NR, a_RC, seed, x_NC, 0.1)
        yield f"rank {R}", drop
    blocks, scales = 4096 * 14336 // 64, wide(4096 * 14336 // 64 // 256)
    codes = [empty(size, dtype=torch.uint8) for size in (32 * blocks, blocks)]
    weight = NF4(*codes, scales, wide(1), torch.Size((4096, 14336)), torch.bfloat16)
    yield "4096 x 14336", partial(nf4_triton.dequantise_triton, weight)
    yield "4096 x 14336", partial(nf4_triton.quantise_blocks_triton, empty(4096, 14336))


class Compiled:
    """Stands for a kernel: a launch compiles it for `arch` and prints what is found."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.arch, self.case = kernel, 0, ""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self.compile

    def compile(self, *args: Any, **kwargs: Any) -> None:
        names = self.kernel.arg_names
        options = {k: kwargs.pop(k) for k in ("num_warps", "num_stages") if k in kwargs}
        values = dict(zip(names, args, strict=False)) | kwargs
        signature, constants, attrs = {}, {}, {}
        for place, name in enumerate(names):
            value = values[name]
            if isinstance(value, torch.Tensor):
                signature[name] = TYPES[value.dtype]
            elif isinstance(value, float):
                signature[name] = "fp32"
            elif isinstance(value, int) and name not in kwargs and value != 1:
                signature[name] = "i32"
            else:
                signature[name], constants[name] = "constexpr", value
            if isinstance(value, torch.Tensor) or signature[name] == "i32" and value % 16 == 0:
                attrs[(place,)] = [["tt.divisibility", 16]]
        source = ASTSource(self.kernel, signature, constants, attrs)
        target = GPUTarget("cuda", self.arch, 32)
        self.report(triton.compile(source, target=target, options=options))

    def report(self, found: Any) -> None:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(found.asm["cubin"])
            file.flush()
            command = [CUOBJDUMP, "-res-usage", file.name]
            usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        ptx = found.asm["ptx"]
        line = {
            "kernel": self.kernel.__name__,
            "case": self.case,
            "arch": self.arch,
            "registers": int(re.search(r"REG:(\d+)", usage)[1]),
            "stack": int(re.search(r"STACK:(\d+)", usage)[1]),
            "shared": found.metadata.shared,
            # loads into registers, or into shared memory ahead of their use
            "wide_loads": len(re.findall(r"ld\.global[.\w:]*\.v4\.b32|cp\.async.*0x10", ptx)),
            "wide_stores": len(re.findall(r"st\.global[.\w:]*\.v4\.b32", ptx)),
        }
        print(json.dumps(line), flush=True)


def main() -> None:
    """Every case for every architecture among the arguments."""
    stand_ins = []
    for module in MODULES:
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            stand_ins.append(Compiled(getattr(module, name)))
            setattr(module, name, stand_ins[-1])
    for arch in map(int, sys.argv[1:]):
        launch._arch = lambda device, arch=arch: f"sm_{arch}"
        for case, run in cases():
            for stand_in in stand_ins:
                stand_in.case, stand_in.arch = case, arch
            run()


if __name__ == "__main__":
    main()
