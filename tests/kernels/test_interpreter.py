"""The shim of tests/kernels/interpreter.py: bf16 in the interpreter is bit-equal to torch's."""

import pytest
import torch
from tests.kernels import interpreter

interpreter.require()

import triton  # noqa: E402
import triton.language as tl  # noqa: E402

OPS = {
    "add": lambda a, b: a + b,
    "divide": lambda a, b: a / b,
    "compare": lambda a, b: (a < b).to(a.dtype),
    "where": lambda a, b: torch.where(a < b, a, b),
    "maximum": torch.maximum,
    "exp": lambda a, b: a.exp(),
    "round": lambda a, b: (a.float() * 1.37).to(a.dtype),
}

@triton.jit
def _apply_kernel(a_ptr, b_ptr, y_ptr, sum_ptr, max_ptr, dot_ptr, OP: tl.constexpr):
    offs = tl.arange(0, 64)
    a, b = tl.load(a_ptr + offs), tl.load(b_ptr + offs)
    y = a + b
    if OP == "divide":
        y = a / b
    if OP == "compare":
        y = (a < b).to(a.dtype)
    if OP == "where":
        y = tl.where(a < b, a, b)
    if OP == "maximum":
        y = tl.maximum(a, b)
    if OP == "exp":
        y = tl.exp(a.to(tl.float32)).to(a.dtype)
    if OP == "round":
        y = (a.to(tl.float32) * 1.37).to(a.dtype)
    tl.store(y_ptr + offs, y)
    tl.store(sum_ptr, tl.sum(a, 0).to(tl.float32))
    tl.store(max_ptr, tl.max(a, 0).to(tl.float32))
    square = tl.dot(a.reshape(8, 8), b.reshape(8, 8))
    tl.store(dot_ptr + offs, square.reshape(64))

@pytest.mark.parametrize("name", OPS)
def test_bf16_is_that_of_torch(name: str, draw) -> None:
    a, b = draw(64).bfloat16(), draw(64, seed=1).bfloat16()
    y, wide = torch.empty_like(a), torch.empty(66)
    _apply_kernel[(1,)](a, b, y, wide[64:], wide[65:], wide, name)
    assert torch.equal(y, OPS[name](a, b))
    assert wide[64] == pytest.approx(a.float().sum().item(), rel=1e-2)
    assert wide[65] == a.float().max()
    torch.testing.assert_close(wide[:64].view(8, 8), a.view(8, 8).float() @ b.view(8, 8).float())

def test_nan_stays_nan_and_infinity_infinity() -> None:
    values = torch.tensor([float("nan"), float("inf"), -float("inf"), 3.4e38, 1.0, -0.0])
    bits = torch.from_numpy(interpreter.narrow(values.numpy()).view("int16"))
    assert torch.equal(bits.view(torch.bfloat16).isnan(), values.isnan())
    assert torch.equal(bits.view(torch.bfloat16)[1:], values.bfloat16()[1:])
