"""Frozen matrices in four bits (QLoRA: Dettmers et al. 2023, arXiv:2305.14314): what is trained
beside them sees the dequantised ones."""

import torch
from torch import Tensor, nn

from ftcore.model.transformer import Linear
from ftcore.tune.freeze import tensor_sha256
from kernels.nf4 import BLOCK, NF4, dequantise, nf4_linear, quantise

CODES = ("codes_P", "scale_codes_Q", "maxima_S", "mean")

class NF4Linear(Linear):
    """A frozen linear map whose matrix is kept in NF4, made from its bf16 rounding, so that the
    codes are the same from bf16 and fp32 weights; `sha256` is that of the rounding."""

    def __init__(self, base: Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.bias, rounded_OC = base.bias, base.weight.detach().bfloat16()
        self.sha256, whole = tensor_sha256(rounded_OC), quantise(rounded_OC)
        self.shape, self.dtype = whole.shape, base.weight.dtype
        for name in CODES:
            self.register_buffer(name, getattr(whole, name))

    def nf4(self, dtype: torch.dtype) -> NF4:
        """The matrix, whose values are formed in `dtype` where they are needed."""
        return NF4(*(getattr(self, name) for name in CODES), self.shape, dtype)

    @property
    def weight(self) -> Tensor:
        """The dequantised matrix, formed anew."""
        return dequantise(self.nf4(self.dtype), impl=self.impl)

    def cast(self, x_NC: Tensor) -> tuple[Tensor, NF4, Tensor | None]:
        dtype = self.compute or self.dtype
        return x_NC.to(dtype), self.nf4(dtype), None if self.bias is None else self.bias.to(dtype)

    def forward(self, x_NC: Tensor) -> Tensor:
        return nf4_linear(*self.cast(x_NC), impl=self.impl)

def quantised_layers(model: nn.Module) -> list[NF4Linear]:
    return [module for module in model.modules() if isinstance(module, NF4Linear)]

def quantise_frozen(model: nn.Module) -> str:
    """Put the trunk's frozen linears in NF4, if of whole blocks; returns what was done in words."""
    linears = [(n, m) for n, m in model.trunk.named_modules() if isinstance(m, nn.Linear)]
    frozen = [(n, m) for n, m in linears if not m.weight.requires_grad]
    for name, linear in frozen:
        if not isinstance(linear, NF4Linear) and linear.weight.numel() % BLOCK == 0:
            model.trunk.set_submodule(name, NF4Linear(linear))
    done = quantised_layers(model)
    count = sum(layer.shape.numel() for layer in done)
    bits = 8 * sum(buffer.nbytes for layer in done for buffer in layer.buffers()) / max(count, 1)
    left = f"; {len(frozen) - len(done)} of other sizes stay as they are"
    return f"NF4: {len(done)} matrices, {count:,} values of {bits:.2f} bits{left}"
