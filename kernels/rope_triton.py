"""Rotary position embedding on a GPU; the equations are those of kernels/rope.py.

Letters: N tokens, H heads, D head width, E = D / 2 frequencies or fewer.

A program turns a tile of (token, head) rows, both halves at once, and copies the channels that do
not turn: it reads and writes N H D values, where eager torch reads and writes about three times as
many. The angles come from the cache after the first head of a token. Inside fp32, rounded once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from kernels.launch import check_at_most, check_device, check_shape, config_of


@triton.jit
def _rope_kernel(
    x_ptr, cos_ptr, sin_ptr, y_ptr,
    num_rows, H, D, E,
    stride_xn, stride_xh,
    IS_BACKWARD: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    offs_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_e = tl.arange(0, BLOCK_E)
    in_r = (offs_r < num_rows)[:, None]
    inside = in_r & (offs_e < E)
    token = (offs_r // H).to(tl.int64)
    x_row_ptr = x_ptr + (token * stride_xn + offs_r % H * stride_xh)[:, None]
    y_row_ptr = y_ptr + (offs_r.to(tl.int64) * D)[:, None]
    angle = token[:, None] * E + offs_e
    cos = tl.load(cos_ptr + angle, mask=inside, other=0.0).to(tl.float32)  # (BLOCK_R, BLOCK_E)
    sin = tl.load(sin_ptr + angle, mask=inside, other=0.0).to(tl.float32)
    if IS_BACKWARD:
        sin = -sin
    x1 = tl.load(x_row_ptr + offs_e, mask=inside, other=0.0).to(tl.float32)
    x2 = tl.load(x_row_ptr + E + offs_e, mask=inside, other=0.0).to(tl.float32)
    y1, y2 = x1 * cos - x2 * sin, x2 * cos + x1 * sin
    tl.store(y_row_ptr + offs_e, y1.to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(y_row_ptr + E + offs_e, y2.to(y_ptr.dtype.element_ty), mask=inside)
    if BLOCK_P:
        offs_p = 2 * E + tl.arange(0, BLOCK_P)
        passed = in_r & (offs_p < D)
        tl.store(y_row_ptr + offs_p, tl.load(x_row_ptr + offs_p, mask=passed), mask=passed)


def _launch(x_NHD: Tensor, cos_sin_2NE: Tensor, *, is_backward: bool) -> Tensor:
    N, H, D = x_NHD.shape
    E = cos_sin_2NE.shape[-1]
    check_at_most("channels that turn", 2 * E, D)
    check_shape("cos_sin", cos_sin_2NE, (2, N, E))
    check_device(x_NHD.device, cos_sin=cos_sin_2NE)
    if x_NHD.stride(-1) != 1:
        x_NHD = x_NHD.contiguous()
    config = config_of("rope", E, x_NHD.device)
    y_NHD = torch.empty(N, H, D, dtype=x_NHD.dtype, device=x_NHD.device)
    cos_NE, sin_NE = cos_sin_2NE.contiguous()
    with torch.cuda.device_of(x_NHD):
        _rope_kernel[(triton.cdiv(N * H, config["BLOCK_R"]),)](
            x_NHD, cos_NE, sin_NE, y_NHD,
            N * H, H, D, E,
            *x_NHD.stride()[:2],
            IS_BACKWARD=is_backward, BLOCK_E=triton.next_power_of_2(E),
            BLOCK_P=triton.next_power_of_2(D - 2 * E) if D > 2 * E else 0, **config,
        )  # fmt: skip
    return y_NHD


class _Rope(torch.autograd.Function):
    """Keeps only the angles: the gradient is the inverse rotation of the output's gradient."""

    @staticmethod
    def forward(ctx: FunctionCtx, x_NHD: Tensor, cos_sin_2NE: Tensor) -> Tensor:
        ctx.save_for_backward(cos_sin_2NE)
        return _launch(x_NHD, cos_sin_2NE, is_backward=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dy_NHD: Tensor) -> tuple[Tensor, None]:
        return _launch(dy_NHD, *ctx.saved_tensors, is_backward=True), None


def rope_triton(x_NHD: Tensor, cos_sin_2NE: Tensor) -> Tensor:
    """`rope` by the kernel."""
    return _Rope.apply(x_NHD, cos_sin_2NE)
