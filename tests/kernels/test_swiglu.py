"""kernels/swiglu.py against its definitions."""

from functools import partial
import pytest
import torch
from kernels.swiglu import geglu, geglu_reference, swiglu, swiglu_reference

OPS = {
    "swiglu": (swiglu, swiglu_reference),
    "geglu": (partial(geglu, uses_tanh=False), partial(geglu_reference, uses_tanh=False)),
    "geglu_tanh": (partial(geglu, uses_tanh=True), partial(geglu_reference, uses_tanh=True)),
}

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (6, 42), (123, 431)])
@pytest.mark.parametrize("name", OPS)
def test_error_budget(name, shape, dtype, draw, within_budget) -> None:
    inputs = {"gate_NF": 3 * draw(*shape), "up_NF": draw(*shape, seed=1)}
    assert within_budget(*OPS[name], inputs, dtype)

@pytest.mark.parametrize("name", OPS)
def test_error_budget_sees_a_mutant(name, draw, within_budget) -> None:
    inputs = {"gate_NF": draw(6, 42), "up_NF": draw(6, 42, seed=1)}
    op, reference = OPS[name]
    swapped = lambda gate_NF, up_NF: op(up_NF, gate_NF)  # noqa: E731
    scaled = lambda gate_NF, up_NF: op(gate_NF * 1.0001, up_NF)  # noqa: E731
    others = [other for other, _ in OPS.values() if other is not op]
    for mutant in (swapped, scaled, *others):
        assert not within_budget(mutant, reference, inputs, torch.float32)

@pytest.mark.parametrize("name", OPS)
def test_gradcheck(name, draw) -> None:
    inputs = [draw(3, 4).requires_grad_(), draw(3, 4, seed=1).requires_grad_()]
    assert torch.autograd.gradcheck(OPS[name][1], inputs)
