"""Linear map and softmax cross-entropy in one operation, chunked: logits never exist as a whole.

Letters: M scored rows, C width, V vocabulary (or classes), J rows of one chunk.

forward     z = h W^T + b, or with a soft cap z = cap tanh((h W^T + b) / cap)
            loss = sum_m w_m (lse_m - t_m . z_m + z_loss lse_m^2),  weight = sum_m w_m
            with lse = logsumexp(z), t = (1 - s) onehot(label) + s / V, and s the label smoothing
backward    dz = w ((1 + 2 z_loss lse) softmax(z) - t),  dh = dz W,  dW = dz^T h,  db = sum_M dz
            with a soft cap, dz (1 - (z / cap)^2) in place of dz
dtypes      h and W in the compute dtype; logits, softmax, loss and dW accumulate in fp32
memory      J x V logits instead of M x V; the gradients are formed in the forward pass, while each
            chunk's logits are at hand, and only scaled in the backward pass
GPU         kernels/cross_entropy_triton.py, on logits in the compute dtype
cost        2 M C V FLOP forward, and 2 M C V more for each of dh and dW that is asked for
source      label smoothing: Szegedy et al. 2015, arXiv:1512.00567, section 7;
            z-loss: Chowdhery et al. 2022 (PaLM), arXiv:2204.02311, section 5

A loss is a sum and a weight. The caller divides once, by the weight of the whole optimiser step."""

from types import ModuleType
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx
from kernels.backend import Impl, kernels_of
from kernels.docs import rounded
from kernels.softcap import capped

CHUNK_ROWS, MOST_LOGITS = 2048, 2**25  # the latter: fp32, at a time, of single rows' losses
TRITON_CHUNK_ROWS = 4096  # cost: each chunk adds the whole of dW, and its logits are half as wide

