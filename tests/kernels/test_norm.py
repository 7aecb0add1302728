"""kernels/norm.py against its definitions."""

from functools import partial
import pytest
import torch
from kernels.norm import layer_norm, layer_norm_reference, rms_norm, rms_norm_reference

OPS = {
    "rms_norm": (rms_norm, rms_norm_reference),
    "rms_norm_offset": (partial(rms_norm, offset=1.0), partial(rms_norm_reference, offset=1.0)),
    "layer_norm": (layer_norm, layer_norm_reference),
    "layer_norm_plain": (
        partial(layer_norm, bias_C=None),
        partial(layer_norm_reference, bias_C=None),
    ),
}
SHAPES = [(33,), (1, 2), (6, 42), (123, 7), (5, 3, 33), (64, 431)]

def make(name: str, shape: tuple[int, ...], draw) -> dict[str, torch.Tensor]:
    inputs = {"x_NC": 2 * draw(*shape) + 0.5, "weight_C": 1 + 0.1 * draw(shape[-1])}
    return inputs | ({"bias_C": draw(shape[-1], seed=1)} if name == "layer_norm" else {})

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", OPS)
def test_error_budget(name, shape, dtype, draw, within_budget) -> None:
    op, reference = (partial(function, eps=1e-6) for function in OPS[name])
    assert within_budget(op, reference, make(name, shape, draw), dtype)

@pytest.mark.parametrize("name", OPS)
def test_error_budget_sees_a_wrong_eps(name, draw, within_budget) -> None:
    op, reference = OPS[name]
    mutant, reference = partial(op, eps=1e-3), partial(reference, eps=1e-6)
    assert not within_budget(mutant, reference, make(name, (6, 42), draw), torch.float32)

def test_offset_is_added_before_rounding() -> None:
    """1 + w in bf16 would round a gain of 3 thousandths away."""
    x_NC = torch.arange(1, 65)[None].bfloat16()
    weight_C = torch.full((64,), 0.003).bfloat16()
    true_NC = rms_norm(x_NC.float(), weight_C.float() + 1, eps=0.0).bfloat16()
    assert torch.equal(rms_norm(x_NC, weight_C, eps=0.0, offset=1.0), true_NC)
    assert not torch.equal(rms_norm(x_NC, weight_C + 1, eps=0.0), true_NC)

@pytest.mark.parametrize("name", OPS)
def test_gradcheck(name, draw) -> None:
    inputs = [tensor.requires_grad_() for tensor in make(name, (3, 5), draw).values()]
    assert torch.autograd.gradcheck(partial(OPS[name][1], eps=1e-6), inputs)

@pytest.mark.parametrize("name", OPS)
def test_non_contiguous_rows(name, draw) -> None:
    op, reference = OPS[name]
    inputs = make(name, (8, 12), draw)
    inputs["x_NC"] = inputs["x_NC"].t().contiguous().t()
    torch.testing.assert_close(op(**inputs, eps=1e-6), reference(**inputs, eps=1e-6))

@pytest.mark.parametrize("name", OPS)
def test_bf16_gradients_over_many_rows(name, draw, within_budget) -> None:
    """A sum over rows that is kept in bf16 stops growing after some 256 of them."""
    op, reference = (partial(function, eps=1e-6) for function in OPS[name])
    assert within_budget(op, reference, make(name, (2048, 16), draw), torch.bfloat16)

def test_statistics_of_bf16_rows_are_wide() -> None:
    """Squares of 300 sum beyond what bf16 can count: the mean must be formed in fp32."""
    x_NC = torch.full((1, 4096), 300.0, dtype=torch.bfloat16)
    ones_C = torch.ones(4096, dtype=torch.bfloat16)
    assert torch.equal(rms_norm(x_NC, ones_C, eps=0.0), torch.ones_like(x_NC))

@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1, 768), (4, 384), (17, 100), (333, 256)])
def test_without_gradients_the_bits_are_the_same(dtype, shape) -> None:
    """PPO scores answers without gradients by what it trains with, and asserts a ratio of 1."""
    x_NC = (3 * torch.randn(shape) + 1).to(dtype)
    weight_C, bias_C = torch.randn(2, shape[1]).to(dtype)
    for norm in (partial(layer_norm, bias_C=bias_C), partial(layer_norm, bias_C=None), rms_norm):
        with_grad = norm(x_NC.clone().requires_grad_(), weight_C, eps=1e-5)
        with torch.no_grad():
            assert torch.equal(norm(x_NC, weight_C, eps=1e-5), with_grad)
