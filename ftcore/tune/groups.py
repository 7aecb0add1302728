"""The learning rate of each trained parameter over that of the run.

    head                      head_lr_ratio
    embeddings                embedding_lr_ratio * layer_lr_decay ** (L + 1)
    layer l = 0 ... L - 1     layer_lr_decay ** (L - l)
    B of a low-rank update    loraplus_lr_ratio, times that of its layer

L layers. What stands behind the layers, such as the last norm, has 1; a head that is tied to the
embeddings is one of them. Whether weights decay follows from the shape (optim.py).

source  Howard and Ruder 2018, arXiv:1801.06146; Hayou et al. 2024, arXiv:2402.12354 (LoRA+)
"""

from torch import nn

from ftcore.config import OptimConfig
from ftcore.model.heads import Model
from ftcore.tune.freeze import LAYER, leaf

def lr_ratios(model: Model, config: OptimConfig) -> dict[str, float]:
    """By name, of all that is trained."""
    num_layers, ratios = len(model.trunk.layers), {}
    for name, param in model.named_parameters():
        owner, layer = model.get_submodule(name.rpartition(".")[0]), LAYER.search(name)
        ratio = config.head_lr_ratio if name.startswith("head.") else 1.0
        if isinstance(owner, nn.Embedding):
            ratio = config.embedding_lr_ratio * config.layer_lr_decay ** (num_layers + 1)
        elif layer:
            ratio = config.layer_lr_decay ** (num_layers - int(layer[1]))
        if leaf(name) == "lora_b":
            ratio *= config.loraplus_lr_ratio
        if param.requires_grad:
            ratios[name] = ratio
    return ratios
