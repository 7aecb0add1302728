"""RMSNorm and LayerNorm over the last axis.

Letters: N rows, C width.

RMSNorm     y = (w + offset) x rstd,   rstd = (mean(x^2) + eps)^(-1/2), offset 0 (Gemma: 1)
LayerNorm   y = w (x - mean) rstd + b, rstd = (var(x) + eps)^(-1/2), b may be left out
backward    RMSNorm: with g = w dy, dx = rstd (g - xhat mean(g xhat)), dw = sum_N dy xhat
            LayerNorm: dx = rstd (g - mean(g) - xhat mean(g xhat)), dw as above, db = sum_N dy
residual    s = x + residual is normed, and returned beside y; ds comes on top of the dx of y
dtypes      statistics in fp32 whatever the compute dtype; y in the compute dtype
GPU         kernels/norm_triton.py, which reads and writes every value once

source      Zhang and Sennrich 2019, arXiv:1910.07467; Ba et al. 2016, arXiv:1607.06450"""

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from kernels.backend import Impl, kernels_of
from kernels.launch import MAX_NORM_WIDTH

def rms_norm_reference(x_NC: Tensor, weight_C: Tensor, *, eps: float, offset: float = 0) -> Tensor:
    """The definition. In float64 it is the oracle."""
    wide_NC = x_NC if x_NC.dtype == torch.float64 else x_NC.float()
    rstd_N1 = (wide_NC.square().mean(-1, keepdim=True) + eps).rsqrt()
    return (weight_C + offset) * (wide_NC * rstd_N1).to(x_NC.dtype)

def layer_norm_reference(x_NC: Tensor, weight_C: Tensor, bias_C: Tensor | None, *,
                         eps: float) -> Tensor:
    """The definition. In float64 it is the oracle."""
    wide_NC = x_NC if x_NC.dtype == torch.float64 else x_NC.float()
    centred_NC = wide_NC - wide_NC.mean(-1, keepdim=True)
    rstd_N1 = (centred_NC.square().mean(-1, keepdim=True) + eps).rsqrt()
    scaled_NC = weight_C * (centred_NC * rstd_N1).to(x_NC.dtype)
    return scaled_NC if bias_C is None else scaled_NC + bias_C

def _normed(x_NC: Tensor, weight_C: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    """y and rstd of RMSNorm."""
    wide = torch.promote_types(x_NC.dtype, torch.float32)
    wide_NC = x_NC.to(wide)
    norm_N1 = torch.linalg.vector_norm(wide_NC, dim=-1, keepdim=True)
    rstd_N1 = norm_N1.square_().div_(x_NC.shape[-1]).add_(eps).rsqrt_()
    xhat_NC = wide_NC * rstd_N1
    if offset:  # numerics: 1 + w in bf16 would round the small w away
        return xhat_NC.mul_(weight_C.to(wide) + offset).to(x_NC.dtype), rstd_N1
    return xhat_NC.to(x_NC.dtype).mul_(weight_C), rstd_N1

class _RMSNorm(torch.autograd.Function):
    """Keeps x and rstd. torch's own, on a CPU, is a chain of some 20 operations in both passes: in
    bf16 this takes 0.84 of its time at 220 x 256 and 0.57 at 1700 x 256."""

    @staticmethod
    def forward(ctx: FunctionCtx, x_NC: Tensor, weight_C: Tensor, eps: float,
                offset: float) -> Tensor:
        y_NC, rstd_N1 = _normed(x_NC, weight_C, eps, offset)
        ctx.save_for_backward(x_NC, weight_C, rstd_N1)
        ctx.offset = offset
        return y_NC

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dy_NC: Tensor) -> tuple[Tensor | None, ...]:
        x_NC, weight_C, rstd_N1 = ctx.saved_tensors
        wide = rstd_N1.dtype
        xhat_NC = x_NC.to(wide) * rstd_N1
        dy_NC = dy_NC.to(wide)
        dx_NC = dweight_C = None
        if ctx.needs_input_grad[1]:
            dweight_C = (dy_NC * xhat_NC).reshape(-1, len(weight_C)).sum(0).to(weight_C.dtype)
        if ctx.needs_input_grad[0]:
            g_NC = dy_NC * (weight_C.to(wide) + ctx.offset)
            mean_N1 = (g_NC * xhat_NC).mean(-1, keepdim=True)
            dx_NC = g_NC.addcmul_(xhat_NC, mean_N1, value=-1).mul_(rstd_N1).to(x_NC.dtype)
        return dx_NC, dweight_C, None, None

