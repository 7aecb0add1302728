"""SwiGLU: the gated activation of the Llama and Qwen feed-forward layer.

Letters: N rows, F width.

forward     y = silu(gate) up,  silu(z) = z sigmoid(z)
backward    dup = dy silu(gate), dgate = dy up sigmoid(gate) (1 + gate (1 - sigmoid(gate)))

source      Shazeer 2020, arXiv:2002.05202
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def swiglu_reference(gate_NF: Tensor, up_NF: Tensor) -> Tensor:
    """The definition. In float64 it is the oracle."""
    return gate_NF * torch.sigmoid(gate_NF) * up_NF


def swiglu(gate_NF: Tensor, up_NF: Tensor) -> Tensor:
    """Gated activation silu(gate) * up.

    gate_NF, up_NF    compute dtype
    returns           y_NF, compute dtype
    source            Shazeer 2020, arXiv:2002.05202
    """
    return F.silu(gate_NF) * up_NF
