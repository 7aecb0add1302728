"""LoRA on any linear layer, chosen by name: wrap, merge, switch off.

    y = x W^T + bias + scale (drop(x) A^T) B^T,    scale = alpha / R, or alpha / sqrt(R) (rsLoRA)

Letters: N rows, C input width, O output width, R rank. B starts at zero, so that a fresh adapter
changes no logit. The factors are fp32 over a bf16 or fp32 base (float64 over float64).

source  Hu et al. 2021, arXiv:2106.09685; Kalajdzievski 2023, arXiv:2312.03732 (rsLoRA);
        A starts as in the peft package: uniform in +-1 / sqrt(C)
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ftcore.errors import ConfigError
from ftcore.model.transformer import Linear
from ftcore.tune.freeze import below, leaf, match_names
from kernels.backend import Impl
from kernels.lora import lora_linear

ALL_LINEAR = "all-linear"

@dataclass(frozen=True)
class LoRAConfig:
    """What to wrap, and how. Raises ConfigError on a value out of range."""
    rank: int  # R
    alpha: float  # numerator of the scale
    # linear layers: a last name (`q_proj`), a full name, a glob (`trunk.layers.[0-3].*.q_proj`), or
    # `all-linear`: all of them but the head's
    targets: tuple[str, ...]
    rs_lora: bool = False  # scale = alpha / sqrt(rank) instead of alpha / rank
    dropout: float = 0.0  # probability on the input of the update while training, in [0, 1)
    extra_modules: tuple[str, ...] = ()  # modules trained fully, by the same kinds of name

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"LoRA rank = {self.rank}: must be at least 1")
        if not 0 < self.alpha < math.inf:
            raise ConfigError(f"LoRA alpha = {self.alpha}: must be a finite number above 0")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"LoRA dropout = {self.dropout}: must be in [0, 1)")
        if not self.targets:
            raise ConfigError(f"LoRA has no targets: name linear layers, or {ALL_LINEAR!r}")

    @property
    def scale(self) -> float:
        """Factor of the update."""
        return self.alpha / (math.sqrt(self.rank) if self.rs_lora else self.rank)

class LoRALinear(nn.Module):
    """A frozen `Linear` (kept as `base`, never written to) and its low-rank update, whose A the
    `generator` draws on the CPU. While not `enabled`, the layer is its base, merged or not."""

    impl: Impl = "auto"

    def __init__(self, base: Linear, config: LoRAConfig, generator: torch.Generator) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.config, self.enabled = config, True
        device, wide = base.weight.device, torch.promote_types(base.weight.dtype, torch.float32)
        a_RC = torch.empty(config.rank, base.in_features, dtype=wide)
        nn.init.kaiming_uniform_(a_RC, a=math.sqrt(5), generator=generator)
        b_OR = torch.zeros(base.out_features, config.rank, dtype=wide, device=device)
        self.lora_a, self.lora_b = nn.Parameter(a_RC.to(device)), nn.Parameter(b_OR)
        self.register_buffer("merged_weight", None, persistent=False)
        self.train(base.training)

    def forward(self, x_NC: Tensor) -> Tensor:
        if not self.enabled:
            return self.base(x_NC)
        x_NC, weight_OC, bias_O = self.base.cast(x_NC)
        if self.merged_weight is not None:
            assert not self.training, "unmerge before training: merged factors get no gradient"
            return F.linear(x_NC, self.merged_weight.to(x_NC.dtype), bias_O)
        return lora_linear(
            x_NC, weight_OC, self.lora_a, self.lora_b, bias_O=bias_O,
            scale=self.config.scale, dropout=self.config.dropout if self.training else 0.0,
            impl=self.impl,
        )  # fmt: skip

    @torch.no_grad()
    def folded_weight(self) -> Tensor:
        """W + scale B A, summed in the factors' dtype and rounded once to the dtype of W."""
        a_RC, b_OR, weight_OC = self.lora_a, self.lora_b, self.base.weight
        wide_OC = torch.addmm(weight_OC.to(a_RC.dtype), b_OR, a_RC, alpha=self.config.scale)
        return wide_OC.to(weight_OC.dtype)

    def merge(self) -> None:
        """Answer from one matrix from now on. For evaluation: the factors get no gradient."""
        self.merged_weight = self.folded_weight()

    def unmerge(self) -> None:
        """Back to base and update. Exact, since merging never writes to the base."""
        self.merged_weight = None

