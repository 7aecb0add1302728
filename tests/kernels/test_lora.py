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

def run(
    op: Callable[..., Tensor], inputs: dict[str, Tensor], scale: float | Tensor
) -> list[Tensor]:
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

RANKS = (3, 8, 4, 5)

@pytest.mark.parametrize("op", [lora_linear, lora_linear_reference])
def test_rows_that_choose_an_adapter_are_as_with_it_alone(op, adapters) -> None:
    inputs = make_inputs(42, 12, 6, sum(RANKS))
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in inputs.items()}
    rule = adapters(42, RANKS)
    adapter_N, owner_R = rule["choice"]
    weights_NO = torch.linspace(-1, 1, 42 * 6, dtype=torch.float64).view(42, 6)
    y_NO = op(**leaves, **rule)
    y_NO.backward(weights_NO)
    for adapter in (-1, 0, 1, 2, 3):
        rows, mine = adapter_N == adapter, owner_R == adapter
        alone = {name: tensor.clone() for name, tensor in inputs.items()}
        alone |= {"x_NC": alone["x_NC"][rows], "a_RC": alone["a_RC"][mine]}
        alone["b_OR"] = alone["b_OR"][:, mine]
        for tensor in alone.values():
            tensor.requires_grad_()
        scale = rule["scale"][mine][0].item() if adapter >= 0 else 1.0
        true_NO = lora_linear(**alone, scale=scale)
        true_NO.backward(weights_NO[rows])
        for found, true in (
            (y_NO[rows], true_NO),
            (leaves["x_NC"].grad[rows], alone["x_NC"].grad),
            (leaves["a_RC"].grad[mine], alone["a_RC"].grad),
            (leaves["b_OR"].grad[:, mine], alone["b_OR"].grad),
        ):
            torch.testing.assert_close(found, true, rtol=1e-12, atol=1e-12)
    assert (adapter_N == -1).any() and not (adapter_N == 2).any()
    assert not leaves["a_RC"].grad[owner_R == 2].any()

def test_rows_of_no_adapter_are_the_frozen_map_to_the_bit(adapters) -> None:
    inputs = {name: tensor.float() for name, tensor in make_inputs(42, 123, 61, 20).items()}
    for name in ("a_RC", "b_OR"):
        inputs[name].requires_grad_()
    rule = adapters(42, RANKS)
    none_N = rule["choice"][0] == -1
    y_NO = lora_linear(**inputs, **rule, dropout=0.1)
    frozen_NO = F.linear(inputs["x_NC"], inputs["weight_OC"], inputs["bias_O"])
    assert torch.equal(y_NO[none_N], frozen_NO[none_N])
    assert not torch.equal(y_NO, frozen_NO)
    y_NO[none_N].sum().backward()
    assert not inputs["a_RC"].grad.any() and not inputs["b_OR"].grad.any()

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_budget_of_several_adapters(dtype, adapters, within_budget) -> None:
    inputs, rule = make_inputs(42, 12, 6, sum(RANKS)), adapters(42, RANKS)
    op, reference = partial(lora_linear, **rule), partial(lora_linear_reference, **rule)
    assert within_budget(op, reference, inputs, dtype)
    adapter_N, owner_R = rule["choice"]
    for mutant in (
        partial(op, choice=(adapter_N.clamp(min=0), owner_R)),
        partial(op, choice=(adapter_N, owner_R.roll(1))),
        partial(op, scale=1.0),
    ):
        assert not within_budget(mutant, reference, inputs, dtype)

def test_gradients_of_several_adapters_with_dropout(adapters) -> None:
    inputs, rule = make_inputs(42, 12, 6, sum(RANKS)), adapters(42, RANKS)
    adapter_N, owner_R = rule.pop("choice")
    chosen_NR = (adapter_N[:, None] == owner_R).double()

    def composed(x_NC: Tensor, weight_OC: Tensor, a_RC: Tensor, b_OR: Tensor, *, bias_O: Tensor,
                 scale: Tensor) -> Tensor:  # fmt: skip
        h_NR = dropout(x_NC, 0.4, is_training=True) @ a_RC.T * chosen_NR
        return F.linear(x_NC, weight_OC, bias_O) + h_NR @ (scale * b_OR).T

    torch.manual_seed(3)
    op = partial(lora_linear, dropout=0.4, choice=(adapter_N, owner_R))
    ours = run(op, inputs, rule["scale"])
    torch.manual_seed(3)
    for mine, true in zip(ours, run(composed, inputs, rule["scale"]), strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-12, atol=1e-13)

@pytest.mark.parametrize("impl", ["eager", "triton"])
def test_refuses_a_choice_that_does_not_fit(impl: str) -> None:
    """With either `impl`, and before it is asked whether that one can run."""
    inputs = {name: tensor.float() for name, tensor in make_inputs(6, 8, 4, 2).items()}
    adapter_N, owner_R = torch.zeros(6, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)

    def refuse(message: str, scale: float | Tensor = 1.0, adapter_N: Tensor = adapter_N,
               owner_R: Tensor = owner_R) -> None:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            lora_linear(**inputs, scale=scale, choice=(adapter_N, owner_R), impl=impl)

    refuse(r"adapter has shape \(1,\), must be \(6,\)", adapter_N=adapter_N[:1])
    refuse(r"owner has shape \(2, 1\), must be \(2,\)", owner_R=owner_R[:, None])
    refuse("adapter is torch.int64, must be torch.int32; cast it", adapter_N=adapter_N.long())
    refuse("owner is torch.float32, must be torch.int32; cast it", owner_R=owner_R.float())
    refuse("owner is on meta, must be on cpu; move it there", owner_R=owner_R.to("meta"))
    refuse(r"scale has shape \(3,\), must be \(2,\)", scale=torch.ones(3))
    refuse("scale is on meta, must be on cpu; move it there", scale=torch.ones(2, device="meta"))
