"""RMSNorm and LayerNorm over the last axis.

Letters: N rows, C width.

RMSNorm     y = (w + offset) x rstd,   rstd = (mean(x^2) + eps)^(-1/2), offset 0 (Gemma: 1)
LayerNorm   y = w (x - mean) rstd + b, rstd = (var(x) + eps)^(-1/2), b may be left out
backward    RMSNorm: with g = w dy, dx = rstd (g - xhat mean(g xhat)), dw = sum_N dy xhat
dtypes      statistics in fp32 whatever the compute dtype; y in the compute dtype

source      Zhang and Sennrich 2019, arXiv:1910.07467; Ba et al. 2016, arXiv:1607.06450
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm_reference(
    x_NC: Tensor, weight_C: Tensor, *, eps: float, offset: float = 0.0
) -> Tensor:
    """The definition. In float64 it is the oracle."""
    wide_NC = x_NC if x_NC.dtype == torch.float64 else x_NC.float()
    rstd_N1 = (wide_NC.square().mean(-1, keepdim=True) + eps).rsqrt()
    return (weight_C + offset) * (wide_NC * rstd_N1).to(x_NC.dtype)


def layer_norm_reference(
    x_NC: Tensor, weight_C: Tensor, bias_C: Tensor | None, *, eps: float
) -> Tensor:
    """The definition. In float64 it is the oracle."""
    wide_NC = x_NC if x_NC.dtype == torch.float64 else x_NC.float()
    centred_NC = wide_NC - wide_NC.mean(-1, keepdim=True)
    rstd_N1 = (centred_NC.square().mean(-1, keepdim=True) + eps).rsqrt()
    scaled_NC = weight_C * (centred_NC * rstd_N1).to(x_NC.dtype)
    return scaled_NC if bias_C is None else scaled_NC + bias_C


def rms_norm(x_NC: Tensor, weight_C: Tensor, *, eps: float, offset: float = 0.0) -> Tensor:
    """Root-mean-square norm over the last axis; any leading axes.

    x_NC        compute dtype
    weight_C    same dtype
    offset      added to the weight, in fp32
    returns     y_NC, compute dtype; statistics in fp32
    """
    if not offset:
        return F.rms_norm(x_NC, weight_C.shape, weight_C, eps)
    # numerics: 1 + w in bf16 would round the small w away
    wide = torch.promote_types(x_NC.dtype, torch.float32)
    y_NC = F.rms_norm(x_NC.to(wide), weight_C.shape, weight_C.to(wide) + offset, eps)
    return y_NC.to(x_NC.dtype)


def layer_norm(x_NC: Tensor, weight_C: Tensor, bias_C: Tensor | None, *, eps: float) -> Tensor:
    """Layer norm over the last axis; any leading axes.

    x_NC                compute dtype
    weight_C, bias_C    same dtype; None: no bias
    returns             y_NC, compute dtype; statistics in fp32
    """
    # numerics: torch's CPU backward sums dw and db row after row in the dtype of x: over 2048 rows
    # in bf16 they are wrong by 18 % of their RMS. In fp32 it takes the same time (2048 x 384).
    wide = torch.promote_types(x_NC.dtype, torch.float32)
    bias_C = None if bias_C is None else bias_C.to(wide)
    y_NC = F.layer_norm(x_NC.to(wide), weight_C.shape, weight_C.to(wide), bias_C, eps)
    return y_NC.to(x_NC.dtype)
