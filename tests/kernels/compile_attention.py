"""Compiles the attention kernels for GPUs that are not here; a JSON line tells what became of each.

    python -m tests.kernels.compile_attention 80 90 120
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels import attention_triton as module
from kernels.docs import Docs

BIN = Path(triton.__file__).parent / "backends/nvidia/bin"
KINDS = {80: "sm_80", 90: "sm_90", 120: "sm_120"}
TYPES = {torch.bfloat16: "bf16", torch.float32: "fp32", torch.int32: "i32"}
# (H, G, D), dtype, is_causal, window, soft cap, architectures
CASES = [
    ((8, 8, 64), torch.bfloat16, True, None, None, (90,)),
    ((8, 2, 128), torch.bfloat16, True, None, None, (80, 90, 120)),
    ((8, 2, 128), torch.bfloat16, True, 1024, 50.0, (90,)),
    ((8, 2, 256), torch.bfloat16, True, None, None, (90,)),
    ((8, 2, 64), torch.float32, True, None, None, (80,)),
]


class Compiled:
    """Stands for a kernel: a launch compiles it for `arch` and prints what is found."""

    arch, case = 0, ""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self.compile

    def compile(self, *args: Any, num_warps: int, num_stages: int, **constexprs: Any) -> None:
        names = self.kernel.arg_names
        values = dict(zip(names, args, strict=False)) | constexprs
        signature, constants, attrs = {}, {}, {}
        for place, name in enumerate(names):
            value = values[name]
            if isinstance(value, TensorDescriptor):
                signature[name] = f"tensordesc<{TYPES[value.base.dtype]}{value.block_shape}>"
            elif isinstance(value, torch.Tensor):
                signature[name] = f"*{TYPES[value.dtype]}"
            elif name in constexprs and name != "scale" or value is None:
                signature[name], constants[name] = "constexpr", value
            else:
                signature[name] = "fp32" if isinstance(value, float) else "i32"
            if isinstance(value, torch.Tensor) or name.startswith("stride"):
                attrs[(place,)] = [["tt.divisibility", 16]]
        source = ASTSource(self.kernel, signature, constants, attrs)
        options = {"num_warps": num_warps, "num_stages": num_stages}
        target = GPUTarget("cuda", self.arch, 32)
        self.report(triton.compile(source, target=target, options=options))

    def report(self, found: Any) -> None:
        with tempfile.TemporaryDirectory() as folder:
            cubin, ptx = Path(folder, "x.cubin"), Path(folder, "x.ptx")
            cubin.write_bytes(found.asm["cubin"])
            ptx.write_text(found.asm["ptx"])
            usage = said([BIN / "cuobjdump", "-res-usage", cubin])
            wgmma = "wgmma.mma_async" in found.asm["ptx"]
            # ptxas says so only in its messages, which triton drops
            command = [get_ptxas(90).path, "-v", "-arch=sm_90a", ptx, "-o", Path(folder, "y")]
            messages = said(command) if wgmma else ""
        line = {
            "kernel": self.kernel.__name__,
            "case": self.case,
            "arch": self.arch,
            "registers": int(re.search(r"REG:(\d+)", usage)[1]),
            "stack": int(re.search(r"STACK:(\d+)", usage)[1]),
            "shared": found.metadata.shared,
            "wgmma": wgmma,
            "serialised": "wgmma.mma_async instructions are serialized" in messages,
        }
        print(json.dumps(line), flush=True)


def said(command: list[Any]) -> str:
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    return run.stdout + run.stderr


def main() -> None:
    """Every case for every architecture among the arguments."""
    for name, kernel in module.KERNELS.items():
        module.KERNELS[name] = Compiled(kernel)
    docs = Docs.from_lengths([300, 212])
    for arch in map(int, sys.argv[1:]):
        for (H, G, D), dtype, is_causal, window, softcap, archs in CASES:
            if arch not in archs:
                continue
            Compiled.arch = arch
            letters = {torch.bfloat16: "", torch.float32: " fp32"}[dtype]
            rule = ("" if is_causal else " all") + ("" if window is None else " window, cap")
            Compiled.case = f"{H}:{G} {D}{rule}{letters}"
            kind = "fp32" if dtype == torch.float32 else KINDS[arch]
            module.kind_of = lambda *_, kind=kind: kind
            q, k, v = (torch.empty(512, h, D, dtype=dtype, device="meta") for h in (H, G, G))
            lse, stats = (torch.empty(H, 512, *more, device="meta") for more in ((), (2,)))
            settings = (docs, module._Rule(is_causal, D**-0.5, window, softcap))
            module._launch("fwd", [q, k, v, q, lse], *settings)
            module._launch("dq", [q, k, v, q, q, lse, stats, q], *settings, scale=D**-0.5)
            module._launch("dkv", [q, k, v, q, stats, k, v], *settings, scale=D**-0.5)


if __name__ == "__main__":
    main()
