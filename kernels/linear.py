"""A linear map whose values no longer change, on a CPU: oneDNN's own layout of the matrix is read
in 0.4 to 0.8 of the time for up to 64 rows. In fp32 a single row takes the matrix itself, laid out
anew for it: in 0.5 to 0.8."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

def packed(weight_OC: Tensor, bias_O: Tensor | None,
           compute: torch.dtype | None) -> Callable[[Tensor], Tensor] | None:
    """x_NC to x W^T + b without gradients, from a copy of what W and b are now; None: on a GPU, or
    in other dtypes than fp32 and bf16. In fp32 the strides of W may change, its values do not."""
    dtype, single_OC = compute or weight_OC.dtype, None
    if weight_OC.device.type != "cpu" or dtype not in (torch.float32, torch.bfloat16):
        return None
    values_OC = weight_OC.detach().to(dtype).contiguous()
    bias_O = None if bias_O is None else bias_O.detach().to(dtype)
    matrix, op = torch.ops.mkldnn._reorder_linear_weight(values_OC, 16), torch.ops.mkldnn
    if dtype == weight_OC.dtype == torch.float32:
        if len(values_OC) >= values_OC.shape[1]:
            weight_OC.data = values_OC.t().contiguous().t()
        single_OC = weight_OC.detach()

    def product(x_NC: Tensor) -> Tensor:
        N, x_NC = len(x_NC), x_NC.to(dtype)
        if N == 1 and single_OC is not None:
            return F.linear(x_NC, single_OC, bias_O)
        if N < 4:  # cost: four rows take less time than fewer
            x_NC = F.pad(x_NC, (0, 0, 0, 4 - N))
        return op._linear_pointwise(x_NC, matrix, bias_O, "none", [], "")[:N]

    return product
