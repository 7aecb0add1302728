"""python -m kernels.check [OP ...]: the kernels' errors against float64, beside eager torch's.

The rule, for forward and for each gradient: at most 2 (forward) or 3 times (gradients) the largest
error of the definition in the same dtype, plus eps times the RMS. What a kernel leaves unwritten is
NaN. On this machine's GPU; without one, in Triton's interpreter (TRITON_INTERPRET=1).
"""

import argparse
import json
import sys
from collections.abc import Mapping
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.cases import OPS, Call, Draw, Sizes, label

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Error(NamedTuple):
    """Largest error of a result: the op's, the definition's in the same dtype, and that allowed."""

    name: str
    mine: float
    plain: float
    allowed: float


def results(op: Call, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Output and the gradient of each input, in float64."""
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in inputs.items()}
    y = op(**leaves)
    found = {"y": y.detach().double()}
    if y.requires_grad:
        generator = torch.Generator().manual_seed(y.numel())
        dy = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.device, y.dtype)
        grads = torch.autograd.grad(y, list(leaves.values()), dy)
        found |= {f"d{key}": grad.double() for key, grad in zip(leaves, grads, strict=True)}
    return found


def errors(
    op: Call, reference: Call, inputs: Mapping[str, Tensor], dtype: torch.dtype
) -> list[Error]:
    """Of the output and of each gradient, for inputs rounded to a dtype."""
    cast = {name: tensor.to(dtype) for name, tensor in inputs.items()}
    exact = results(reference, {name: tensor.double() for name, tensor in inputs.items()})
    plain, mine = results(reference, cast), results(op, cast)
    found = []
    for name, true in exact.items():
        error, eager = ((x[name] - true).abs().max().item() for x in (mine, plain))
        floor = torch.finfo(dtype).eps * true.square().mean().sqrt().item()
        found.append(Error(name, error, eager, (2 if name == "y" else 3) * eager + floor))
    return found


def of_case(op: str, sizes: Sizes, draw: Draw) -> list[Error]:
    """`errors` of the kernels of an op."""
    entry = OPS[op]
    inputs, rest = entry.drawn(draw, sizes)

    def reference(**given: Tensor) -> Tensor:
        dtype = next(iter(given.values())).dtype
        cast = {k: v.to(dtype) if is_operand(v) else v for k, v in rest.items()}
        return entry.reference(**given, **cast)

    def is_operand(value: Any) -> bool:
        return isinstance(value, Tensor) and value.dtype == draw.dtype

    with torch.set_grad_enabled(entry.modes != ("forward",)):
        return errors(partial(entry.call, impl="triton", **rest), reference, inputs, draw.dtype)


def passes(op: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the first case of an op keeps the rule; what "auto" asks once."""
    return all(e.mine <= e.allowed for e in of_case(op, OPS[op].checks[0], Draw(dtype, device)))


def main() -> int:
    """Prints a line for each case, and a JSON line last; 1 where a kernel breaks the rule."""
    parser = argparse.ArgumentParser("python -m kernels.check", description=__doc__)
    parser.add_argument("op", nargs="*", help=f"one of {', '.join(OPS)}; none: all of them")
    parser.add_argument("--seeds", type=int, default=3, help="inputs drawn for each case (3)")
    options = parser.parse_args()
    if unknown := set(options.op) - set(OPS):
        parser.error(f"no op {', '.join(sorted(unknown))}; there are {', '.join(OPS)}")
    is_gpu = torch.cuda.is_available()
    torch.use_deterministic_algorithms(True, warn_only=True)  # fresh memory is NaN
    torch.backends.cuda.matmul.allow_tf32 = False
    print("the largest error of each result, and in brackets eager torch's")
    broken = 0
    for op in options.op or OPS:
        for sizes, dtype in product(OPS[op].checks, DTYPES if is_gpu else DTYPES[1:]):
            draws = (Draw(dtype, "cuda" if is_gpu else "cpu", s) for s in range(options.seeds))
            found = [error for draw in draws for error in of_case(op, sizes, draw)]
            is_good = all(error.mine <= error.allowed for error in found)
            broken += not is_good
            worst = {e.name: e for e in sorted(found, key=lambda e: e.mine / e.allowed)}
            told = "  ".join(f"{e.name} {e.mine:.1e} ({e.plain:.1e})" for e in worst.values())
            print(f"{'ok  ' if is_good else 'FAIL'} {op} {label(sizes)} {str(dtype)[6:]}: {told}")
    print(json.dumps({"broken": broken}))
    return int(broken > 0)


if __name__ == "__main__":
    sys.exit(main())
