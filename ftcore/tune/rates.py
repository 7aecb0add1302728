"""Learning rates: of a step, and of each trained parameter over that, and from when on it has one.

    warm-up    lr (s + 1) / w                                   s < w
    cosine     lr (m + (1 - m) (1 + cos(pi x)) / 2)             x = (s - w) / (S - w)
    linear     lr (1 - (1 - m) x)
    constant   lr
    wsd        lr, stable, then decay, over the last d steps lr (1 - (1 - m) (s - (S - d)) / d)

s is the 0-based step, S the steps of the run, w those of the warm-up, d those of the decay, which
never reaches into the warm-up; m the final share of the peak.

    head                      head_lr_ratio
    embeddings, their norm    embedding_lr_ratio * layer_lr_decay ** (L + 1)
    layer l = 0 ... L - 1     layer_lr_decay ** (L - l)
    B of a low-rank update    loraplus_lr_ratio, times that of its layer

L layers. What stands behind them, such as the last norm, has 1; a tied head is an embedding.
Gradual unfreezing: what stands behind is trained from the first step on, layer l after (L - l) n
steps, embeddings after (L + 1) n, whatever of these is trained at all.

source  Loshchilov and Hutter 2017, arXiv:1608.03983 (cosine); Hu et al. 2024, arXiv:2404.06395
        (wsd); Howard and Ruder 2018, arXiv:1801.06146 (decay over layers, gradual unfreezing);
        Hayou et al. 2024, arXiv:2402.12354 (LoRA+)
"""

import math

from ftcore.config import OptimConfig, ScheduleConfig
from ftcore.model.heads import Model
from ftcore.tune.freeze import LAYER, leaf

def learning_rate(step: int, total_steps: int, peak: float, config: ScheduleConfig) -> float:
    """Rate of step s of S, a pure function of these."""
    warmup_steps, decay_steps = (int(x * total_steps) for x in (config.warmup, config.decay))
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if config.shape == "wsd":
        warmup_steps = max(warmup_steps, total_steps - decay_steps)
    done = min(1.0, max(0, step - warmup_steps) / max(1, total_steps - warmup_steps))
    if config.shape == "constant":
        return peak
    if config.shape in ("linear", "wsd"):
        return peak * (1 - (1 - config.final) * done)
    return peak * (config.final + (1 - config.final) * (1 + math.cos(math.pi * done)) / 2)

def of_parameters(
    model: Model, config: OptimConfig, unfreeze_every: int = 0
) -> dict[str, tuple[float, int]]:
    """By name, of all that is trained: rate over that of the run, and the steps before it has one;
    `unfreeze_every` is n above, 0: all from the first on."""
    num_layers, found = len(model.trunk.layers), {}
    for name in (name for name, param in model.named_parameters() if param.requires_grad):
        layer, embeds = LAYER.search(name), name.startswith("trunk.embed_")
        depth = num_layers - int(layer[1]) if layer else (num_layers + 1) * embeds
        ratio = config.head_lr_ratio if name.startswith("head.") else 1.0
        if embeds:
            ratio = config.embedding_lr_ratio
        ratio *= config.layer_lr_decay**depth
        if leaf(name) == "lora_b":
            ratio *= config.loraplus_lr_ratio
        found[name] = ratio, depth * unfreeze_every
    return found
