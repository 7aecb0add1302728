"""RMSNorm and LayerNorm on a GPU; equations and letters are those of kernels/norm.py.

One program holds whole rows in registers, so that each value is read once and written once:
forward     reads x (and the residual), writes y (and their sum): 2 (or 4) N C values
backward    reads dy and x (and the sum's gradient), writes dx: 3 (or 4) N C values. Its P programs
            walk over the rows, each with its own dw and db in fp32, which are added at the end:
            the same sum in every run. They are left out where the weights are frozen.
dtypes      fp32 inside; y, the sum and dx are rounded once to the compute dtype; mean and 1 / std
            are kept in fp32 for the backward pass"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from kernels import launch

@triton.jit
def _norm_fwd_kernel(x_ptr, residual_ptr, weight_ptr, bias_ptr, y_ptr, sum_ptr, mean_ptr, rstd_ptr,
                     N, C, eps, offset, IS_CENTRED: tl.constexpr, BLOCK_N: tl.constexpr,
                     BLOCK_C: tl.constexpr):
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_c = tl.arange(0, BLOCK_C)
    in_n, in_c = offs_n < N, offs_c < C
    inside = in_n[:, None] & in_c
    offs = offs_n.to(tl.int64)[:, None] * C + offs_c
    x = tl.load(x_ptr + offs, mask=inside, other=0.0)  # (BLOCK_N, BLOCK_C)
    if residual_ptr is not None:
        # numerics: rounded before it is normed, as the backward pass reads it
        x = x.to(tl.float32) + tl.load(residual_ptr + offs, mask=inside, other=0.0).to(tl.float32)
        x = x.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + offs, x, mask=inside)
    x = x.to(tl.float32)
    if IS_CENTRED:
        mean = tl.sum(x, 1) / C
        tl.store(mean_ptr + offs_n, mean, mask=in_n)
        x = tl.where(inside, x - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(x * x, 1) / C + eps)
    tl.store(rstd_ptr + offs_n, rstd, mask=in_n)
    gain = tl.load(weight_ptr + offs_c, mask=in_c, other=0.0).to(tl.float32) + offset
    y = x * rstd[:, None] * gain
    if bias_ptr is not None:
        y += tl.load(bias_ptr + offs_c, mask=in_c, other=0.0).to(tl.float32)
    tl.store(y_ptr + offs, y.to(y_ptr.dtype.element_ty), mask=inside)

@triton.jit
def _norm_bwd_kernel(dy_ptr, x_ptr, weight_ptr, mean_ptr, rstd_ptr, dsum_ptr, dx_ptr, dweight_ptr,
                     dbias_ptr, N, C, offset, IS_CENTRED: tl.constexpr, BLOCK_N: tl.constexpr,
                     BLOCK_C: tl.constexpr, AHEAD: tl.constexpr = 1):
    pid = tl.program_id(0)
    offs_c = tl.arange(0, BLOCK_C)
    in_c = offs_c < C
    gain = tl.load(weight_ptr + offs_c, mask=in_c, other=0.0).to(tl.float32) + offset
    dweight = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    dbias = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    for tile in tl.range(pid, tl.cdiv(N, BLOCK_N), tl.num_programs(0), num_stages=AHEAD):
        offs_n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        in_n = offs_n < N
        inside = in_n[:, None] & in_c
        offs = offs_n.to(tl.int64)[:, None] * C + offs_c
        x = tl.load(x_ptr + offs, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + offs, mask=inside, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + offs_n, mask=in_n, other=0.0)[:, None]
        if IS_CENTRED:
            x -= tl.load(mean_ptr + offs_n, mask=in_n, other=0.0)[:, None]
        xhat = x * rstd
        g = dy * gain
        dx = g - xhat * (tl.sum(g * xhat, 1) / C)[:, None]
        if IS_CENTRED:
            dx -= (tl.sum(g, 1) / C)[:, None]
        dx *= rstd
        if dsum_ptr is not None:
            dx += tl.load(dsum_ptr + offs, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx_ptr + offs, dx.to(dx_ptr.dtype.element_ty), mask=inside)
        if dweight_ptr is not None:
            dweight += dy * xhat
        if dbias_ptr is not None:
            dbias += dy
    if dweight_ptr is not None:
        tl.store(dweight_ptr + pid * C + offs_c, tl.sum(dweight, 0), mask=in_c)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + pid * C + offs_c, tl.sum(dbias, 0), mask=in_c)

@triton.jit
def _fold_kernel(parts_ptr, sum_ptr, P, C, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for first_p in range(0, P, BLOCK_P):
        offs_p = (first_p + tl.arange(0, BLOCK_P))[:, None]
        inside = (offs_p < P) & (offs_c < C)
        total += tl.load(parts_ptr + offs_p * C + offs_c, mask=inside, other=0.0)
    tl.store(sum_ptr + offs_c, tl.sum(total, 0).to(sum_ptr.dtype.element_ty), mask=offs_c < C)

def folded(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum of fp32 partial sums over their first axis, in the same order in every run."""
    total = torch.empty(parts.shape[1:], dtype=dtype, device=parts.device)
    with torch.cuda.device_of(parts):
        _fold_kernel[(triton.cdiv(total.numel(), 16),)](
            parts, total, len(parts), total.numel(), BLOCK_P=64, BLOCK_C=16, num_warps=4)
    return total