@dataclass(frozen=True)
class LoRAReport:
    """What `apply_lora` did: names of the wrapped layers and of the fully trained modules."""
    config: LoRAConfig
    wrapped: tuple[str, ...]
    trained: tuple[str, ...]

    def __str__(self) -> str:
        counts = Counter(map(leaf, self.wrapped))
        layers = ", ".join(f"{name} x {count}" for name, count in counts.items())
        extra = f"; fully trained: {', '.join(self.trained)}" if self.trained else ""
        c = self.config
        return f"LoRA rank {c.rank}, alpha {c.alpha:g}, scale {c.scale:g} on {layers}{extra}"

def apply_lora(
    model: nn.Module, config: LoRAConfig, *, generator: torch.Generator,
    trained_heads: Sequence[str] = (),
) -> LoRAReport:  # fmt: skip
    """Wrap the targets in place and freeze all but the factors and the fully trained modules.

    generator       draws the A of each target, in the order of the model's modules
    trained_heads   fully trained modules beside `config.extra_modules`: heads that are new
    raises          ConfigError: a name that matches nothing, a layer that is both wrapped and fully
                    trained or whose matrix is shared with another layer, a model already wrapped;
                    the model is then unchanged
    """
    refuse_wrapped(model)
    modules = [name for name, _ in model.named_modules() if name]
    wrapped = _targets(model, config.targets)
    patterns = (*config.extra_modules, *trained_heads)
    extra = set().union(*(match_names(p, modules, what="fully trained module") for p in patterns))
    if both := [name for name in wrapped if below(name, extra)]:
        raise ConfigError(f"LoRA target and fully trained at once: {', '.join(both)}: choose one")
    model.requires_grad_(False)
    for name in wrapped:
        model.set_submodule(name, LoRALinear(model.get_submodule(name), config, generator))
    for name in extra:
        model.get_submodule(name).requires_grad_(True)
    return LoRAReport(config, tuple(wrapped), tuple(name for name in modules if name in extra))

def _targets(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Names of the linear layers that the patterns choose, in the order of the model."""
    linears = [n for n, module in model.named_modules() if isinstance(module, nn.Linear) and n]
    chosen: set[str] = set()
    for pattern in patterns:
        if pattern == ALL_LINEAR:
            chosen.update(n for n in linears if not n.startswith("head."))
        else:
            chosen |= match_names(pattern, linears, what="LoRA target", also=[ALL_LINEAR])
    if not chosen:
        raise ConfigError(f"LoRA targets {list(patterns)}: the model has no linear layer to wrap")
    owners = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    if shared := [n for n in chosen if owners[id(model.get_submodule(n).weight)] > 1]:
        raise ConfigError(
            f"LoRA target {', '.join(sorted(shared))}: its matrix is tied to another layer's, so "
            "the merged model could not be saved; leave it out, or train it as an extra module"
        )
    return [name for name in linears if name in chosen]

def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The wrapped layers by name, to merge, unmerge or switch them."""
    return {n: module for n, module in model.named_modules() if isinstance(module, LoRALinear)}

def refuse_wrapped(model: nn.Module) -> None:
    """Raise ConfigError where the model has LoRA layers."""
    if lora_layers(model):
        raise ConfigError("the model has LoRA layers already: load the base model anew")

def plain_names(model: nn.Module) -> dict[str, str]:
    """Name in the model -> name before wrapping, of every saved tensor that is not a factor."""
    layers, names = lora_layers(model), {}
    for name in model.state_dict():
        owner, _, attribute = name.rpartition(".")
        inner = owner.removesuffix(".base")
        if owner not in layers:
            names[name] = f"{inner}.{attribute}" if inner in layers else name
    return names
