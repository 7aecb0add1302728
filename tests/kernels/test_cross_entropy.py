"""kernels/cross_entropy.py against its definition, over one chunk and over several."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernels import cross_entropy
from kernels.cross_entropy import linear_cross_entropy, linear_cross_entropy_reference

SIZES = [(1, 1, 2), (7, 5, 3), (42, 6, 123), (33, 16, 431)]  # rows, width, classes


@pytest.fixture
def make(draw: Callable[..., Tensor]) -> Callable[..., dict[str, Tensor]]:
    def inputs(M: int, C: int, V: int) -> dict[str, Tensor]:
        return {"h_MC": draw(M, C), "weight_VC": draw(V, C) / C**0.5, "bias_V": draw(V)}

    return inputs


def targets(M: int, V: int) -> tuple[Tensor, Tensor]:
    """Labels, and weights among which are zeros and fractions."""
    generator = torch.Generator().manual_seed(M)
    labels_M = torch.randint(0, V, (M,), generator=generator)
    return labels_M, torch.tensor([1.0, 0.0, 0.25]).repeat(M)[:M]


def ops(
    M: int, V: int, factor: float = 1.0, cap: float | None = None, cap_factor: float = 1.0
) -> tuple[Callable[..., Tensor], ...]:
    labels_M, weights_M = targets(M, V)

    def op(h_MC: Tensor, weight_VC: Tensor, bias_V: Tensor) -> Tensor:
        weights = weights_M * factor
        softcap = None if cap is None else cap * cap_factor
        args = (h_MC, weight_VC, labels_M, weights)
        return linear_cross_entropy(*args, bias_V=bias_V, softcap=softcap)[0]

    def reference(h_MC: Tensor, weight_VC: Tensor, bias_V: Tensor) -> Tensor:
        args = (h_MC, weight_VC, labels_M, weights_M, bias_V)
        return linear_cross_entropy_reference(*args, softcap=cap)[0]

    return op, reference


@pytest.mark.parametrize("cap", [None, 1.5])
@pytest.mark.parametrize("chunk", [5, 2048])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", SIZES)
def test_error_budget(sizes, dtype, chunk, cap, make, within_budget, monkeypatch) -> None:
    monkeypatch.setattr(cross_entropy, "CHUNK_ROWS", chunk)
    op, reference = ops(sizes[0], sizes[2], cap=cap)
    assert within_budget(op, reference, make(*sizes), dtype)


@pytest.mark.parametrize("change", [{"factor": 1.0001}, {"cap": 1.5, "cap_factor": 1.001}])
def test_error_budget_sees_a_mutant(change, make, within_budget) -> None:
    mutant, reference = ops(42, 123, **change)
    assert not within_budget(mutant, reference, make(42, 6, 123), torch.float32)


@pytest.mark.parametrize("cap", [None, 1.5])
@pytest.mark.parametrize("which", [0, 1])
def test_gradcheck(which: int, cap: float | None, make, monkeypatch) -> None:
    monkeypatch.setattr(cross_entropy, "CHUNK_ROWS", 3)
    tensors = [tensor.requires_grad_() for tensor in make(7, 5, 3).values()]
    assert torch.autograd.gradcheck(ops(7, 3, cap=cap)[which], tensors)


def test_sum_and_weight(make) -> None:
    inputs = make(7, 5, 3)
    labels_M, weights_M = targets(7, 3)
    loss, weight = linear_cross_entropy(inputs["h_MC"], inputs["weight_VC"], labels_M, weights_M)
    nll_M = -(inputs["h_MC"] @ inputs["weight_VC"].T).log_softmax(-1)[range(7), labels_M]
    torch.testing.assert_close(loss, (nll_M * weights_M).sum())
    assert weight == 1.0 * 3 + 0.25 * 2


def test_forms_only_the_gradients_asked_for(make) -> None:
    inputs = make(7, 5, 3)
    labels_M, weights_M = targets(7, 3)
    inputs["h_MC"].requires_grad_()
    loss, _ = linear_cross_entropy(inputs["h_MC"], inputs["weight_VC"], labels_M, weights_M)
    dh_MC, dweight_VC, dbias_V = loss.grad_fn.saved_tensors
    assert dh_MC is not None and dweight_VC is None and dbias_V is None


def test_forms_no_gradient_without_grad_mode(make, monkeypatch) -> None:
    inputs = {name: tensor.requires_grad_() for name, tensor in make(7, 5, 3).items()}
    monkeypatch.setattr(torch.Tensor, "scatter_add_", None)  # the first step of the gradients
    labels_M, weights_M = targets(7, 3)
    with torch.no_grad():
        linear_cross_entropy(inputs["h_MC"], inputs["weight_VC"], labels_M, weights_M)
    with pytest.raises(TypeError):
        linear_cross_entropy(inputs["h_MC"], inputs["weight_VC"], labels_M, weights_M)


def test_no_rows_weigh_nothing(make) -> None:
    inputs = make(7, 5, 3)
    weight_VC = inputs["weight_VC"].requires_grad_()
    none = torch.zeros(0, dtype=torch.long)
    loss, weight = linear_cross_entropy(inputs["h_MC"][:0], weight_VC, none, torch.zeros(0))
    loss.backward()
    assert loss == weight == 0 and not weight_VC.grad.any()
