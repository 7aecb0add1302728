"""kernels/rope_triton.py in the interpreter, by the pass rule of the eager path."""

from typing import NamedTuple
import pytest
import torch
from kernels.norm import rms_norm_reference
from kernels.rope import norm_rope, rope, rope_angles, rope_reference
from tests.kernels import interpreter

interpreter.require()
pytestmark = pytest.mark.filterwarnings("ignore:(divide by zero|invalid value)")  # in masked rows

# By tiles: one with few rows, one, two, and several a program of which the last has none to walk.
SHAPES = [(1, 1, 2), (7, 3, 6), (5, 4, 200), (42, 6, 64), (37, 5, 24)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]

class Form(NamedTuple):
    """`norm_rope` where there is an eps, else `rope`."""

    eps: float | None = None
    offset: float = 0.0

FORMS = {
    "all": Form(),
    "normed": Form(eps=1e-2),
    "normed_offset": Form(eps=1e-6, offset=1.0),
    "normed_exact": Form(eps=0.0),
}

def ops(form: str, shape: tuple[int, int, int], dtype: torch.dtype):
    eps, offset = FORMS[form]
    positions_N = torch.arange(shape[0]) * 3
    cos_sin_2NE = rope_angles(positions_N, head_dim=shape[2], theta=1e4, dtype=dtype)

    def mine(x_NHD, weight_D=None):
        if eps is None:
            return rope(x_NHD, cos_sin_2NE, impl="triton")
        return norm_rope(x_NHD, weight_D, cos_sin_2NE, eps=eps, offset=offset, impl="triton")

    def true(x_NHD, weight_D=None):
        if eps is not None:
            x_NHD = rms_norm_reference(x_NHD, weight_D, eps=eps, offset=offset)
        return rope_reference(x_NHD, cos_sin_2NE.to(x_NHD.dtype))

    return mine, true

def make(form: str, shape: tuple[int, int, int], draw) -> dict[str, torch.Tensor]:
    x = {"x_NHD": draw(*shape)}
    if FORMS[form].eps is None:
        return x
    return x | {"weight_D": 1 - FORMS[form].offset + 0.1 * draw(shape[2])}

@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_error_budget(shape, dtype, form, draw, within_budget, poisoned) -> None:
    assert within_budget(*ops(form, shape, dtype), make(form, shape, draw), dtype)

def test_bf16_gradients_over_many_rows(draw, within_budget) -> None:
    shape = (512, 4, 16)
    inputs = make("normed", shape, draw)
    assert within_budget(*ops("normed", shape, torch.bfloat16), inputs, torch.bfloat16)

@pytest.mark.parametrize(
    ("form", "old", "new"),
    [
        ("all", "x1 * cos - x2 * sin", "x1 * cos + x2 * sin"),
        ("all", "sin = -sin", "sin = sin"),
        ("all", "(token * stride_xn + offs_r % H", "(token * stride_xn + offs_r % 2"),
                ("normed", "sin = -sin", "sin = sin"),
        ("normed", "/ D + eps)", "/ D + 2 * eps)"),
        ("normed", "xhat1 * xhat1 + xhat2 * xhat2, 1", "xhat1 * xhat1 + xhat1 * xhat1, 1"),
        ("normed", "(token * stride_sn + offs_r % H", "(token * stride_sn + offs_r % 2"),
        ("normed", "(y1 - xhat1 * mean)", "y1"),
        ("normed", "dweight2 += y2 * xhat2", "dweight2 += y1 * xhat1"),
        ("normed", "dweight1 += y1 * xhat1", "dweight1 = y1 * xhat1"),
        ("normed", "pid + step * tl.num_programs(0)", "pid + step"),
        ("normed_offset", "+ E + offs_e, mask=in_e, other=0.0).to(tl.float32) + offset",
         "+ E + offs_e, mask=in_e, other=0.0).to(tl.float32)"),
        ("normed_exact", "tl.where(in_r, rstd, 0.0)", "rstd"),
    ],
)  # fmt: skip
def test_error_budget_sees_a_mutant(
    form, old, new, draw, within_budget, monkeypatch, tmp_path
) -> None:
    interpreter.mutate(monkeypatch, tmp_path, "kernels.rope_triton", old, new)
    inputs = make(form, SHAPES[-1], draw)
    assert not within_budget(*ops(form, SHAPES[-1], torch.float32), inputs, torch.float32)

