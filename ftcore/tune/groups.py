"""The learning rate of each trained parameter over that of the run, and when it joins the others.

    head                      head_lr_ratio
    embeddings, their norm    embedding_lr_ratio * layer_lr_decay ** (L + 1)
    layer l = 0 ... L - 1     layer_lr_decay ** (L - l)
    B of a low-rank update    loraplus_lr_ratio, times that of its layer

L layers. What stands behind them, such as the last norm, has 1; a tied head is an embedding.
Gradual unfreezing: what stands behind is trained from the first step on, layer l after (L - l) n
steps, embeddings after (L + 1) n, whatever of these is trained at all.

source  Howard and Ruder 2018, arXiv:1801.06146 (decay over layers, gradual unfreezing); Hayou et
        al. 2024, arXiv:2402.12354 (LoRA+)
"""

from ftcore.config import OptimConfig
from ftcore.model.heads import Model
from ftcore.tune.freeze import LAYER, leaf

def lr_ratios(model: Model, config: OptimConfig) -> dict[str, float]:
    """By name, of all that is trained."""
    ratios = {}
    for name, depth in depths(model).items():
        ratios[name] = config.head_lr_ratio if name.startswith("head.") else 1.0
        if name.startswith("trunk.embed_"):
            ratios[name] = config.embedding_lr_ratio
        ratios[name] *= config.layer_lr_decay**depth
        if leaf(name) == "lora_b":
            ratios[name] *= config.loraplus_lr_ratio
    return ratios

def starts(model: Model, every: int) -> dict[str, int]:
    """By name the steps before each is trained; `every` is n above, 0: all from the first on."""
    return {name: depth * every for name, depth in depths(model).items()}

def depths(model: Model) -> dict[str, int]:
    """How many layers down each trained parameter stands, by name: L - l, L + 1 or 0, as above."""
    num_layers, found = len(model.trunk.layers), {}
    for name in (name for name, param in model.named_parameters() if param.requires_grad):
        layer = LAYER.search(name)
        embeds = name.startswith("trunk.embed_")
        found[name] = num_layers - int(layer[1]) if layer else (num_layers + 1) * embeds
    return found
