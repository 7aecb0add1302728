"""kernels/swiglu.py against its definition."""

import pytest
import torch

from kernels.swiglu import swiglu, swiglu_reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (6, 42), (123, 431)])
def test_error_budget(shape, dtype, draw, within_budget) -> None:
    inputs = {"gate_NF": 3 * draw(*shape), "up_NF": draw(*shape, seed=1)}
    assert within_budget(swiglu, swiglu_reference, inputs, dtype)


def test_error_budget_sees_a_mutant(draw, within_budget) -> None:
    inputs = {"gate_NF": draw(6, 42), "up_NF": draw(6, 42, seed=1)}
    swapped = lambda gate_NF, up_NF: swiglu(up_NF, gate_NF)  # noqa: E731
    scaled = lambda gate_NF, up_NF: swiglu(gate_NF * 1.0001, up_NF)  # noqa: E731
    for mutant in (swapped, scaled):
        assert not within_budget(mutant, swiglu_reference, inputs, torch.float32)


def test_gradcheck(draw) -> None:
    inputs = [draw(3, 4).requires_grad_(), draw(3, 4, seed=1).requires_grad_()]
    assert torch.autograd.gradcheck(swiglu_reference, inputs)