def _launch_fwd(x_NC: Tensor, residual_NC: Tensor | None, weight_C: Tensor, bias_C: Tensor | None,
                rule: tuple[float, float, bool]) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """y, x (plus the residual), the means where they are taken away, and 1 / std."""
    (eps, offset, is_centred), C = rule, x_NC.shape[-1]
    launch.check(x_NC.device, (C,), weight=weight_C, bias=bias_C)
    launch.check(x_NC.device, x_NC.shape, x_NC.dtype, residual=residual_NC)
    config = launch.config_of("norm_fwd", C, x_NC.device)
    N, y_NC = x_NC.numel() // C, torch.empty_like(x_NC)
    sum_NC = x_NC if residual_NC is None else torch.empty_like(x_NC)
    rstd_N = torch.empty(N, dtype=torch.float32, device=x_NC.device)
    mean_N = torch.empty_like(rstd_N) if is_centred else None
    with torch.cuda.device_of(x_NC):
        _norm_fwd_kernel[(triton.cdiv(N, config["BLOCK_N"]),)](
            x_NC, residual_NC, weight_C, bias_C, y_NC, sum_NC, mean_N, rstd_N,
            N, C, eps, offset,
            IS_CENTRED=is_centred, BLOCK_C=triton.next_power_of_2(C), **config)
    return y_NC, sum_NC, mean_N, rstd_N

def _launch_bwd(dy_NC: Tensor, dsum_NC: Tensor | None, saved: tuple[Tensor, ...], offset: float,
                needs: tuple[bool, bool]) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """dx, and where they are asked for dw and db."""
    x_NC, weight_C, mean_N, rstd_N = saved
    N, C, device = len(rstd_N), len(weight_C), x_NC.device
    config = dict(launch.config_of("norm_bwd", C, device, shape="" if any(needs) else "frozen"))
    P = launch.num_programs(triton.cdiv(N, config["BLOCK_N"]), config.pop("PER_SM"), device)
    dx_NC = torch.empty_like(x_NC)
    sums_PC = [torch.empty(P, C, dtype=torch.float32, device=device) if n else None for n in needs]
    with torch.cuda.device_of(x_NC):
        _norm_bwd_kernel[(P,)](
            dy_NC.contiguous(), x_NC, weight_C, mean_N, rstd_N,
            None if dsum_NC is None else dsum_NC.contiguous(), dx_NC, *sums_PC, N, C, offset,
            IS_CENTRED=mean_N is not None, BLOCK_C=triton.next_power_of_2(C), **config)
    return dx_NC, *(None if x_PC is None else folded(x_PC, weight_C.dtype) for x_PC in sums_PC)

class Norm(torch.autograd.Function):
    """`rms_norm` and `layer_norm` by the kernels; with a residual, two outputs.

    rule    eps, offset, and whether the mean is taken away"""

    @staticmethod
    def forward(ctx: FunctionCtx, x_NC: Tensor, residual_NC: Tensor | None, weight_C: Tensor,
                bias_C: Tensor | None,
                rule: tuple[float, float, bool]) -> Tensor | tuple[Tensor, Tensor]:
        x_NC, residual_NC, weight_C, bias_C = (
            x if x is None else x.contiguous() for x in (x_NC, residual_NC, weight_C, bias_C))
        y_NC, sum_NC, mean_N, rstd_N = _launch_fwd(x_NC, residual_NC, weight_C, bias_C, rule)
        ctx.save_for_backward(sum_NC, weight_C, mean_N, rstd_N)
        ctx.offset = rule[1]
        return y_NC if residual_NC is None else (y_NC, sum_NC)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dy_NC: Tensor,
                 dsum_NC: Tensor | None = None) -> tuple[Tensor | None, ...]:
        needs_dx, needs_dresidual, *needs = ctx.needs_input_grad[:4]
        dx_NC, *grads = _launch_bwd(dy_NC, dsum_NC, ctx.saved_tensors, ctx.offset, needs)
        return dx_NC if needs_dx else None, dx_NC if needs_dresidual else None, *grads, None
