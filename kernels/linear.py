"""Linear maps of one input whose values no longer change, on a CPU, as one product: oneDNN's own
layout of the matrix is read in 0.4 to 0.8 of the time for up to 64 rows. Rows are filled up to few
sizes (kernels/docs.py); four take less time than fewer."""

from collections.abc import Callable, Sequence
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from kernels.docs import rounded

@torch.no_grad()
def packed(maps: Sequence[nn.Linear], compute: torch.dtype | None,
           gelu: str | None = None) -> Callable[[Tensor], Tensor] | None:
    """x_NC to x W^T + b without gradients, from a copy of what W and b are now, those of all maps
    one below the other. `compute`: dtype of the product, None: that of W; `gelu`: it is applied to
    the product, in this one of torch's forms. None: on a GPU, or in others than fp32 and bf16."""
    weights, biases = [each.weight for each in maps], [each.bias for each in maps]
    dtype, op = compute or weights[0].dtype, torch.ops.mkldnn
    if weights[0].device.type != "cpu" or dtype not in (torch.float32, torch.bfloat16):
        return None
    matrix = op._reorder_linear_weight(torch.cat(weights).to(dtype), 16)
    bias_O = None if biases[0] is None else torch.cat(biases).to(dtype)
    then = ("none", [], "") if gelu is None else ("gelu", [], gelu)

    def product(x_NC: Tensor) -> Tensor:
        N, x_NC = x_NC.shape[0], x_NC.to(dtype)
        if filling := rounded(N, least=4) - N:
            x_NC = F.pad(x_NC, (0, 0, 0, filling))
        return op._linear_pointwise.default(x_NC, matrix, bias_O, *then)[:N]

    return product
