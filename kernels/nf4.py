"""NF4: weights in four bits, each block of 64 by the largest of its magnitudes.

Letters: O x C weight, P = O C / 2 bytes of codes, Q = O C / 64 blocks, S = Q / 256 groups of them.

quantise      scale_q = max |w| over block q; code = the entry of `TABLE` nearest to w / scale_q,
              of two neighbours at the same distance the lower; two codes a byte, the first one high
              double quantisation: mean = mean(scale); scale - mean, by the largest magnitude of a
              group of 256 blocks, becomes the nearest entry of `scale_table()`
dequantise    w' = TABLE[code] (scale_table[scale code] maximum_s + mean), formed in fp32
memory        4.127 bits a weight: 4 + 8 / 64 + 32 / (64 256)
GPU           kernels/nf4_triton.py; the scales are quantised in torch, since they are few
linear        y = x W'^T + bias, dx = dy W'; W' is formed anew in both passes and never kept
backward      none of W: quantised weights are frozen

source        Dettmers et al. 2023, arXiv:2305.14314; the tables and the layout are those that
              bitsandbytes stores
"""

from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx

from kernels.backend import Impl, uses_triton

BLOCK, GROUP = 64, 256
TABLE = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
         -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
         0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
         0.7229568362236023, 1.0)

@dataclass(frozen=True)
class NF4:
    """A quantised weight.

    codes_P          uint8, two codes each
    scale_codes_Q    uint8, places in `scale_table()`
    maxima_S         fp32
    mean             fp32 scalar, of all scales
    shape, dtype     of the weight
    """

    codes_P: Tensor
    scale_codes_Q: Tensor
    maxima_S: Tensor
    mean: Tensor
    shape: torch.Size
    dtype: torch.dtype

@cache
def scale_table(device: torch.device) -> Tensor:
    """The 256 values of a scale: seven powers of ten, each halved once more than the one below it.

    source    Dettmers 2015, arXiv:1511.04561, with a sign and 7 exponent bits
    """
    values = [0.0, 1.0]
    for i in range(7):
        borders = torch.linspace(0.1, 1, 2**i + 1)
        means = (10.0 ** (i - 6) * ((borders[:-1] + borders[1:]) / 2)).tolist()
        values += [*means, *(-mean for mean in means)]
    return torch.tensor(sorted(values), device=device)

@cache
def code_table(device: torch.device) -> Tensor:
    """`TABLE` on a device."""
    return torch.tensor(TABLE, device=device)

def _coded(x_QB: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """Places, in an ascending table, of values by the largest magnitude of their row; and that."""
    scale_Q = x_QB.abs().amax(1)
    # numerics: a row of zeros has scale 0 and the code of 0
    unit_QB = x_QB / scale_Q.clamp(min=1e-30)[:, None]
    return torch.bucketize(unit_QB, (table[1:] + table[:-1]) / 2).to(torch.uint8), scale_Q

def nf4_reference(weight_OC: Tensor) -> Tensor:
    """The definition: the weight as it is after both ways, with exact scales."""
    blocks_QB = weight_OC.reshape(-1, BLOCK)
    scale_Q1 = blocks_QB.abs().amax(1, keepdim=True)
    table = torch.tensor(TABLE, dtype=weight_OC.dtype, device=weight_OC.device)
    distance_QBT = (blocks_QB / scale_Q1.clamp(min=1e-30))[..., None] - table
    return (table[distance_QBT.abs().argmin(-1)] * scale_Q1).view_as(weight_OC)

def quantise(weight_OC: Tensor, *, impl: Impl = "auto") -> NF4:
    """A weight in four bits, its scales in eight.

    weight_OC    compute dtype
    impl         see kernels/backend.py
    raises       ValueError: the weight's size is no multiple of 64
    """
    if weight_OC.numel() % BLOCK or not weight_OC.numel():
        what = f"a weight of shape {tuple(weight_OC.shape)}"
        raise ValueError(f"{what} is not made of blocks of {BLOCK}: leave it unquantised")
    if uses_triton("nf4", impl, weight_OC):
        from kernels.nf4_triton import quantise_blocks_triton

        codes_P, scale_Q = quantise_blocks_triton(weight_OC)
    else:
        blocks_QB = weight_OC.reshape(-1, BLOCK).float()
        codes_QB, scale_Q = _coded(blocks_QB, code_table(weight_OC.device))
        high_P, low_P = codes_QB.view(-1, 2).unbind(1)
        codes_P = high_P << 4 | low_P
    mean, Q = scale_Q.mean(), len(scale_Q)
    rest_SG = F.pad(scale_Q - mean, (0, -Q % GROUP)).view(-1, GROUP)
    places_SG, maxima_S = _coded(rest_SG, scale_table(weight_OC.device))
    scale_codes_Q = places_SG.flatten()[:Q]
    return NF4(codes_P, scale_codes_Q, maxima_S, mean, weight_OC.shape, weight_OC.dtype)

def dequantise(weight: NF4, *, impl: Impl = "auto") -> Tensor:
    """The weight again, in its own dtype, as near as four bits come."""
    if uses_triton("nf4", impl, weight.maxima_S):
        from kernels.nf4_triton import dequantise_triton

        return dequantise_triton(weight)
    device = weight.codes_P.device
    maxima_Q = weight.maxima_S.repeat_interleave(GROUP)[: len(weight.scale_codes_Q)]
    scale_Q = scale_table(device)[weight.scale_codes_Q.long()] * maxima_Q + weight.mean
    codes_P2 = torch.stack([weight.codes_P >> 4, weight.codes_P & 15], 1)
    values_QB = code_table(device)[codes_P2.long()].view(-1, BLOCK) * scale_Q[:, None]
    return values_QB.to(weight.dtype).view(weight.shape)

def dense(weight: Tensor | NF4, impl: Impl) -> Tensor:
    """The weight as a matrix, quantised or not."""
    return dequantise(weight, impl=impl) if isinstance(weight, NF4) else weight

class _NF4Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x_NC: Tensor, weight: NF4, bias_O: Tensor | None,
                impl: Impl) -> Tensor:
        ctx.weight, ctx.impl = weight, impl
        return F.linear(x_NC, dequantise(weight, impl=impl), bias_O)

    @staticmethod
    def backward(ctx: FunctionCtx, dy_NO: Tensor) -> tuple[Tensor | None, ...]:
        needs_dx, _, needs_dbias, _ = ctx.needs_input_grad
        dx_NC = dy_NO @ dequantise(ctx.weight, impl=ctx.impl) if needs_dx else None
        return dx_NC, None, dy_NO.sum(0) if needs_dbias else None, None

def nf4_linear(x_NC: Tensor, weight: NF4, bias_O: Tensor | None = None, *,
               impl: Impl = "auto") -> Tensor:
    """y_NO = x W'^T + bias, by a frozen quantised weight, which both passes dequantise.

    x_NC, bias_O    dtype of the weight
    impl            see kernels/backend.py
    """
    return _NF4Linear.apply(x_NC, weight, bias_O, impl)
