"""SwiGLU and GeGLU: the gated activations of feed-forward layers.

Letters: N rows, F width.

forward     y = act(gate) up;  silu(z) = z sigmoid(z) (Llama, Qwen),  gelu(z) = z Phi(z)
            (ModernBERT), or with Phi(z) = (1 + tanh(sqrt(2 / pi) (z + 0.044715 z^3))) / 2 (Gemma)
backward    dup = dy act(gate), dgate = dy up act'(gate);
            silu'(z) = sigmoid(z) (1 + z (1 - sigmoid(z)))
GPU         kernels/swiglu_triton.py, which forms the activation again in the backward pass

source      Shazeer 2020, arXiv:2002.05202; Hendrycks and Gimpel 2016, arXiv:1606.08415"""

import math
from functools import partial
import torch
import torch.nn.functional as F
from torch import Tensor
from kernels.backend import Impl, kernels_of

def swiglu_reference(gate_NF: Tensor, up_NF: Tensor) -> Tensor:
    """The definition. In float64 it is the oracle."""
    return gate_NF * torch.sigmoid(gate_NF) * up_NF

def geglu_reference(gate_NF: Tensor, up_NF: Tensor, *, uses_tanh: bool) -> Tensor:
    """The definition. In float64 it is the oracle."""
    if uses_tanh:
        z_NF = math.sqrt(2 / math.pi) * (gate_NF + 0.044715 * gate_NF**3)
        return gate_NF * (0.5 * (1 + z_NF.tanh())) * up_NF
    return gate_NF * (0.5 * (1 + torch.erf(gate_NF / math.sqrt(2)))) * up_NF

def swiglu(gate_NF: Tensor, up_NF: Tensor, *, impl: Impl = "auto") -> Tensor:
    """Gated activation silu(gate) * up.

    gate_NF, up_NF    compute dtype
    impl              see kernels/backend.py
    returns           y_NF, compute dtype"""
    if kernels := kernels_of("swiglu", impl, gate_NF):
        return kernels.Glu.apply(gate_NF, up_NF, "silu")
    return F.silu(gate_NF) * up_NF

def geglu(gate_NF: Tensor, up_NF: Tensor, *, uses_tanh: bool, impl: Impl = "auto") -> Tensor:
    """Gated activation gelu(gate) * up, of the same arguments as `swiglu`.

    uses_tanh         gelu by its tanh approximation"""
    if kernels := kernels_of("geglu", impl, gate_NF):
        return kernels.Glu.apply(gate_NF, up_NF, "gelu_tanh" if uses_tanh else "gelu")
    return F.gelu(gate_NF, approximate="tanh" if uses_tanh else "none") * up_NF

GATED = {"swiglu": swiglu, "geglu": partial(geglu, uses_tanh=False),
         "geglu_tanh": partial(geglu, uses_tanh=True)}
