"""y = x W^T + b without gradients on a CPU, from a copy of W as oneDNN lays it out: up to 64 rows
take 0.4 to 0.8 of the time. In fp32 a single row takes W itself, laid out anew: 0.5 to 0.8."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

class Packed(NamedTuple):
    weight: Tensor  # opaque
    bias_O: Tensor | None
    weight_OC: Tensor | None  # for one row, where it is faster

def packed(weight_OC: Tensor, bias_O: Tensor | None, *, has_single: bool) -> Packed:
    weight_OC, bias_O = weight_OC.detach(), None if bias_O is None else bias_O.detach()
    if has_single and len(weight_OC) >= weight_OC.shape[1]:
        weight_OC = weight_OC.t().contiguous().t()
    opaque = torch.ops.mkldnn._reorder_linear_weight(weight_OC.contiguous(), 16)
    return Packed(opaque, bias_O, weight_OC if has_single else None)

def packed_linear(x_NC: Tensor, packed: Packed) -> Tensor:
    N, x_NC = len(x_NC), x_NC.to(packed.weight.dtype)
    if N == 1 and packed.weight_OC is not None:
        return F.linear(x_NC, packed.weight_OC, packed.bias_O)
    if N < 4:  # cost: four rows take less time than fewer
        x_NC = F.pad(x_NC, (0, 0, 0, 4 - N))
    opaque = packed.weight, packed.bias_O
    return torch.ops.mkldnn._linear_pointwise(x_NC, *opaque, "none", [], "")[:N]
