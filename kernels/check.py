"""python -m kernels.check [OP ...]: the kernels' errors against float64, beside eager torch's.

The rule, for forward and for each gradient: at most 2 (forward) or 3 times (gradients) the largest
error of the definition in the same dtype, plus eps times the RMS. What a kernel leaves unwritten is
NaN. On this machine's GPU; without one, in Triton's interpreter (TRITON_INTERPRET=1)."""

import argparse
import json
import sys
from collections.abc import Collection, Mapping
from functools import partial
from itertools import product
from typing import NamedTuple
import torch
from torch import Tensor
from kernels.backend import DTYPES, is_interpreted
from kernels.cases import Call, Draw, Sizes, chosen, label, ops, workers

Inputs = Mapping[str, Tensor]

class Error(NamedTuple):
    """Largest error of a result: the op's, the definition's in its dtype, and that allowed."""
    name: str
    mine: float
    plain: float
    allowed: float

def results(op: Call, inputs: Inputs, trained: Collection[str]) -> dict[str, Tensor]:
    """Output and the gradients of the trained inputs, in float64."""
    given = {name: x.detach().clone().requires_grad_(name in trained) for name, x in inputs.items()}
    y = op(**given)
    found = {"y": y.detach().double()}
    if trained:
        generator = torch.Generator().manual_seed(y.numel())
        dy = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.device, y.dtype)
        grads = torch.autograd.grad(y, [given[name] for name in trained], dy)
        found |= {f"d{name}": grad.double() for name, grad in zip(trained, grads, strict=True)}
    return found

def errors(op: Call, reference: Call, inputs: Inputs, dtype: torch.dtype,
           trained: Collection[str]) -> list[Error]:
    """Of the output and the gradients of the trained inputs, which are rounded to a dtype."""
    cast = {name: tensor.to(dtype) for name, tensor in inputs.items()}
    exact = results(reference, {name: x.double() for name, x in inputs.items()}, trained)
    plain, mine = (results(call, cast, trained) for call in (reference, op))
    found = []
    for name, true in exact.items():
        error, eager = ((x[name] - true).abs().max().item() for x in (mine, plain))
        floor = torch.finfo(dtype).eps * true.square().mean().sqrt().item()
        found.append(Error(name, error, eager, (2 if name == "y" else 3) * eager + floor))
    return found

def of_case(op: str, sizes: Sizes, draw: Draw) -> list[Error]:
    """`errors` of the kernels of an op."""
    entry = ops()[op]
    inputs, rest = entry.drawn(draw, sizes)
    mine, reference = partial(entry.call, impl="triton", **rest), partial(entry.reference, **rest)
    return errors(mine, reference, inputs, draw.dtype, entry.trained())

def passes(op: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the first case of an op keeps the rule; what "auto" asks once."""
    return all(e.mine <= e.allowed for e in of_case(op, ops()[op].checks[0], Draw(dtype, device)))

def tried(op: str, sizes: Sizes, dtype: torch.dtype) -> tuple[bool, str]:
    """Whether a case keeps the rule with three seeds, and what to print of it."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # fresh memory is NaN
    draws = (Draw(dtype, "cuda" if torch.cuda.is_available() else "cpu", s) for s in range(3))
    try:
        found = [error for draw in draws for error in of_case(op, sizes, draw)]
    except Exception as error:  # compiler and driver have many
        return False, f"FAIL {op} {label(sizes)} {dtype}: {type(error).__name__}: {error}"
    is_good = all(error.mine <= error.allowed for error in found)
    worst = {e.name: e for e in sorted(found, key=lambda e: e.mine / e.allowed)}
    told = (f"{e.name} {e.mine:.1e} ({e.plain:.1e})" for e in worst.values())
    return is_good, " ".join(["ok  " if is_good else "FAIL", op, label(sizes), f"{dtype}:", *told])

def main(arguments: list[str] | None = None) -> int:
    """Prints a line for each case, and a JSON line last; 1 where a kernel breaks the rule."""
    parser = argparse.ArgumentParser("python -m kernels.check", description=__doc__)
    options, is_gpu = chosen(parser, arguments), torch.cuda.is_available()
    if not (is_gpu or is_interpreted()):
        parser.error("no GPU; with TRITON_INTERPRET=1 kernels run in Triton's interpreter")
    print("the largest error of each result, and in brackets eager torch's", flush=True)
    dtypes = DTYPES if is_gpu else DTYPES[1:]  # the interpreter's bf16 is not that of a GPU
    todo = ((op, d) for op, d in product(options.op, dtypes) if d.itemsize <= ops()[op].widest)
    cases = [(op, sizes, dtype) for op, dtype in todo for sizes in ops()[op].checks]
    broken = 0
    with workers() as pool:  # cost: on a GPU what takes time is the compiler
        for is_good, line in (pool.map if is_gpu else map)(tried, *zip(*cases, strict=True)):
            broken += not is_good
            print(line, flush=True)
    print(json.dumps({"broken": broken}))
    return int(broken > 0)

if __name__ == "__main__":
    sys.exit(main())
