"""SwiGLU and GeGLU on a GPU; equations and letters are those of kernels/swiglu.py.

forward     reads gate and up, writes y: 3 N F values; eager torch writes and reads the activation
            too, 5 N F
backward    reads dy, gate and up, writes dgate and dup: 5 N F values, with the activation formed
            again, so that only gate and up are kept; eager torch moves 11 N F
dtypes      fp32 inside, rounded once"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from kernels import launch

@triton.jit
def _activation(z, KIND: tl.constexpr):
    """act(z) and act'(z)."""
    if KIND == "silu":
        cdf = tl.sigmoid(z)
        density = cdf * (1 - cdf)
    elif KIND == "gelu":
        cdf = 0.5 * (1 + tl.erf(z * 0.7071067811865476))  # 1 / sqrt(2)
        density = 0.3989422804014327 * tl.exp(-0.5 * z * z)  # 1 / sqrt(2 pi)
    else:
        # (1 + tanh(u)) / 2 = sigmoid(2 u), with u = sqrt(2 / pi) (z + 0.044715 z^3)
        u2 = 1.5957691216057308 * z * (1 + 0.044715 * z * z)
        cdf = tl.sigmoid(u2)
        # numerics: 1 - cdf would lose the digits that z and the last factor magnify
        density = cdf * tl.sigmoid(-u2) * 1.5957691216057308 * (1 + 3 * 0.044715 * z * z)
    return z * cdf, cdf + z * density

@triton.jit
def _glu_fwd_kernel(gate_ptr, up_ptr, y_ptr, size, KIND: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offs < size
    gate = tl.load(gate_ptr + offs, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + offs, mask=inside, other=0.0).to(tl.float32)
    y = _activation(gate, KIND)[0] * up
    tl.store(y_ptr + offs, y.to(y_ptr.dtype.element_ty), mask=inside)

@triton.jit
def _glu_bwd_kernel(dy_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, size, KIND: tl.constexpr,
                    BLOCK: tl.constexpr):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offs < size
    dy = tl.load(dy_ptr + offs, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + offs, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + offs, mask=inside, other=0.0).to(tl.float32)
    value, slope = _activation(gate, KIND)
    dtype = dgate_ptr.dtype.element_ty
    tl.store(dgate_ptr + offs, (dy * up * slope).to(dtype), mask=inside)
    tl.store(dup_ptr + offs, (dy * value).to(dtype), mask=inside)

def _launch(kernel: triton.JITFunction, config_name: str, tensors: list[Tensor], kind: str) -> None:
    """Runs a kernel over all values of its tensors, which are inputs and then outputs."""
    config = launch.config_of(config_name, 0, tensors[0].device)
    size = tensors[0].numel()
    with torch.cuda.device_of(tensors[0]):
        kernel[(triton.cdiv(size, config["BLOCK"]),)](*tensors, size, KIND=kind, **config)

class Glu(torch.autograd.Function):
    """act(gate) up by the kernels; `kind` is "silu", "gelu" or "gelu_tanh"."""

    @staticmethod
    def forward(ctx: FunctionCtx, gate_NF: Tensor, up_NF: Tensor, kind: str) -> Tensor:
        launch.check(gate_NF.device, gate_NF.shape, gate_NF.dtype, up=up_NF)
        gate_NF, up_NF = gate_NF.contiguous(), up_NF.contiguous()
        ctx.save_for_backward(gate_NF, up_NF)
        ctx.kind = kind
        y_NF = torch.empty_like(gate_NF)
        _launch(_glu_fwd_kernel, "glu_fwd", [gate_NF, up_NF, y_NF], kind)
        return y_NF

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dy_NF: Tensor) -> tuple[Tensor, Tensor, None]:
        gate_up = ctx.saved_tensors  # asked for once: what was computed again is gone then
        grads = [*map(torch.empty_like, gate_up)]
        _launch(_glu_bwd_kernel, "glu_bwd", [dy_NF.contiguous(), *gate_up, *grads], ctx.kind)
        return *grads, None