@pytest.mark.parametrize("form", ["all", "normed"])
def test_strided_heads_and_no_rows(form, draw) -> None:
    fused_NHD, shape = draw(7, 5, 8).float(), (7, 2, 8)
    op, reference = ops(form, shape, torch.float32)
    weights = {k: w.float() for k, w in make(form, shape, draw).items() if k != "x_NHD"}
    weights = {name: weight.requires_grad_() for name, weight in weights.items()}

    def gradients(function, x_NHD):
        """Of the fused tensor, where the output's gradient is strided too."""
        leaves = [fused_NHD.clone().requires_grad_(), *weights.values()]
        y_NHD = function(x_NHD(leaves[0]), **weights)
        dy_NHD = fused_NHD.roll(1, 0)[:, 2:4]
        return [y_NHD, *torch.autograd.grad(y_NHD, leaves, dy_NHD)]

    part = lambda x_NHD: x_NHD[:, 1:3]  # noqa: E731
    turned = lambda x_NHD: part(x_NHD).transpose(0, 2).contiguous().transpose(0, 2)  # noqa: E731
    true = gradients(reference, part)
    for layout in (part, turned):
        torch.testing.assert_close(gradients(op, layout), true)
    none_NHD = fused_NHD[:0, :2].clone().requires_grad_()
    y_NHD = ops(form, (0, 2, 8), torch.float32)[0](none_NHD, **weights)
    grads = torch.autograd.grad(y_NHD.sum(), [none_NHD, *weights.values()])
    assert y_NHD.shape == (0, 2, 8) and not any(grad.any() for grad in grads)

def test_a_frozen_weight_gets_no_partial_sums(draw, monkeypatch) -> None:
    from kernels import rope_triton

    asked, plain = [], rope_triton._launch

    def launch(*args, **kwargs):
        asked.append(kwargs.get("needs_dweight"))
        return plain(*args, **kwargs)

    monkeypatch.setattr(rope_triton, "_launch", launch)
    op, _ = ops("normed", (7, 3, 6), torch.float32)
    x_NHD, weight_D = (t.float() for t in make("normed", (7, 3, 6), draw).values())
    op(x_NHD.requires_grad_(), weight_D).sum().backward()
    assert asked == [None, False] and weight_D.grad is None

def test_refuses_sizes_that_do_not_fit(draw, monkeypatch) -> None:
    monkeypatch.setattr("kernels.rope_triton._rope_kernel", None)  # refused before it is launched
    x_NHD = draw(3, 2, 4).float()
    with pytest.raises(ValueError, match=r"cos_sin has shape \(2, 5, 2\), must be \(2, 3, 2\)"):
        rope(x_NHD, draw(2, 5, 2).float(), impl="triton")
    with pytest.raises(ValueError, match="cos_sin turns 6 channels, must be all 4"):
        rope(x_NHD, draw(2, 3, 3).float(), impl="triton")

@pytest.mark.parametrize(
    ("D", "weight", "cos_sin", "message"),
    [
        (4, (3,), (2, 3, 2), r"weight has shape \(3,\), must be \(4,\)"),
        (4, (4,), (2, 5, 2), r"cos_sin has shape \(2, 5, 2\), must be \(2, 3, 2\)"),
        (4, (4,), (2, 3, 1), "cos_sin turns 2 channels, must be all 4; ask rope_angles for it"),
        (5, (5,), (2, 3, 2), "cos_sin turns 4 channels, must be all 5"),
        (600, (600,), (2, 3, 300), "norm_rope_fwd: size 300, at most 256; pass impl='eager'"),
    ],
)
def test_norm_rope_refuses_sizes_that_do_not_fit(D, weight, cos_sin, message, monkeypatch) -> None:
    monkeypatch.setattr("kernels.rope_triton._rope_kernel", None)
    args = torch.ones(3, 2, D), torch.ones(weight), torch.ones(cos_sin)
    with pytest.raises(ValueError, match=message):
        norm_rope(*args, eps=1e-6, impl="triton")

def test_norm_rope_refuses_a_weight_elsewhere() -> None:
    weight_D = torch.ones(4, device="meta")
    with pytest.raises(ValueError, match="weight is on meta, must be on cpu; move it there"):
        norm_rope(torch.ones(3, 2, 4), weight_D, torch.ones(2, 3, 2), eps=1e-6, impl="triton")
