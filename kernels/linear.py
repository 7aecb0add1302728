"""A linear map whose values no longer change, on a CPU: oneDNN's own layout of the matrix is read
in 0.4 to 0.8 of the time for up to 64 rows. In fp32 a single row takes the matrix itself, laid out
anew for it: in 0.5 to 0.8."""

import torch
import torch.nn.functional as F
from torch import Tensor

class Packed:
    """x W^T + b without gradients, from a copy of what W and b are now.

    weight_OC, bias_O   on a CPU; in fp32 the strides of W may change, its values do not
    dtype               of the product: fp32 or bf16
    """

    def __init__(self, weight_OC: Tensor, bias_O: Tensor | None, dtype: torch.dtype) -> None:
        values_OC = weight_OC.detach().to(dtype).contiguous()
        self.dtype, self.single_OC = dtype, None
        self.bias_O = None if bias_O is None else bias_O.detach().to(dtype)
        self.matrix = torch.ops.mkldnn._reorder_linear_weight(values_OC, 16)
        if dtype == weight_OC.dtype == torch.float32:
            if len(values_OC) >= values_OC.shape[1]:
                weight_OC.data = values_OC.t().contiguous().t()
            self.single_OC = weight_OC.detach()

    def __call__(self, x_NC: Tensor) -> Tensor:
        N, x_NC = len(x_NC), x_NC.to(self.dtype)
        if N == 1 and self.single_OC is not None:
            return F.linear(x_NC, self.single_OC, self.bias_O)
        if N < 4:  # cost: four rows take less time than fewer
            x_NC = F.pad(x_NC, (0, 0, 0, 4 - N))
        op = torch.ops.mkldnn._linear_pointwise
        return op(x_NC, self.matrix, self.bias_O, "none", [], "")[:N]