def rms_norm(x_NC: Tensor, weight_C: Tensor, *, eps: float, offset: float = 0.0,
             residual_NC: Tensor | None = None,
             impl: Impl = "auto") -> Tensor | tuple[Tensor, Tensor]:
    """Root-mean-square norm over the last axis; any leading axes.

    x_NC           compute dtype
    weight_C       same dtype
    offset         added to the weight, in fp32
    residual_NC    same dtype; then the norm is that of s = x + residual, rounded to that dtype
    impl           see kernels/backend.py
    returns        y_NC, compute dtype, statistics in fp32; with a residual y_NC and s_NC
    raises         ValueError: the kernels are given other sizes or devices; with "triton", C above
                   16384"""
    if kernels := kernels_of("rms_norm", impl, x_NC, fits=x_NC.shape[-1] <= MAX_NORM_WIDTH):
        return kernels.Norm.apply(x_NC, residual_NC, weight_C, None, (eps, offset, False))
    sum_NC = x_NC if residual_NC is None else x_NC + residual_NC
    # cost: a node takes three times as long as what one row needs
    y_NC = (_RMSNorm.apply(sum_NC, weight_C, eps, offset) if torch.is_grad_enabled() else
            _normed(sum_NC, weight_C, eps, offset)[0])
    return y_NC if residual_NC is None else (y_NC, sum_NC)

def _fit(x_NC: Tensor, wide: torch.dtype) -> Tensor:
    """Values beside a wide weight: a CPU reads 16-bit ones as they are, a GPU wants one dtype."""
    return x_NC if x_NC.device.type == "cpu" else x_NC.to(wide)

class _LayerNorm(torch.autograd.Function):
    """torch's layer norm, its backward in fp32 or wider: torch's own sums dw and db in the dtype of
    x, and over 2048 rows in bf16 they are wrong by 18 % of their RMS."""

    @staticmethod
    def forward(ctx: FunctionCtx, x_NC: Tensor, weight_C: Tensor, bias_C: Tensor | None,
                eps: float) -> Tensor:
        wide = torch.promote_types(x_NC.dtype, torch.float32)
        bias = None if bias_C is None else bias_C.to(wide)
        y_NC, mean_N1, rstd_N1 = torch.native_layer_norm(_fit(x_NC, wide), weight_C.shape,
                                                         weight_C.to(wide), bias, eps)
        ctx.save_for_backward(x_NC, weight_C, mean_N1, rstd_N1)
        return y_NC.to(x_NC.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dy_NC: Tensor) -> tuple[Tensor | None, ...]:
        x_NC, weight_C, mean_N1, rstd_N1 = ctx.saved_tensors
        wide, needed = rstd_N1.dtype, ctx.needs_input_grad[:3]
        # numerics: torch sums dw and db row after row: fine in fp32 for what is then rounded to 16
        # bits, but in a wide model they would be wrong by 8 times what a sum in pairs is
        in_pairs = x_NC.dtype == wide
        # cost: without dw and db a CPU reads 16-bit values as they are
        dy_NC, x_NC = (t.to(wide) if any(needed[1:]) else _fit(t, wide) for t in (dy_NC, x_NC))
        weight = weight_C.to(wide)
        asked = [needed[0], needed[1] and not in_pairs, needed[2] and not in_pairs]
        grads = list(torch.ops.aten.native_layer_norm_backward(dy_NC, x_NC, weight_C.shape, mean_N1,
                                                               rstd_N1, weight, weight, asked))
        if in_pairs and any(needed[1:]):
            xhat_NC = (x_NC - mean_N1) * rstd_N1
            grads[1:] = (g_NC.reshape(-1, len(weight)).sum(0) for g_NC in (xhat_NC * dy_NC, dy_NC))
        grads = (g.to(weight_C.dtype) if n else None for g, n in zip(grads, needed, strict=True))
        return *grads, None

def layer_norm(x_NC: Tensor, weight_C: Tensor, bias_C: Tensor | None, *, eps: float,
               residual_NC: Tensor | None = None,
               impl: Impl = "auto") -> Tensor | tuple[Tensor, Tensor]:
    """Layer norm over the last axis; any leading axes.

    weight_C, bias_C    dtype of x; no bias: None
    the others          as in `rms_norm`, and so is what it returns and raises"""
    if kernels := kernels_of("layer_norm", impl, x_NC, fits=x_NC.shape[-1] <= MAX_NORM_WIDTH):
        return kernels.Norm.apply(x_NC, residual_NC, weight_C, bias_C, (eps, 0.0, True))
    sum_NC = x_NC if residual_NC is None else x_NC + residual_NC
    y_NC = (_LayerNorm.apply(sum_NC, weight_C, bias_C, eps) if torch.is_grad_enabled() else
            torch.layer_norm(sum_NC, weight_C.shape, weight_C, bias_C, eps))
    return y_NC if residual_NC is None else (y_NC, sum_NC)
