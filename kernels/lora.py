"""LoRA: a frozen linear map plus a trainable low-rank update.

Letters: N rows, C input width, O output width, R rank.

forward     h = drop(x) A^T,    y = x W^T + bias + h (s B)^T
backward    dh = dy (s B),      dx = dy W + drop'(dh A),    dA = dh^T drop(x),    dB = s dy^T h
dtypes      x, W, bias, y in the compute dtype; A and B may be wider (fp32 factors over bf16
            weights): they are cast on the way in, their gradients return in their own dtype
cost        2 N C O + 2 N R (C + O) FLOP forward; one product adds into the output of the other, so
            no second N x O tensor is written, and dW is formed only where W is trained
GPU         kernels/lora_triton.py, which never stores the mask and reads dy once for dh and dB

source      Hu et al. 2021, arXiv:2106.09685, eq. 3"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx
from kernels.backend import Impl, kernels_of
from kernels.dropout import scaled_keep
from kernels.launch import MAX_RANK

def lora_linear_reference(x_NC: Tensor, weight_OC: Tensor, a_RC: Tensor, b_OR: Tensor, *,
                          bias_O: Tensor | None = None, scale: float) -> Tensor:
    """The definition, without dropout. In float64 it is the oracle."""
    h_NR = x_NC @ a_RC.to(x_NC.dtype).T
    return F.linear(x_NC, weight_OC, bias_O) + scale * h_NR @ b_OR.to(x_NC.dtype).T

class _LoRALinear(torch.autograd.Function):
    """One node for both maps: they read x once more in the backward pass, and add into one dx.

    keep_NC     1 / (1 - p) where an input of the update is kept, 0 where it is dropped; None: all
                are kept as they are"""

    @staticmethod
    def forward(ctx: FunctionCtx, x_NC: Tensor, weight_OC: Tensor, a_RC: Tensor, b_OR: Tensor,
                bias_O: Tensor | None, rule: tuple[float, Tensor | None]) -> Tensor:
        (ctx.scale, keep_NC), ctx.dtypes = rule, (a_RC.dtype, b_OR.dtype)
        a_RC, sb_OR = a_RC.to(x_NC.dtype), (b_OR * ctx.scale).to(x_NC.dtype)
        h_NR = F.linear(x_NC if keep_NC is None else x_NC * keep_NC, a_RC)
        ctx.save_for_backward(x_NC, weight_OC, a_RC, sb_OR, h_NR, keep_NC)
        # cost: in place, as no backward reads y: in fp32 5 to 14 % less time than y + scale update
        return F.linear(x_NC, weight_OC, bias_O).addmm_(h_NR, sb_OR.T)

    @staticmethod
    def backward(ctx: FunctionCtx, dy_NO: Tensor) -> tuple[Tensor | None, ...]:
        x_NC, weight_OC, a_RC, sb_OR, h_NR, keep_NC = ctx.saved_tensors
        needs_dx, needs_dw, needs_da, needs_db, needs_dbias, _ = ctx.needs_input_grad
        dh_NR, dx_NC = dy_NO @ sb_OR, None
        if needs_dx:
            dx_NC = dy_NO @ weight_OC
            if keep_NC is None:
                dx_NC.addmm_(dh_NR, a_RC)
            else:
                dx_NC.addcmul_(dh_NR @ a_RC, keep_NC)
        kept_NC = x_NC if keep_NC is None or not needs_da else x_NC * keep_NC
        return (
            dx_NC,
            dy_NO.T @ x_NC if needs_dw else None,
            (dh_NR.T @ kept_NC).to(ctx.dtypes[0]) if needs_da else None,
            # cost: (h^T dy)^T takes two thirds of the time of dy^T h
            (h_NR.T @ dy_NO).T.mul_(ctx.scale).to(ctx.dtypes[1]) if needs_db else None,
            dy_NO.sum(0) if needs_dbias else None,
            None)

def lora_linear(x_NC: Tensor, weight_OC: Tensor, a_RC: Tensor, b_OR: Tensor, *, scale: float,
                bias_O: Tensor | None = None, dropout: float = 0.0, impl: Impl = "auto") -> Tensor:
    """Frozen linear map plus a low-rank update: y = x W^T + bias + scale (drop(x) A^T) B^T.

    x_NC            activations, compute dtype; two axes, as everywhere in the flat stream
    weight_OC       frozen; same dtype as x; receives no gradient where requires_grad is off
    a_RC, b_OR      trainable factors; cast to x.dtype; gradients returned in their own dtype
    bias_O          bias of the frozen map; same dtype as x
    scale           alpha / rank, or alpha / sqrt(rank), unitless
    dropout         probability of dropping an input of the update, in [0, 1); 0 outside training;
                    the mask comes from torch's generator of the device
    impl            see kernels/backend.py; "auto" is eager for fp32
    returns y_NO    x.dtype
    raises          ValueError: what kernels/lora_triton.py does not take, with "triton"."""
    fits = len(a_RC) <= MAX_RANK and x_NC.itemsize < 4  # cost: products in fp32 are cuBLAS's
    if kernels := kernels_of("lora", impl, x_NC, fits=fits):
        return kernels.LoRALinear.apply(x_NC, weight_OC, a_RC, b_OR, bias_O, (scale, dropout))
    keep_NC = scaled_keep(x_NC, dropout) if dropout else None
    return _LoRALinear.apply(x_NC, weight_OC, a_RC, b_OR, bias_O, (scale, keep_NC))
