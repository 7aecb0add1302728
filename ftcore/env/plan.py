"""What a run will do, said before it does it: steps, tokens, trained parameters, memory."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import nn

MIB = 1024**2


@dataclass(frozen=True)
class Plan:
    """Figures of `--dry-run`."""

    num_rows: int  # of one epoch
    num_tokens: int  # of one epoch
    num_steps: int  # optimiser steps of the run
    num_params: int
    num_trained: int  # parameters
    memory_bytes: dict[str, int]  # by component: what the parameters need, activations not included

    def __str__(self) -> str:
        memory = "  ".join(f"{name} {size / MIB:.1f}" for name, size in self.memory_bytes.items())
        return (
            f"{self.num_steps} steps; an epoch is {self.num_rows} rows, {self.num_tokens} tokens\n"
            f"{self.num_trained} of {self.num_params} parameters are trained"
            f" ({self.num_trained / self.num_params:.1%})\nmemory for them, MiB: {memory}"
        )


def plan(model: nn.Module, *, lengths: Sequence[int], num_steps: int) -> Plan:
    """Count what `model` and a run of `num_steps` over documents of these lengths will take: fp32
    gradients and moments, and masters of 16-bit tensors, also of rows that the data never read."""
    params = list(model.parameters())
    trained = [p for p in params if p.requires_grad]
    num_params, num_trained = (sum(p.numel() for p in some) for some in (params, trained))
    memory_bytes = {
        "weights": sum(p.nbytes for p in params),
        "masters": 4 * sum(p.numel() for p in trained if p.element_size() < 4),
        "gradients": 4 * num_trained, "moments": 8 * num_trained,
    }  # fmt: skip
    num_tokens = int(np.sum(lengths))
    return Plan(len(lengths), num_tokens, num_steps, num_params, num_trained, memory_bytes)
