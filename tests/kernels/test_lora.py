"""kernels/lora.py against its definition, in value and in every gradient."""

from collections.abc import Callable
from functools import partial
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from kernels.dropout import dropout
from kernels.lora import lora_linear, lora_linear_reference

NAMES = ("x_NC", "weight_OC", "a_RC", "b_OR", "bias_O")

def make_inputs(n: int, c: int, o: int, r: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(n + c + o + r)
    shapes = {"x_NC": (n, c), "weight_OC": (o, c), "a_RC": (r, c), "b_OR": (o, r), "bias_O": (o,)}
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64) / shape[-1] ** 0.5
        for name, shape in shapes.items()
    }

def run(op: Callable[..., Tensor], inputs: dict[str, Tensor], scale: float) -> list[Tensor]:
    """Output and the gradient of each input, in float64."""
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in inputs.items()}
    y_NO = op(**leaves, scale=scale)
    weights_NO = torch.linspace(-1, 1, y_NO.numel()).view_as(y_NO)
    (y_NO * weights_NO.to(y_NO.dtype)).sum().backward()
    return [y_NO.detach().double(), *(leaf.grad.double() for leaf in leaves.values())]

def within_budget(op: Callable[..., Tensor], dtype: torch.dtype, sizes: tuple[int, ...]) -> bool:
    """At most 2x (value) and 3x (gradients) the error of the definition in the same dtype."""
    inputs = make_inputs(*sizes)
    exact = run(lora_linear_reference, inputs, 2.0)
    cast = {name: tensor.to(dtype) for name, tensor in inputs.items()}
    eager, ours = run(lora_linear_reference, cast, 2.0), run(op, cast, 2.0)
    errors = zip(exact, eager, ours, (2, 3, 3, 3, 3, 3), strict=True)
    floor = torch.finfo(dtype).eps
    return all(
        (mine - true).abs().max() <= factor * (plain - true).abs().max() + floor * true.abs().max()
        for true, plain, mine, factor in errors
    )

SIZES = [(1, 1, 1, 1), (5, 7, 3, 2), (42, 123, 6, 4), (64, 32, 48, 8), (0, 8, 4, 2)]

@pytest.mark.parametrize("sizes", SIZES[:-1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_budget(dtype: torch.dtype, sizes: tuple[int, ...]) -> None:
    assert within_budget(lora_linear, dtype, sizes)

def test_error_budget_sees_a_wrong_scale() -> None:
    def mutant(*, scale: float, **inputs: Tensor) -> Tensor:
        return lora_linear(**inputs, scale=scale * 1.001)

    assert not within_budget(mutant, torch.float32, (64, 32, 48, 8))

@pytest.mark.parametrize("sizes", SIZES)
def test_equals_the_definition_in_float64(sizes: tuple[int, ...]) -> None:
    inputs = make_inputs(*sizes)
    for ours, true in zip(
        run(lora_linear, inputs, 0.7), run(lora_linear_reference, inputs, 0.7), strict=True
    ):
        torch.testing.assert_close(ours, true, rtol=1e-12, atol=1e-13)

@pytest.mark.parametrize("op", [lora_linear, lora_linear_reference])
def test_gradcheck(op: Callable[..., Tensor]) -> None:
    tensors = [tensor.requires_grad_() for tensor in make_inputs(4, 5, 3, 2).values()]

    def call(*args: Tensor) -> Tensor:
        return op(**dict(zip(NAMES, args, strict=True)), scale=1.5)

    assert torch.autograd.gradcheck(call, tensors)

def test_frozen_weight_gets_no_gradient_and_inputs_stay() -> None:
    inputs = make_inputs(6, 8, 4, 2)
    kept = {name: tensor.clone() for name, tensor in inputs.items()}
    for name in ("x_NC", "a_RC", "b_OR"):
        inputs[name].requires_grad_()
    lora_linear(**inputs, scale=2.0).sum().backward()
    assert inputs["weight_OC"].grad is None and inputs["bias_O"].grad is None
    assert all(inputs[name].grad is not None for name in ("x_NC", "a_RC", "b_OR"))
    assert all(torch.equal(inputs[name], kept[name]) for name in inputs)

def test_wide_factors_keep_their_dtype() -> None:
    inputs = {name: tensor.bfloat16() for name, tensor in make_inputs(6, 8, 4, 2).items()}
    inputs["a_RC"] = inputs["a_RC"].float().requires_grad_()
    inputs["b_OR"] = inputs["b_OR"].float().requires_grad_()
    y_NO = lora_linear(**inputs, scale=2.0)
    y_NO.sum().backward()
    assert y_NO.dtype == torch.bfloat16
    assert inputs["a_RC"].grad.dtype == inputs["b_OR"].grad.dtype == torch.float32

def test_non_contiguous_inputs() -> None:
    inputs = make_inputs(6, 8, 4, 2)
    strided = {name: t.t().contiguous().t() if t.ndim == 2 else t for name, t in inputs.items()}
    assert not strided["x_NC"].is_contiguous()
    torch.testing.assert_close(
        lora_linear(**strided, scale=1.0), lora_linear(**inputs, scale=1.0), rtol=1e-12, atol=1e-13
    )

def test_dropout_drops_and_rescales_the_update_alone() -> None:
    """With A = B = 1 the update shows drop(x) itself."""
    width, p = 64, 0.25
    x_NC, eye = torch.ones(500, width), torch.eye(width)
    torch.manual_seed(0)
    y_NC = lora_linear(x_NC, torch.zeros_like(eye), eye, eye, scale=3.0, dropout=p)
    kept = y_NC != 0
    assert torch.all(y_NC[kept] == torch.tensor(1.0) / (1 - p) * 3.0)
    # 32,000 draws: the standard error of the kept share is 0.0024
    assert abs(kept.float().mean().item() - (1 - p)) < 0.01
    base_NC = lora_linear(x_NC, eye, eye, torch.zeros_like(eye), scale=3.0, dropout=p)
    assert torch.equal(base_NC, x_NC)

def test_gradients_with_dropout_are_those_of_the_mask() -> None:
    inputs = make_inputs(9, 8, 5, 3)

    def composed(x_NC: Tensor, weight_OC: Tensor, a_RC: Tensor, b_OR: Tensor, *, bias_O: Tensor,
                 scale: float) -> Tensor:  # fmt: skip
        kept_NC = dropout(x_NC, 0.4, is_training=True)
        return F.linear(x_NC, weight_OC, bias_O) + scale * (kept_NC @ a_RC.T @ b_OR.T)

    torch.manual_seed(3)
    ours = run(partial(lora_linear, dropout=0.4), inputs, 0.7)
    torch.manual_seed(3)
    for mine, true in zip(ours, run(composed, inputs, 0.7), strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-12, atol=1e-13)

def test_auto_leaves_16_bits_and_ranks_that_fit_to_the_kernels(monkeypatch) -> None:
    seen = []
    monkeypatch.setattr("kernels.backend.uses_triton", lambda *_, fits: seen.append(fits))
    for dtype, rank in ((torch.bfloat16, 128), (torch.bfloat16, 129), (torch.float32, 8)):
        inputs = {name: x.to(dtype) for name, x in make_inputs(3, 4, 5, rank).items()}
        lora_linear(**inputs, scale=1.0)
    assert seen == [True, False, False]
