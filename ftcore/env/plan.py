"""What a run will do, said before it does it: steps, tokens, trained parameters, memory."""

from collections.abc import Sequence

import numpy as np
from torch import nn

class Plan:
    """Figures of `--dry-run`: what `model` and `num_steps` optimiser steps over documents of these
    lengths will take.

    num_rows, num_tokens        of one epoch
    num_params, num_trained     parameters
    memory_bytes                by component, activations not included: fp32 gradients and moments,
                                and masters of 16-bit tensors, also of rows that the data never read
    """

    def __init__(self, model: nn.Module, *, lengths: Sequence[int], num_steps: int) -> None:
        self.num_rows, self.num_tokens = len(lengths), int(np.sum(lengths))
        self.num_steps = num_steps
        params = list(model.parameters())
        trained = [p for p in params if p.requires_grad]
        self.num_params, self.num_trained = (sum(p.numel() for p in x) for x in (params, trained))
        self.memory_bytes = {
            "weights": sum(p.nbytes for p in params),
            "masters": 4 * sum(p.numel() for p in trained if p.element_size() < 4),
            "gradients": 4 * self.num_trained, "moments": 8 * self.num_trained,
        }  # fmt: skip

    def __str__(self) -> str:
        memory = "  ".join(f"{name} {size / 2**20:.1f}" for name, size in self.memory_bytes.items())
        return (
            f"{self.num_steps} steps; an epoch is {self.num_rows} rows, {self.num_tokens} tokens\n"
            f"{self.num_trained} of {self.num_params} parameters are trained"
            f" ({self.num_trained / self.num_params:.1%})\nmemory for them, MiB: {memory}"
        )
