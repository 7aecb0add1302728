"""Compiles the kernels for GPUs that are not here, and prints what became of each as a JSON line.

    python -m tests.kernels.compile_only 80 90 120 [--store]

The launchers run as they are, at shapes of real models on tensors without memory; what they would
launch is compiled instead. Not within a test: the interpreter and the compiler exclude each other.
"""

import csv
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor
from kernels import (
    attention_decode_triton,
    attention_triton,
    cross_entropy_triton,
    launch,
    lora_triton,
    norm_triton,
    rope_triton,
    swiglu_triton,
)
from kernels.docs import Docs

MODULES = (
    attention_decode_triton,
    attention_triton,
    cross_entropy_triton,
    lora_triton,
    norm_triton,
    rope_triton,
    swiglu_triton,
)
TYPES = {
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.uint8: "u8",
}
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
# (H, G, D), settings, dtype, architectures
ATTENTION = [
    ((8, 8, 64), {}, torch.bfloat16, (90,)),
    ((8, 2, 128), {}, torch.bfloat16, (80, 86, 90, 100, 120)),
    ((8, 2, 128), {"window": 1024, "softcap": 50.0}, torch.bfloat16, (90,)),
    ((8, 2, 256), {}, torch.bfloat16, (90,)),
    ((8, 2, 64), {}, torch.float32, (80,)),
]

def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")