def linear_cross_entropy_reference(
    h_MC: Tensor, weight_VC: Tensor, labels_M: Tensor, weights_M: Tensor, bias_V: Tensor | None, *,
    softcap: float | None = None, z_loss: float = 0.0, label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The definition, all logits at once. In float64 it is the oracle."""
    logits_MV = capped(F.linear(h_MC, weight_VC, bias_V), softcap)
    nll_M = F.cross_entropy(logits_MV, labels_M, reduction="none", label_smoothing=label_smoothing)
    loss_M = nll_M + z_loss * logits_MV.logsumexp(-1).square()
    return (loss_M * weights_M).sum(), weights_M.sum()

def _softmax_loss(logits_JV: Tensor, labels_J: Tensor, weights_J: Tensor,
                  rule: tuple[float | None, float, float], *,
                  needs_gradient: bool) -> tuple[Tensor, Tensor | None]:
    """Loss sum of a chunk (nats), and the gradient of its logits if it is asked for, both wide.

    rule    soft cap, z-loss, label smoothing"""
    softcap, z_loss, smoothing = rule
    wide = torch.promote_types(logits_JV.dtype, torch.float32)
    logits_JV, weights_J1 = capped(logits_JV.to(wide), softcap), weights_J[:, None].to(wide)
    labels_J1 = labels_J[:, None]
    slope_JV = None if softcap is None else 1 - (logits_JV / softcap).square()
    # In place from here on: fresh memory for a chunk of logits costs more than the sums.
    max_J1 = logits_JV.amax(-1, keepdim=True)
    logits_JV -= max_J1
    picked_J1 = logits_JV.gather(1, labels_J1)
    if smoothing:
        picked_J1.lerp_(logits_JV.mean(-1, keepdim=True), smoothing)
    sums_J1 = logits_JV.exp_().sum(-1, keepdim=True)
    lse_J1 = sums_J1.log() + max_J1 if z_loss else 0.0
    loss = ((sums_J1.log() - picked_J1 + z_loss * lse_J1**2) * weights_J1).sum()
    if not needs_gradient:
        return loss, None
    dlogits_JV = logits_JV.mul_(weights_J1 * (1 + 2 * z_loss * lse_J1) / sums_J1)
    dlogits_JV.scatter_add_(1, labels_J1, (smoothing - 1) * weights_J1)
    if smoothing:
        dlogits_JV -= smoothing / logits_JV.shape[1] * weights_J1
    if slope_JV is not None:
        dlogits_JV *= slope_JV
    return loss, dlogits_JV

class _LinearCrossEntropy(torch.autograd.Function):
    """Forms the gradients chunk by chunk in forward; backward multiplies by the scalar gradient.

    rule    that of `_softmax_loss`, and the module of the kernel, if it forms them of the logits"""

    @staticmethod
    def forward(ctx: FunctionCtx, h_MC: Tensor, weight_VC: Tensor, bias_V: Tensor | None,
                labels_M: Tensor, weights_M: Tensor,
                rule: tuple[float | None, float, float, ModuleType | None]) -> Tensor:
        needs_h, needs_weight, needs_bias = needs = ctx.needs_input_grad[:3]
        *rule, kernels = rule
        softmax_loss = kernels.softmax_loss_triton if kernels else _softmax_loss
        chunk_rows = TRITON_CHUNK_ROWS if kernels else CHUNK_ROWS
        wide = torch.float64 if h_MC.dtype == torch.float64 else torch.float32
        loss = torch.zeros((), dtype=wide, device=h_MC.device)
        dh_MC = torch.empty_like(h_MC) if needs_h else None
        dweight_VC = torch.zeros_like(weight_VC, dtype=wide) if needs_weight else None
        dbias_V = torch.zeros_like(bias_V, dtype=wide) if needs_bias else None
        for start in range(0, h_MC.shape[0], chunk_rows):
            rows = slice(start, start + chunk_rows)
            chunk_loss, dlogits_JV = softmax_loss(F.linear(h_MC[rows], weight_VC, bias_V),
                                                  labels_M[rows], weights_M[rows], rule,
                                                  needs_gradient=any(needs))
            loss += chunk_loss
            if needs_bias:
                dbias_V += dlogits_JV.sum(0, dtype=wide)
            if needs_h or needs_weight:
                dlogits_JV = dlogits_JV.to(h_MC.dtype)
            if needs_h:
                torch.mm(dlogits_JV, weight_VC, out=dh_MC[rows])
            if needs_weight and kernels and h_MC.is_cuda and h_MC.dtype != wide:
                # cost: 7.5 ms a chunk, not 8.7; and the product is not rounded before it is added
                torch.addmm(dweight_VC, dlogits_JV.t(), h_MC[rows], out_dtype=wide, out=dweight_VC)
            elif needs_weight:
                dweight_VC += dlogits_JV.t() @ h_MC[rows]
        ctx.save_for_backward(dh_MC, dweight_VC, dbias_V)
        ctx.dtypes = h_MC.dtype, weight_VC.dtype, None if bias_V is None else bias_V.dtype
        return loss

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        formed = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        grads = (None if x is None else (x * grad).to(dtype) for x, dtype in formed)
        return *grads, None, None, None

def linear_cross_entropy(h_MC: Tensor, weight_VC: Tensor, labels_M: Tensor, weights_M: Tensor, *,
                         bias_V: Tensor | None = None, softcap: float | None = None,
                         z_loss: float = 0.0, label_smoothing: float = 0.0,
                         impl: Impl = "auto") -> tuple[Tensor, Tensor]:
    """Weighted cross-entropy of a linear classifier, as (sum, weight).

    h_MC          rows that are scored, compute dtype
    weight_VC     head, same dtype; no gradient is formed for a frozen one
    labels_M      int64 in [0, V)
    weights_M     fp32 >= 0; a row of weight 0 adds nothing
    bias_V        optional, same dtype
    softcap       bounds the logits smoothly to (-softcap, softcap); None: they are not bounded
    z_loss        factor >= 0 of the squared logsumexp in the loss, which keeps it near 0
    label_smoothing    share of the target, in [0, 1), that is spread evenly over the classes
    impl          see kernels/backend.py
    returns       loss sum (fp32 scalar, nats) and weight sum (fp32 scalar)
    raises        ValueError: z_loss or label_smoothing is out of its range
    memory        2048 x V logits at a time in fp32, or 4096 x V in the compute dtype on a GPU"""
    if not 0 <= z_loss < float("inf"):
        raise ValueError(f"z_loss = {z_loss}: must be a finite number >= 0; 0 is off")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing = {label_smoothing}: must be in [0, 1); 0 is off")
    if not torch.is_grad_enabled():  # a Function is not told, and would form the gradients
        h_MC, weight_VC = h_MC.detach(), weight_VC.detach()
        bias_V = None if bias_V is None else bias_V.detach()
    M = len(h_MC)
    if h_MC.device.type == "cpu" and (filling := rounded(M) - M):  # see kernels/docs.py
        h_MC = F.pad(h_MC, (0, 0, 0, filling))
        labels_M, weights_M = (F.pad(x_M, (0, filling)) for x_M in (labels_M, weights_M))
    rule = softcap, z_loss, label_smoothing, kernels_of("cross_entropy", impl, h_MC)
    loss = _LinearCrossEntropy.apply(h_MC, weight_VC, bias_V, labels_M, weights_M, rule)
    return loss, weights_M.sum()

@torch.no_grad()
def row_losses(h_MC: Tensor, weight_VC: Tensor, labels_M: Tensor, bias_V: Tensor | None = None,
               softcap: float | None = None) -> Tensor:
    """nll_M, the cross-entropy of each row by itself (nats), wide; arguments as above.

    memory        MOST_LOGITS logits at a time"""
    wide, losses = torch.promote_types(h_MC.dtype, torch.float32), []
    size = max(1, MOST_LOGITS // len(weight_VC))
    for h_JC, labels_J in zip(h_MC.split(size), labels_M.split(size), strict=True):
        logits_JV = capped(F.linear(h_JC, weight_VC, bias_V), softcap).to(wide)
        losses.append(F.cross_entropy(logits_JV, labels_J, reduction="none"))
    return torch.cat(losses)
