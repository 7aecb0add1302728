"""Precision: the dtypes behind its name, and the loss scale that fp16 needs.

fp16 has no values below 6e-8, where many gradients lie. So the loss is multiplied by s, and with it
every gradient; the optimiser, in fp32, divides by s again. A step that is not finite is not applied
and halves s, to 1 at least; 2000 finite steps in a row double it (Micikevicius et al. 2018,
arXiv:1710.03740).
"""

from dataclasses import dataclass

import torch

PRECISIONS = {  # dtype of the weights, and of matrix products where that is another
    "bf16": (torch.bfloat16, None), "bf16-autocast": (torch.float32, torch.bfloat16),
    "fp16": (torch.float16, None), "fp32": (torch.float32, None),
}  # fmt: skip
GROWTH_STEPS = 2000

@dataclass
class LossScale:
    """The factor of the loss of a step; its fields are its state."""
    value: float = 2.0**16
    finite_steps: int = 0  # since it changed last

    def update(self, is_finite: bool) -> None:
        self.finite_steps = self.finite_steps + 1 if is_finite else 0
        if not is_finite:
            self.value = max(1.0, self.value / 2)
        elif self.finite_steps == GROWTH_STEPS:
            self.value, self.finite_steps = 2 * self.value, 0
