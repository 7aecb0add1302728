"""The learning rate of each trained parameter over that of the run.

    head                      head_lr_ratio
    embeddings, their norm    embedding_lr_ratio * layer_lr_decay ** (L + 1)
    layer l = 0 ... L - 1     layer_lr_decay ** (L - l)
    B of a low-rank update    loraplus_lr_ratio, times that of its layer

L layers. What stands behind them, such as the last norm, has 1; a tied head is an embedding.

source  Howard and Ruder 2018, arXiv:1801.06146; Hayou et al. 2024, arXiv:2402.12354 (LoRA+)
"""

from ftcore.config import OptimConfig
from ftcore.model.heads import Model
from ftcore.tune.freeze import LAYER, leaf

def lr_ratios(model: Model, config: OptimConfig) -> dict[str, float]:
    """By name, of all that is trained."""
    num_layers, ratios = len(model.trunk.layers), {}
    for name in (name for name, param in model.named_parameters() if param.requires_grad):
        layer = LAYER.search(name)
        ratios[name] = config.head_lr_ratio if name.startswith("head.") else 1.0
        if name.startswith("trunk.embed_"):
            ratios[name] = config.embedding_lr_ratio * config.layer_lr_decay ** (num_layers + 1)
        elif layer:
            ratios[name] = config.layer_lr_decay ** (num_layers - int(layer[1]))
        if leaf(name) == "lora_b":
            ratios[name] *= config.loraplus_lr_ratio
    return ratios
