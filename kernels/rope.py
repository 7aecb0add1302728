"""Rotary position embedding: pairs of channels turned by an angle proportional to the position.

Letters: N tokens, H heads, D head width (even), E = D / 2 frequencies.

angles      angle_ne = position_n theta^(-2 e / D)
forward     (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin), x1 and x2 the halves of D as in HF
backward    the same rotation by the opposite angle
norm_rope   x is RMSNorm (kernels/norm.py) of each head, in the same pass over the values
dtypes      angles in fp32, cos and sin rounded to the compute dtype as HF does
GPU         kernels/rope_triton.py, which reads and writes every value once"""

import math
import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from kernels.backend import Impl, kernels_of
from kernels.launch import MAX_HEAD_WIDTH
from kernels.norm import rms_norm

def rope_angles(positions_N: Tensor, *, head_dim: int, theta: float, dtype: torch.dtype,
                factor: float = 1.0, bands: tuple[float, float, int] | None = None) -> Tensor:
    """cos and sin of every position, stacked.

    head_dim    channels of a head
    theta       base of the frequencies
    factor      divides the frequencies, for documents so many times longer than those trained on
    bands       (low, high, length): a wave that fits more than `high` times into `length` tokens
                keeps its frequency, one that fits less than `low` times is divided by the factor,
                and those between are blended; None: all are divided
    returns     cos_sin_2NE in `dtype`, E = head_dim / 2
    source      bands: Llama team 2024, arXiv:2407.21783"""
    exponents_E = torch.arange(0, head_dim, 2, device=positions_N.device).float() / head_dim
    # numerics: HF's formulas to the bit, since an error here grows with the position
    frequencies_E, kept_E = 1.0 / theta**exponents_E, 0.0
    if bands is not None:
        low, high, length = bands
        kept_E = ((length / (2 * math.pi / frequencies_E) - low) / (high - low)).clamp(0, 1)
    frequencies_E = (1 - kept_E) * frequencies_E / factor + kept_E * frequencies_E
    angles_NE = positions_N[:, None].float() * frequencies_E
    return torch.stack([angles_NE.cos(), angles_NE.sin()]).to(dtype)

def rope_reference(x_NHD: Tensor, cos_sin_2NE: Tensor) -> Tensor:
    """The definition. In float64 it is the oracle."""
    x1_NHE, x2_NHE = x_NHD.chunk(2, dim=-1)
    cos_N1E, sin_N1E = cos_sin_2NE[0][:, None], cos_sin_2NE[1][:, None]
    y1_NHE, y2_NHE = x1_NHE * cos_N1E - x2_NHE * sin_N1E, x2_NHE * cos_N1E + x1_NHE * sin_N1E
    return torch.cat([y1_NHE, y2_NHE], dim=-1)

class _Rope(torch.autograd.Function):
    """Keeps only the angles: the gradient is the inverse rotation of the output's gradient."""

    @staticmethod
    def forward(ctx: FunctionCtx, x_NHD: Tensor, cos_sin_2NE: Tensor) -> Tensor:
        ctx.save_for_backward(cos_sin_2NE)
        return _rotate(x_NHD, *cos_sin_2NE)

    @staticmethod
    def backward(ctx: FunctionCtx, grad_NHD: Tensor) -> tuple[Tensor, None]:
        cos_NE, sin_NE = ctx.saved_tensors[0]
        return _rotate(grad_NHD, cos_NE, -sin_NE), None

def _rotate(x_NHD: Tensor, cos_NE: Tensor, sin_NE: Tensor) -> Tensor:
    y_NHD = torch.empty_like(x_NHD)
    (x1_NHE, x2_NHE), (y1_NHE, y2_NHE) = x_NHD.chunk(2, -1), y_NHD.chunk(2, -1)
    cos_N1E, sin_N1E = cos_NE[:, None], sin_NE[:, None]
    torch.addcmul(x1_NHE * cos_N1E, x2_NHE, sin_N1E, value=-1, out=y1_NHE)
    torch.addcmul(x2_NHE * cos_N1E, x1_NHE, sin_N1E, out=y2_NHE)
    return y_NHD

def rope(x_NHD: Tensor, cos_sin_2NE: Tensor, *, impl: Impl = "auto") -> Tensor:
    """Turn queries or keys by their positions.

    x_NHD           queries or keys, compute dtype
    cos_sin_2NE     from `rope_angles`, same dtype; of less than D channels: those behind them stay
    impl            see kernels/backend.py
    returns         y_NHD, compute dtype
    source          Su et al. 2021, arXiv:2104.09864"""
    if (width := 2 * cos_sin_2NE.shape[-1]) < x_NHD.shape[-1]:
        first_NHD, rest_NHD = x_NHD.split([width, x_NHD.shape[-1] - width], -1)
        return torch.cat([rope(first_NHD, cos_sin_2NE, impl=impl), rest_NHD], -1)
    if kernels := kernels_of("rope", impl, x_NHD, fits=cos_sin_2NE.shape[-1] <= MAX_HEAD_WIDTH):
        return kernels.RopeTriton.apply(x_NHD, cos_sin_2NE, None, (0.0, 0.0))
    if torch.is_grad_enabled():
        return _Rope.apply(x_NHD, cos_sin_2NE)
    return _rotate(x_NHD, *cos_sin_2NE)  # cost: without a node

def norm_rope(x_NHD: Tensor, weight_D: Tensor, cos_sin_2NE: Tensor, *, eps: float,
              offset: float = 0.0, impl: Impl = "auto") -> Tensor:
    """`rms_norm` of each head, then `rope`.

    weight_D    of the norm, as are eps and offset; same dtype
    impl        "auto" on a GPU: one kernel for a head of at most 256 channels; else both ops
    returns     y_NHD, compute dtype; by the kernel rounded once
    raises      ValueError: the kernel is given other sizes or devices"""
    if kernels := kernels_of("norm_rope", impl, x_NHD, fits=x_NHD.shape[-1] <= MAX_HEAD_WIDTH):
        return kernels.RopeTriton.apply(x_NHD, cos_sin_2NE, weight_D, (eps, offset))
    x_NHD = rms_norm(x_NHD, weight_D, eps=eps, offset=offset, impl=impl)
    return rope(x_NHD, cos_sin_2NE, impl=impl)
