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
            f" ({self.num_trained / self.num_params:.1%})\n"
            f"memory for them, MiB: {memory}"
        )


def plan(model: nn.Module, *, lengths: Sequence[int], num_steps: int) -> Plan:
    """Count what `model` and a run of `num_steps` over documents of these lengths will take.

    Gradients and both moments are fp32; a trained 16-bit tensor has an fp32 master as well. All
    rows of the embeddings are counted, also those that the data never read and nothing is kept of.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    num_trained = sum(p.numel() for p in trained)
    masters = sum(p.numel() for p in trained if p.element_size() < 4)
    return Plan(
        num_rows=len(lengths),
        num_tokens=int(np.sum(lengths)),
        num_steps=num_steps,
        num_params=sum(p.numel() for p in model.parameters()),
        num_trained=num_trained,
        memory_bytes={
            "weights": sum(p.nbytes for p in model.parameters()),
            "masters": 4 * masters,
            "gradients": 4 * num_trained,
            "moments": 8 * num_trained,
        },
    )
