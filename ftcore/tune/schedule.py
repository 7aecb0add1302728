"""Learning rate as a pure function of the step: linear warm-up, then one of these shapes.

    warm-up    lr (s + 1) / w                                   s < w
    cosine     lr (m + (1 - m) (1 + cos(pi x)) / 2)             x = (s - w) / (S - w)
    linear     lr (1 - (1 - m) x)
    constant   lr
    wsd        lr, stable, then decay, over the last d steps lr (1 - (1 - m) (s - (S - d)) / d)

s is the 0-based step, S the steps of the run, w the warm-up steps, m the final share of the peak,
d the steps of the decay, which never reaches into the warm-up.

source  Loshchilov and Hutter 2017, arXiv:1608.03983 (cosine); Hu et al. 2024, arXiv:2404.06395
"""

import math

def learning_rate(
    step: int, *, peak: float, total_steps: int, warmup_steps: int, shape: str, final: float,
    decay_steps: int = 0,
) -> float:  # fmt: skip
    """Rate of step s; total_steps S, warmup_steps w < S, final m in [0, 1], decay_steps d."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if shape == "wsd":
        warmup_steps = max(warmup_steps, total_steps - decay_steps)
    done = min(1.0, max(0, step - warmup_steps) / max(1, total_steps - warmup_steps))
    if shape == "constant":
        return peak
    if shape in ("linear", "wsd"):
        return peak * (1 - (1 - final) * done)
    return peak * (final + (1 - final) * (1 + math.cos(math.pi * done)) / 2)