def attention_cases(arch: int) -> Iterator[tuple[str, Callable[[], object]]]:
    """Name and launches of each, over two documents."""
    for lengths in ([5000, 3192], [300, 212]):
        docs = Docs.from_lengths(lengths)
        N = docs.num_tokens
        for (H, G, D), rule, dtype, archs in ATTENTION:
            is_short = N < 1000
            if arch not in archs or is_short and (rule or (D, arch) != (128, 90)):
                continue
            words = [f"{H}:{G} {D}", *rule, "fp32" * (dtype == torch.float32), "short" * is_short]
            name = " ".join(filter(None, words))
            q, k, v = (empty(N, h, D, dtype=dtype) for h in (H, G, G))
            lse, stats = (empty(H, N, *more, dtype=torch.float32) for more in ((), (2,)))
            window, softcap = rule.get("window"), rule.get("softcap")
            settings = attention_triton.Rule(True, D**-0.5, window, softcap)
            run = partial(attention_triton._launch, docs=docs, rule=settings)
            kernel, tensors = attention_triton._attention_fwd_kernel, [q, k, v, q, lse]
            yield name, partial(run, kernel, "fwd", tensors)
            kernel = attention_triton._attention_bwd_dq_kernel
            tensors = [q, k, v, q, q, lse, stats, q]
            yield name, partial(run, kernel, "dq", tensors, scale=D**-0.5)
            kernel = attention_triton._attention_bwd_dkv_kernel
            tensors = [q, k, v, q, stats, k, v]
            yield name, partial(run, kernel, "dkv", tensors, scale=D**-0.5)

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
    turn = partial(rope_triton._launch, empty(8192, 32, 128), empty(2, 8192, 64), None, None)
    yield "turned 128", partial(turn, (0.0, 0.0), is_backward=True)
    for D in (64, 128, 256):
        x_NHD, rule = empty(8192, 32, D), (1e-6, 0.0)
        turn = partial(rope_triton._launch, x_NHD, empty(2, 8192, D // 2), empty(D))
        yield f"normed {D}", partial(turn, None, rule, is_backward=False)
        for dw in (False, True):
            run = partial(turn, x_NHD, rule, is_backward=True, needs_dweight=dw)
            yield f"normed {D} {'with' if dw else 'without'} dw", run
    gate_NF = empty(8192, 14336)
    for kind in ("silu", "gelu", "gelu_tanh"):
        for name, count in (("glu_fwd", 3), ("glu_bwd", 5)):
            kernel, tensors = getattr(swiglu_triton, f"_{name}_kernel"), [gate_NF] * count
            yield kind, partial(swiglu_triton._launch, kernel, name, tensors, kind)
    chunk = empty(4096, 128256), empty(4096, dtype=torch.int64), wide(4096)
    for rule in ((None, 0.0, 0.0), (30.0, 0.0, 0.0), (None, 1e-4, 0.1), (30.0, 1e-4, 0.1)):
        loss = partial(cross_entropy_triton.softmax_loss_triton, *chunk, rule, needs_gradient=True)
        yield "cap {}, z-loss {}, smoothing {}".format(*rule), loss
    x_NC, seed = empty(8192, 4096), empty(1, dtype=torch.int64)
    for R in (16, lora_triton.FUSED_RANK, launch.MAX_RANK):
        a_RC, b_OR, h_NR = empty(R, 4096), empty(4096, R), empty(8192, R)
        shrink = partial(lora_triton._launch_shrink, x_NC, a_RC)
        yield f"rank {R}", partial(shrink, None, 0.0)
        yield f"rank {R}, dropout", partial(shrink, seed, 0.1)
        if R <= lora_triton.FUSED_RANK:
            yield f"rank {R}", partial(lora_triton._launch_dh_db, x_NC, b_OR, h_NR)
        drop = partial(lora_triton._launch_drop_bwd, x_NC, h_NR, a_RC, seed, x_NC, 0.1)
        yield f"rank {R}", drop
    yield from decode_cases()

def decode_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """8 key heads and caches of 4096 slots: slabs, and pages of 16, 100 and 128 slots."""
    decode = attention_decode_triton.attention_decode_triton
    shapes = (64, 32, 4096, None), (128, 32, 16, None), (128, 64, 128, 1024), (256, 256, 100, 1024)
    for D, H, S, window in shapes:
        cache, pages_BJ = empty(160, S, 8, D), empty(4, 40, dtype=torch.int32)
        if S == 4096:
            cache, pages_BJ = empty(4, 8, S, D).transpose(1, 2), None
        args = empty(4, H, D), cache, cache, empty(4, dtype=torch.int64), pages_BJ
        settings = {"scale": D**-0.5, "window": window, "softcap": window and 50.0}
        yield f"{D}, pages of {S}", partial(decode, *args, **settings)

class Compiled:
    """Stands for a kernel: a launch compiles it for `arch` and prints what is found."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.arch, self.case = kernel, 0, ""
        self.lines: list[dict[str, Any]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self.compile

    def compile(self, *args: Any, **kwargs: Any) -> None:
        launched = ("num_warps", "num_stages", "enable_fp_fusion")
        options = {name: kwargs.pop(name) for name in launched if name in kwargs}
        values = {p.name: p.default for p in self.kernel.params if p.has_default}
        values |= dict(zip(self.kernel.arg_names, args, strict=False)) | kwargs
        signature, constants, attrs = {}, {}, {}
        for place, param in enumerate(self.kernel.params):
            value = values[param.name]
            is_special = not param.do_not_specialize
            if isinstance(value, torch.Tensor):
                signature[param.name] = f"*{TYPES[value.dtype]}"
            elif isinstance(value, TensorDescriptor):
                signature[param.name] = f"tensordesc<{TYPES[value.base.dtype]}{value.block_shape}>"
            elif param.is_constexpr or value is None or is_special and value == 1:
                signature[param.name], constants[param.name] = "constexpr", value
            else:
                signature[param.name] = "fp32" if isinstance(value, float) else "i32"
            is_even = signature[param.name] == "i32" and value % 16 == 0
            if isinstance(value, torch.Tensor) or is_special and is_even:
                attrs[(place,)] = [["tt.divisibility", 16]]
        source = ASTSource(self.kernel, signature, constants, attrs)
        target = GPUTarget("cuda", self.arch, 32)
        self.report(triton.compile(source, target=target, options=options))

    def report(self, found: Any) -> None:
        with tempfile.TemporaryDirectory() as folder:
            cubin, ptx = Path(folder, "x.cubin"), Path(folder, "x.ptx")
            cubin.write_bytes(found.asm["cubin"])
            ptx.write_text(found.asm["ptx"])
            usage = said([CUOBJDUMP, "-res-usage", cubin])
            wgmma = "wgmma.mma_async" in found.asm["ptx"]
            # ptxas says so only in its messages, which triton drops
            command = [get_ptxas(90).path, "-v", "-arch=sm_90a", ptx, "-o", Path(folder, "y")]
            messages = said(command) if wgmma else ""
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
            "wgmma": wgmma,
            "mma": "mma.sync" in ptx,
            "serialised": "wgmma.mma_async instructions are serialized" in messages,
        }
        self.lines.append(line)
        print(json.dumps(line), flush=True)

def said(command: list[Any]) -> str:
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    return run.stdout + run.stderr

def main() -> None:
    """Every case for every architecture among the arguments; `--store` keeps the registers."""
    archs = [int(word) for word in sys.argv[1:] if word != "--store"]
    assert archs, "name architectures: 80 90 120"
    stand_ins: dict[Any, Compiled] = {}
    for module in MODULES:
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            kernel = getattr(module, name)
            stand_ins[kernel] = Compiled(kernel)
            setattr(module, name, stand_ins[kernel])
    launch.num_programs = lambda tasks, per_sm, device: min(tasks, 132 * per_sm)
    for arch in archs:
        launch.arch_of = lambda device, arch=arch: f"sm_{arch}"
        for case, run in chain(attention_cases(arch), cases()):
            for stand_in in stand_ins.values():
                stand_in.case, stand_in.arch = case, arch
            run()
    if "--store" in sys.argv:
        store([line for stand_in in stand_ins.values() for line in stand_in.lines])

def store(lines: list[dict[str, Any]]) -> None:
    """The column of this Triton in registers.csv."""
    path = Path(__file__).with_name("registers.csv")
    version = ".".join(triton.__version__.split(".")[:2])
    rows: dict[str, dict[str, Any]] = {}
    if path.exists():
        with path.open(encoding="utf-8") as file:
            rows = {row["kernel"]: row for row in csv.DictReader(file)}
    found = {f"{x['kernel']} {x['case']} sm_{x['arch']}": x["registers"] for x in lines}
    mine = {name: rows.get(name, {"kernel": name}) | {version: found[name]} for name in found}
    archs = {name.rpartition(" ")[2] for name in found}
    kept = {k: row for k, row in rows.items() if k.rpartition(" ")[2] not in archs} | mine
    columns = sorted({column for row in kept.values() for column in row} - {"kernel"})
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["kernel", *columns], lineterminator="\n")
        writer.writeheader()
        writer.writerows(kept[name] for name in sorted(kept))

if __name__ == "__main__":
    main()
