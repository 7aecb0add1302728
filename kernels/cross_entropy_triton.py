"""Softmax, loss and gradient of one chunk of logits, in place; equations and letters are those of
kernels/cross_entropy.py.

One program walks over a row twice: for its maximum and sum, and to put the gradient in the place of
the logits. Each thread keeps a maximum and a sum of its own, rescaled once per 16 bytes, so nothing
is exchanged between threads until the row's end. 3 J V values are read or written, and where no
gradient is asked for J V; eager torch moves about 12 J V in fp32.

dtypes      fp32 inside; the gradient is rounded once to the dtype of the logits"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from kernels import launch

@triton.jit
def tanh(x):
    e = tl.exp(-2 * tl.abs(x))
    far = (1 - e) / (1 + e)
    # numerics: near 0 that difference would cancel; the series is exact to fp32 up to 0.3
    s = x * x
    near = 1 + s * (-1 / 3 + s * (2 / 15 + s * (-17 / 315 + s * (62 / 2835 - s * 0.008863235529))))
    return tl.where(s < 0.09, x * near, tl.where(x < 0, -far, far))

@triton.jit
def _load_logits(row_ptr, offs, inside, softcap):
    """Logits in fp32, capped; -inf outside of the row."""
    z = tl.load(row_ptr + offs, mask=inside, other=0.0).to(tl.float32)
    if softcap is not None:
        z = softcap * tanh(z / softcap)
    return tl.where(inside, z, float("-inf"))

@triton.jit
def _softmax_loss_kernel(logits_ptr, labels_ptr, weights_ptr, loss_ptr, V, softcap, z_loss,
                         smoothing, NEEDS_GRADIENT: tl.constexpr, LANES: tl.constexpr,
                         WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * V
    label = tl.load(labels_ptr + row)
    weight = tl.load(weights_ptr + row).to(tl.float32)
    # Before any store: another warp may be ahead. A label outside [0, V) makes the loss NaN.
    z_label = _load_logits(row_ptr, label, (label >= 0) & (label < V), softcap)
    z_label = tl.where((label >= 0) & (label < V), z_label, float("nan"))
    offs_v = tl.arange(0, LANES)[:, None] * WIDTH + tl.arange(0, WIDTH)  # (LANES, WIDTH)

    # numerics: finite, since -inf - -inf is NaN
    lane_max = tl.full([LANES], -3.0e38, tl.float32)
    lane_sum = tl.zeros([LANES], tl.float32)
    lane_total = tl.zeros([LANES], tl.float32)  # of the logits themselves
    for start in range(0, V, LANES * WIDTH):
        inside = start + offs_v < V
        z = _load_logits(row_ptr, start + offs_v, inside, softcap)
        if smoothing is not None:
            lane_total += tl.sum(tl.where(inside, z, 0.0), 1)
        new_max = tl.maximum(lane_max, tl.max(z, 1))
        lane_sum = lane_sum * tl.exp(lane_max - new_max) + tl.sum(tl.exp(z - new_max[:, None]), 1)
        lane_max = new_max
    row_max = tl.max(lane_max, 0)
    lse = row_max + tl.log(tl.sum(lane_sum * tl.exp(lane_max - row_max), 0))
    loss = lse - z_label
    if smoothing is not None:
        loss += smoothing * (z_label - tl.sum(lane_total, 0) / V)
    if z_loss is not None:
        loss += z_loss * lse * lse
    tl.store(loss_ptr + row, weight * loss)

    if NEEDS_GRADIENT:
        for start in range(0, V, LANES * WIDTH):
            inside = start + offs_v < V
            z = _load_logits(row_ptr, start + offs_v, inside, softcap)
            target = (start + offs_v == label).to(tl.float32)
            if smoothing is not None:
                target = (1 - smoothing) * target + smoothing / V
            p = tl.exp(z - lse)
            dz = weight * (p - target)
            if z_loss is not None:
                dz += 2 * weight * z_loss * lse * p
            if softcap is not None:
                dz *= 1 - (z / softcap) * (z / softcap)
            tl.store(row_ptr + start + offs_v, dz.to(logits_ptr.dtype.element_ty), mask=inside)

def softmax_loss_triton(logits_JV: Tensor, labels_J: Tensor, weights_J: Tensor,
                        rule: tuple[float | None, float, float], *,
                        needs_gradient: bool) -> tuple[Tensor, Tensor]:
    """`_softmax_loss` by the kernel: the loss in fp32, the gradient in the place of the logits,
    which are left as they are where it is not asked for."""
    (J, V), (softcap, z_loss, smoothing) = logits_JV.shape, rule
    assert logits_JV.is_contiguous()
    launch.check(logits_JV.device, (J,), labels=labels_J, weights=weights_J)
    loss_J = torch.empty(J, dtype=torch.float32, device=logits_JV.device)
    with torch.cuda.device_of(logits_JV):
        _softmax_loss_kernel[(J,)](
            logits_JV, labels_J.contiguous(), weights_J.contiguous(), loss_J,
            V, softcap, z_loss or None, smoothing or None,
            NEEDS_GRADIENT=needs_gradient, WIDTH=16 // logits_JV.element_size(),
            **launch.config_of("softmax_loss", V, logits_JV.device))
    return loss_J.sum(), logits_JV
