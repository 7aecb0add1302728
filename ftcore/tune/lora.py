"""LoRA on any linear layer, chosen by name: wrap, unwrap, merge, fold, share.

    y = x W^T + bias + scale (drop(x) A^T) B^T,    scale = alpha / R, or alpha / sqrt(R) (rsLoRA)

Letters: N rows, C input and O output width, R rank. B starts at zero: a fresh adapter changes no
logit. Factors are fp32, or float64 over float64.

source  Hu et al. 2021, arXiv:2106.09685; Kalajdzievski 2023, arXiv:2312.03732 (rsLoRA);
        A starts as in the peft package: uniform in +-1 / sqrt(C)"""

import math
from collections import Counter
from collections.abc import Mapping
from functools import partial
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from ftcore.config import PeftConfig
from ftcore.errors import ConfigError
from ftcore.model.heads import Model
from ftcore.model.transformer import Layer, Linear
from ftcore.tune.freeze import below, leaf, match_names
from kernels.lora import lora_linear

WORDS = {"all-linear": "trunk.*"}  # for globs

class LoRALinear(Layer):
    """A frozen `Linear` (`base`, never written to) and its update; A is drawn on the CPU."""

    def __init__(self, base: Linear, config: PeftConfig, generator: torch.Generator) -> None:
        super().__init__()
        self.base, self.config = base.requires_grad_(False), config
        device, wide = base.weight.device, torch.promote_types(base.weight.dtype, torch.float32)
        a_RC = torch.empty(config.rank, base.in_features, dtype=wide)
        nn.init.kaiming_uniform_(a_RC, a=math.sqrt(5), generator=generator)
        b_OR = torch.zeros(base.out_features, config.rank, dtype=wide, device=device)
        self.lora_a, self.lora_b = nn.Parameter(a_RC.to(device)), nn.Parameter(b_OR)
        self.register_buffer("merged_weight", None, persistent=False)
        self.train(base.training)

    def forward(self, x_NC: Tensor) -> Tensor:
        x_NC, weight_OC, bias_O = self.base.cast(x_NC)
        if self.merged_weight is not None:
            assert not self.training, "unmerge before training: merged factors get no gradient"
            return F.linear(x_NC, self.merged_weight.to(x_NC.dtype), bias_O)
        if self.base.is_packed:
            b_OR = (self.lora_b * self.config.scale).to(x_NC)
            return self.base(x_NC).addmm_(F.linear(x_NC, self.lora_a.to(x_NC)), b_OR.T)
        return lora_linear(
            x_NC, weight_OC, self.lora_a, self.lora_b, bias_O=bias_O, scale=self.config.scale,
            dropout=self.config.dropout if self.training else 0.0, impl=self.impl)

    @torch.no_grad()
    def folded_weight(self) -> Tensor:
        """W + scale B A, summed in the dtype of these and rounded once to that of W."""
        weight_OC, a_RC, b_OR = self.base.weight, self.lora_a, self.lora_b
        return torch.addmm(weight_OC.to(a_RC), b_OR, a_RC, alpha=self.config.scale).to(weight_OC)

class SharedLinear(Layer):
    """What several adapters wrap: the rows of the stream that `routes` give one have its update."""

    def __init__(self, layers: Mapping[str, LoRALinear], routes: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.base, self.routes = next(iter(layers.values())).base, routes
        dtype = self.base.compute or self.base.weight.dtype
        self.factors = {adapter: (layer.lora_a.detach().to(dtype),
                                  (layer.lora_b.detach() * layer.config.scale).to(dtype))
                        for adapter, layer in layers.items()}

    def forward(self, x_NC: Tensor) -> Tensor:
        y_NO = self.base(x_NC)
        for adapter in self.routes.keys() & self.factors.keys():
            rows_M, (a_RC, sb_OR) = self.routes[adapter], self.factors[adapter]
            h_MR = F.linear(x_NC.index_select(0, rows_M).to(a_RC), a_RC)
            y_MO = y_NO.index_select(0, rows_M).addmm_(h_MR, sb_OR.T)
            y_NO.index_copy_(0, rows_M, y_MO)  # a row that fills up is the same once more
        return y_NO

def apply_lora(model: Model, config: PeftConfig, *, generator: torch.Generator) -> str:
    """Wrap the targets, in the model's order, and freeze all but factors and fully trained modules;
    says so in words. Raises ConfigError: a name that matches nothing, a layer that is both wrapped
    and fully trained or whose matrix is shared with another layer; the model is then unchanged."""
    assert not lora_layers(model), "one adapter at a time: fold the first"
    linears = [n for n, module in model.named_modules() if isinstance(module, nn.Linear)]
    find = partial(match_names, names=linears, what="LoRA target", also=[*WORDS])
    targets = set().union(*(find(WORDS.get(p, p)) for p in config.targets))
    if not targets:
        raise ConfigError(f"LoRA targets {list(config.targets)}: no linear layer, try 'all-linear'")
    if model.is_tied and "head.lm_head" in targets:
        what = "LoRA target head.lm_head: its matrix is tied to the embeddings, so"
        raise ConfigError(f"{what} merging could not be saved: leave it out, or train it fully")
    wrapped = [n for n in linears if n in targets]
    plain = {n: m for n, m in model.named_modules() if n and any(True for _ in m.parameters())}
    find = partial(match_names, names=[*plain], what="fully trained module")
    extra = set().union(*map(find, config.extra_modules))
    if both := [n for n in wrapped if below(n, extra)]:
        raise ConfigError(f"LoRA target and fully trained at once: {', '.join(both)}: choose one")
    model.requires_grad_(False)
    for n in wrapped:
        model.set_submodule(n, LoRALinear(plain[n], config, generator))
    for n in extra:
        plain[n].requires_grad_(True)
    kinds = ", ".join(f"{kind} x {count}" for kind, count in Counter(map(leaf, wrapped)).items())
    said = f"LoRA rank {config.rank}, alpha {config.alpha:g}, scale {config.scale:g} on {kinds}"
    trained = ", ".join(n for n in plain if n in extra)
    return f"{said}; fully trained: {trained}" if trained else said

def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    return {n: module for n, module in model.named_modules() if isinstance(module, LoRALinear)}

def plain_modules(model: nn.Module) -> dict[str, nn.Module]:
    """What owns parameters, by its name before wrapping: of a wrapped layer its base."""
    owning = ((n, m) for n, m in model.named_modules() if list(m.parameters(recurse=False)))
    return {n.removesuffix(".base"): m for n, m in owning if not isinstance(m, LoRALinear)}

def merge(model: nn.Module, *, is_merged: bool = True) -> None:
    """Answer from one matrix, for evaluation: the factors get no gradient; or exactly as before."""
    for layer in lora_layers(model).values():
        layer.merged_weight = layer.folded_weight() if is_merged else None

def unwrap(model: nn.Module) -> dict[str, LoRALinear]:
    """Take the adapter off; its layers by name, which are put on again by setting them there."""
    for name, layer in (layers := lora_layers(model)).items():
        model.set_submodule(name, layer.base)
    return layers

def fold(model: nn.Module) -> None:
    """Merge for good what answers: plain layers, rounded once."""
    for layer in unwrap(model).values():
        layer.base.weight.data = layer.folded_weight()
    model.requires_grad_(True)
