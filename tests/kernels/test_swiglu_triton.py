"""kernels/swiglu_triton.py in the interpreter, by the pass rule of the eager path."""

from functools import partial
import pytest
import torch
from kernels.swiglu import geglu, geglu_reference, swiglu, swiglu_reference
from tests.kernels import interpreter

interpreter.require()

GEGLU = partial(geglu, impl="triton")
OPS = {
    "swiglu": (partial(swiglu, impl="triton"), swiglu_reference),
    "geglu": (partial(GEGLU, uses_tanh=False), partial(geglu_reference, uses_tanh=False)),
    "geglu_tanh": (partial(GEGLU, uses_tanh=True), partial(geglu_reference, uses_tanh=True)),
}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]

@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (6, 42), (123, 43)])
@pytest.mark.parametrize("name", OPS)
def test_error_budget(name, shape, dtype, draw, within_budget, poisoned) -> None:
    inputs = {"gate_NF": 3 * draw(*shape), "up_NF": draw(*shape, seed=1)}
    assert within_budget(*OPS[name], inputs, dtype)

@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("swiglu", "density = cdf * (1 - cdf)\n", "density = cdf\n"),
        ("geglu", "0.3989422804014327", "0.3989"),
        ("geglu", "0.7071067811865476", "0.7071"),
        ("geglu_tanh", "(1 + 3 * 0.044715", "(1 + 2 * 0.044715"),
        ("swiglu", "(dy * value)", "(dy * gate)"),
        ("swiglu", "KIND)[0] * up", "KIND)[0]"),
    ],
)
def test_error_budget_sees_a_mutant(
    name, old, new, draw, within_budget, monkeypatch, tmp_path
) -> None:
    interpreter.mutate(monkeypatch, tmp_path, "kernels.swiglu_triton", old, new)
    inputs = {"gate_NF": draw(6, 42), "up_NF": draw(6, 42, seed=1)}
    assert not within_budget(*OPS[name], inputs, torch.float32)

def test_strided_inputs_and_no_rows(draw) -> None:
    gate_NF, up_NF = draw(6, 16).float().split(8, dim=1)
    torch.testing.assert_close(OPS["swiglu"][0](gate_NF, up_NF), swiglu(gate_NF, up_NF))
    assert OPS["swiglu"][0](gate_NF[:0], up_NF[:0]).shape == (0, 8)

def test_refuses_what_does_not_fit(draw) -> None:
    with pytest.raises(ValueError, match=r"up has shape \(3, 4\), must be \(3, 5\)"):
        OPS["swiglu"][0](draw(3, 5).float(), draw(3, 4).float())
    with pytest.raises(ValueError, match="up is torch.float64, must be torch.float32"):
        OPS["swiglu"][0](draw(3, 5).float(), draw(3, 5))
