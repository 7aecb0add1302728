"""kernels/norm_triton.py in the interpreter, by the pass rule of the eager path."""

from functools import partial
import pytest
import torch
from kernels.norm import (
    layer_norm,
    layer_norm_reference,
    rms_norm,
    rms_norm_reference,
)
from tests.kernels import interpreter

interpreter.require()

RMS, LAYER = partial(rms_norm, impl="triton"), partial(layer_norm, impl="triton")
OPS = {
    "rms_norm": (RMS, rms_norm_reference),
    "rms_norm_offset": (partial(RMS, offset=1.0), partial(rms_norm_reference, offset=1.0)),
    "layer_norm": (LAYER, layer_norm_reference),
    "layer_norm_plain": (partial(LAYER, bias_C=None), partial(layer_norm_reference, bias_C=None)),
}
ADD_OPS = {
    "add_rms_norm": (rms_norm, rms_norm_reference),
    "add_layer_norm": (layer_norm, layer_norm_reference),
}
SHAPES = [(1, 2), (6, 42), (300, 7), (5, 3, 33), (37, 431)]  # 300: several tiles a program
DTYPES = [torch.float32, torch.float16, torch.bfloat16]

def make(name: str, shape: tuple[int, ...], draw) -> dict[str, torch.Tensor]:
    inputs = {"x_NC": 2 * draw(*shape) + 0.5, "weight_C": 1 + 0.1 * draw(shape[-1])}
    if name.startswith("add"):
        inputs["residual_NC"] = draw(*shape, seed=2)
    has_bias = name in ("layer_norm", "add_layer_norm")
    return inputs | ({"bias_C": draw(shape[-1], seed=1)} if has_bias else {})

def add_ops(name: str, impl: str = "triton"):
    """Both outputs as one, so that both gradients arrive."""
    op, reference = ADD_OPS[name]

    def mine(**inputs):
        return torch.stack(op(**inputs, eps=1e-6, impl=impl))

    def true(x_NC, residual_NC, **inputs):
        sum_NC = x_NC + residual_NC
        return torch.stack([reference(sum_NC, **inputs, eps=1e-6), sum_NC])

    return mine, true

@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", OPS)
def test_error_budget(name, shape, dtype, draw, within_budget, poisoned) -> None:
    op, reference = (partial(function, eps=1e-6) for function in OPS[name])
    assert within_budget(op, reference, make(name, shape, draw), dtype)

@pytest.mark.parametrize("impl", ["triton", "eager"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ADD_OPS)
def test_error_budget_with_a_residual(name, dtype, impl, draw, within_budget, poisoned) -> None:
    assert within_budget(*add_ops(name, impl), make(name, (37, 42), draw), dtype)

@pytest.mark.parametrize("name", OPS)
def test_bf16_gradients_over_many_rows(name, draw, within_budget) -> None:
    op, reference = (partial(function, eps=1e-6) for function in OPS[name])
    assert within_budget(op, reference, make(name, (1024, 16), draw), torch.bfloat16)

@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("/ C + eps)", "/ C + 2 * eps)"),
        ("x - mean[:, None], 0.0)", "x - mean[:, None], -mean[:, None])"),
        ("dx -= (tl.sum(g, 1) / C)", "dx -= (tl.sum(g, 1) / BLOCK_C)"),
        ("dweight += dy * xhat", "dweight = dy * xhat"),
        ("dbias += dy", "dbias += g"),
    ],
)
def test_error_budget_sees_a_mutant(old, new, draw, within_budget, monkeypatch, tmp_path) -> None:
    interpreter.mutate(monkeypatch, tmp_path, "kernels.norm_triton", old, new)
    op, reference = (partial(function, eps=1e-2) for function in OPS["layer_norm"])
    assert not within_budget(op, reference, make("layer_norm", (300, 7), draw), torch.float32)

def test_error_budget_sees_a_lost_gradient_of_the_sum(
    draw, within_budget, monkeypatch, tmp_path
) -> None:
    interpreter.mutate(
        monkeypatch, tmp_path, "kernels.norm_triton", "if dsum_ptr is not None", "if False"
    )
    inputs = make("add_rms_norm", (6, 42), draw)
    assert not within_budget(*add_ops("add_rms_norm"), inputs, torch.float32)

def test_frozen_weights_get_no_partial_sums(draw, monkeypatch) -> None:
    from kernels import norm_triton

    x_NC = draw(6, 42).float().requires_grad_()
    layer_norm(x_NC, draw(42).float(), draw(42).float(), eps=1e-6, impl="triton")
    needs = []
    plain = norm_triton._launch_bwd
    monkeypatch.setattr(norm_triton, "_launch_bwd", lambda *a: needs.append(a[-1]) or plain(*a))
    rms_norm(x_NC, draw(42).float(), eps=1e-6, impl="triton").sum().backward()
    assert needs == [[False, False]]

def test_strided_rows_and_no_rows(draw) -> None:
    x_NC, weight_C = draw(8, 12).float(), draw(12).float()
    true_NC = rms_norm(x_NC, weight_C, eps=1e-6)
    strided_NC = x_NC.t().contiguous().t()
    torch.testing.assert_close(RMS(strided_NC, weight_C, eps=1e-6), true_NC)
    assert RMS(x_NC[:0], weight_C, eps=1e-6).shape == (0, 12)
    apart_C = draw(24).float()[::2]
    true_NC = layer_norm(x_NC, apart_C, apart_C.flip(0), eps=1e-6)
    torch.testing.assert_close(LAYER(x_NC, apart_C, apart_C.flip(0), eps=1e-6), true_NC)

def test_refuses_sizes_that_do_not_fit(draw) -> None:
    x_NC = draw(2, 12).float()
    with pytest.raises(ValueError, match=r"weight has shape \(11,\), must be \(12,\)"):
        RMS(x_NC, draw(11).float(), eps=1e-6)
    with pytest.raises(ValueError, match="residual is torch.float64, must be torch.float32"):
        RMS(x_NC, draw(12).float(), residual_NC=draw(2, 12), eps=1e-6)
    wide_NC = torch.zeros(1, 16385)
    with pytest.raises(ValueError, match="norm_fwd: size 16385, at most 16384; pass impl='eager'"):
        RMS(wide_NC, wide_NC[0], eps=1e-6)
