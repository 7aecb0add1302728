"""A smooth bound of scores and logits: cap tanh(z / cap), as Gemma 2 has it (arXiv:2408.00118)."""

from torch import Tensor

def capped(z: Tensor, cap: float | None) -> Tensor:
    """z, bounded to (-cap, cap); None: as it is."""
    return z if cap is None else cap * (z / cap).tanh()
