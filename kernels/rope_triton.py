"""Rotary position embedding on a GPU; equations and letters are those of kernels/rope.py.

A program turns a tile of (token, head) rows, both halves at once: it reads and writes N H D values,
where eager torch reads and writes about three times as many. The angles come from the cache after
the first head of a token. Inside fp32, rounded once.

norm_rope   rows are normed before they turn: 2 N H D values, not the 4 of two kernels
backward    dy is turned back, then the equations of kernels/norm.py: 3 N H D values, not 5, since
            rstd comes from x, which is read anyway. P programs walk over the tiles, each with its
            own dw in fp32, which are added at the end: the same sum in every run"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from kernels import launch
from kernels.norm_triton import folded

@triton.jit
def _rope_kernel(x_ptr, cos_ptr, sin_ptr, y_ptr, weight_ptr, saved_ptr, dweight_ptr, num_rows,
                 num_steps, H, D, E, eps, offset, stride_xn, stride_xh, stride_sn, stride_sh,
                 IS_BACKWARD: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_E: tl.constexpr,
                 AHEAD: tl.constexpr = 1):
    # backward, x and y are dy and dx, and `saved` is the x that was normed
    pid = tl.program_id(0)
    offs_e = tl.arange(0, BLOCK_E)
    in_e = offs_e < E
    if weight_ptr is not None:
        gain1 = tl.load(weight_ptr + offs_e, mask=in_e, other=0.0).to(tl.float32) + offset
        gain2 = tl.load(weight_ptr + E + offs_e, mask=in_e, other=0.0).to(tl.float32) + offset
    dweight1 = tl.zeros([BLOCK_R, BLOCK_E], tl.float32)
    dweight2 = tl.zeros([BLOCK_R, BLOCK_E], tl.float32)
    # cost: Triton compiles a single step without the loop
    for step in tl.range(num_steps, num_stages=AHEAD):
        offs_r = (pid + step * tl.num_programs(0)) * BLOCK_R + tl.arange(0, BLOCK_R)
        in_r = (offs_r < num_rows)[:, None]
        inside = in_r & in_e
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
        if weight_ptr is not None:
            xhat1, xhat2 = x1, x2
            if IS_BACKWARD:
                s_row_ptr = saved_ptr + (token * stride_sn + offs_r % H * stride_sh)[:, None]
                xhat1 = tl.load(s_row_ptr + offs_e, mask=inside, other=0.0).to(tl.float32)
                xhat2 = tl.load(s_row_ptr + E + offs_e, mask=inside, other=0.0).to(tl.float32)
            rstd = tl.rsqrt(tl.sum(xhat1 * xhat1 + xhat2 * xhat2, 1) / D + eps)[:, None]
            rstd = tl.where(in_r, rstd, 0.0)  # numerics: 1 / 0 past the rows, where eps is 0
            xhat1, xhat2 = xhat1 * rstd, xhat2 * rstd
            if not IS_BACKWARD:
                x1, x2 = xhat1 * gain1, xhat2 * gain2
        y1, y2 = x1 * cos - x2 * sin, x2 * cos + x1 * sin
        if weight_ptr is not None and IS_BACKWARD:
            if dweight_ptr is not None:
                dweight1 += y1 * xhat1
                dweight2 += y2 * xhat2
            y1, y2 = y1 * gain1, y2 * gain2
            mean = (tl.sum(y1 * xhat1 + y2 * xhat2, 1) / D)[:, None]
            y1, y2 = (y1 - xhat1 * mean) * rstd, (y2 - xhat2 * mean) * rstd
        tl.store(y_row_ptr + offs_e, y1.to(y_ptr.dtype.element_ty), mask=inside)
        tl.store(y_row_ptr + E + offs_e, y2.to(y_ptr.dtype.element_ty), mask=inside)
    if dweight_ptr is not None:
        tl.store(dweight_ptr + pid * D + offs_e, tl.sum(dweight1, 0), mask=in_e)
        tl.store(dweight_ptr + pid * D + E + offs_e, tl.sum(dweight2, 0), mask=in_e)

def _launch(x_NHD: Tensor, cos_sin_2NE: Tensor, weight_D: Tensor | None, saved_NHD: Tensor | None,
            rule: tuple[float, float], *, is_backward: bool,
            needs_dweight: bool = False) -> tuple[Tensor, Tensor | None]:
    """y or dx, and where it is asked for dw."""
    N, H, D = x_NHD.shape
    E = cos_sin_2NE.shape[-1]
    if 2 * E != D:
        raise ValueError(f"cos_sin turns {2 * E} channels, must be all {D}; ask rope_angles for it")
    launch.check(x_NHD.device, (2, N, E), cos_sin=cos_sin_2NE)
    launch.check(x_NHD.device, (D,), weight=weight_D)
    x_NHD, saved_NHD, weight_D = (
        x if x is None or x.stride(-1) == 1 and max(x.stride()) * H < 2**31 else x.contiguous()
        for x in (x_NHD, saved_NHD, weight_D))
    kernel = "rope" if weight_D is None else f"norm_rope_{'bwd' if is_backward else 'fwd'}"
    config = dict(launch.config_of(kernel, E, x_NHD.device))
    tiles = triton.cdiv(N * H, config["BLOCK_R"])
    P = launch.num_programs(tiles, config.pop("PER_SM", tiles), x_NHD.device)
    y_NHD = torch.empty(N, H, D, dtype=x_NHD.dtype, device=x_NHD.device)
    dweight_PD = x_NHD.new_empty(P, D, dtype=torch.float32) if needs_dweight else None
    cos_NE, sin_NE = cos_sin_2NE.contiguous()
    with torch.cuda.device_of(x_NHD):
        _rope_kernel[(P,)](
            x_NHD, cos_NE, sin_NE, y_NHD, weight_D, saved_NHD, dweight_PD,
            N * H, triton.cdiv(tiles, P), H, D, E, *rule,
            *x_NHD.stride()[:2], *(0, 0) if saved_NHD is None else saved_NHD.stride()[:2],
            IS_BACKWARD=is_backward, BLOCK_E=triton.next_power_of_2(E), **config)
    return y_NHD, None if dweight_PD is None else folded(dweight_PD, weight_D.dtype)

class RopeTriton(torch.autograd.Function):
    """`rope`, or with a weight and the rule (eps, offset) `norm_rope`. Keeps the angles, since the
    gradient is turned back, and with a norm its input and weight."""

    @staticmethod
    def forward(ctx: FunctionCtx, x_NHD: Tensor, cos_sin_2NE: Tensor, weight_D: Tensor | None,
                rule: tuple[float, float]) -> Tensor:
        ctx.save_for_backward(cos_sin_2NE, weight_D, None if weight_D is None else x_NHD)
        ctx.rule = rule
        return _launch(x_NHD, cos_sin_2NE, weight_D, None, rule, is_backward=False)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dy_NHD: Tensor) -> tuple[Tensor | None, ...]:
        settings = {"rule": ctx.rule, "needs_dweight": ctx.needs_input_grad[2]}
        dx_NHD, dweight_D = _launch(dy_NHD, *ctx.saved_tensors, **settings, is_backward=True)
        return dx_NHD, None, dweight_D, None
