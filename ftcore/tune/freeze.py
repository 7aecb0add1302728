"""What is trained, by policies and patterns; at which rates; the table and the proof of it.

last:K          the last K of the model's `layers` and all that follows: final norm, pooler, head
embeddings      token, position and segment matrices
norms, biases   modules with "norm" in their name; every bias (BitFit, arXiv:2106.10199)
all, head       everything; what sits on the transformer
anything else   a name or glob: `q_proj`, `trunk.layers.[0-3].*`, `*.mlp`; a module: all below it

Rates over that of the run are head_lr_ratio of the head and of a policy's values,
embedding_lr_ratio * layer_lr_decay ** (L + 1) of the embeddings and their norm (a tied head among
them), layer_lr_decay ** (L - l) of layer l of L, from 0 (Howard and Ruder 2018, arXiv:1801.06146),
loraplus_lr_ratio times that of B in a low-rank update (LoRA+, Hayou et al., arXiv:2402.12354)."""

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
import torch
from torch import Tensor, nn
from ftcore.config import OptimConfig
from ftcore.errors import ConfigError, ModelError, nearest
from ftcore.model.families import LAYER
from ftcore.model.heads import Model

POLICIES = {"all": "*", "head": "head.*", "embeddings": "*.embed_*s.*", "norms": "*norm.*",
            "biases": "*.bias"}
KNOWN = (*POLICIES, "last:K")

def leaf(name: str) -> str:
    return name.rpartition(".")[2]

def match_names(pattern: str, names: list[str], *, what: str, also: Sequence[str] = ()) -> set[str]:
    """The names that are `pattern`, have it as last component, or fit it as a glob. Raises
    ConfigError that calls it `what`, with the nearest name, last components and words `also`."""
    if found := {n for n in names if pattern in (n, leaf(n)) or fnmatchcase(n, pattern)}:
        return found
    known = [*also, *sorted(n for n in set(map(leaf, names)) if not n.isdecimal())]
    hint = nearest(pattern, [*known, *names])
    raise ConfigError(f"{what} {pattern!r} matches nothing{hint}; known: {', '.join(known)}")

def below(name: str, modules: set[str]) -> bool:
    return any(f"{name}.".startswith(f"{module}.") for module in modules)

def apply_trainable(model: nn.Module, rules: Sequence[str]) -> str:
    """Make exactly what any of the rules names trainable; returns the parameter_table.
    Raises ConfigError: no rule, or one that matches nothing; the model is then unchanged."""
    if not rules:
        raise ConfigError(f"no rule says what to train; known: {', '.join(KNOWN)}, or a pattern")
    chosen = set().union(*(_resolve(model, rule) for rule in rules))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen)
    return parameter_table(model)

def _resolve(model: nn.Module, rule: str) -> set[str]:
    names = [name for name, _ in model.named_parameters()]
    if rule.startswith("last:"):  # from layer L - K on, in the order of the forward pass
        layers = [int(m[0]) if (m := LAYER.search(n)) else -1 for n in names]
        num_layers, count = 1 + max(layers, default=-1), rule.removeprefix("last:")
        if not count.isdecimal() or not 1 <= int(count) <= num_layers:
            raise ConfigError(f"trainable rule {rule!r}: K must be an integer in [1, {num_layers}]")
        return set(names[layers.index(num_layers - int(count)) :])
    if rule in POLICIES:
        if found := {n for n in names if fnmatchcase(n, POLICIES[rule])}:
            return found
        hint = "; an LM head tied to them is trained by 'embeddings'" if rule == "head" else ""
        raise ConfigError(f"trainable rule {rule!r}: the model has no such parameter{hint}")
    modules = [n for n, m in model.named_modules() if n and any(True for _ in m.parameters())]
    matched = match_names(rule, [*modules, *names], what="trainable rule", also=KNOWN)
    return {n for n in names if below(n, matched)}

def rates_of(model: Model, config: OptimConfig) -> dict[str, float]:
    """Of all that is trained, by name: over that of the run."""
    num_layers, found = len(model.trunk.layers), {}
    for name in (name for name, param in model.named_parameters() if param.requires_grad):
        layer, embeds = LAYER.search(name), name.startswith("trunk.embed_")
        depth = num_layers - int(layer[0]) if layer else (num_layers + 1) * embeds
        ratio = config.embedding_lr_ratio if embeds else 1.0
        if name.startswith(("head.", "value.")):
            ratio = config.head_lr_ratio
        plus = config.loraplus_lr_ratio if leaf(name) == "lora_b" else 1.0
        found[name] = ratio * config.layer_lr_decay**depth * plus
    return found

def parameter_table(model: nn.Module) -> str:
    """Name, shape of one, values of all, trainable; equal layers in one line; the share last."""
    groups = defaultdict(list)  # numbers of the layers, in texts
    for name, p in model.named_parameters():
        key = LAYER.sub("{}", name), " x ".join(map(str, p.shape)), p.numel(), p.requires_grad
        groups[key].append("".join(LAYER.findall(name)))
    rows = [("parameter", "shape", "values", "trainable")]
    for (pattern, shape, numel, trained), layers in groups.items():
        is_run = layers[1:] and int(layers[-1]) - int(layers[0]) == len(layers) - 1
        told = f"{layers[0]}-{layers[-1]}" if is_run else ",".join(layers)
        label = pattern.replace("{}", "{" + told + "}")
        rows.append((label, shape, f"{numel * len(layers):,}", "yes" if trained else "-"))
    w = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [f"{row[0]:<{w[0]}}  {row[1]:>{w[1]}}  {row[2]:>{w[2]}}  {row[3]}" for row in rows]
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    share = trained / max(total, 1)
    return "\n".join([*lines, f"trainable: {trained:,} of {total:,} values ({share:.2%})"])

def tensor_sha256(tensor: Tensor) -> str:
    """Hash of a tensor's dtype, shape and bits."""
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
    digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()

def frozen_hashes(model: nn.Module) -> dict[str, str]:
    """sha256 of every tensor that training must not move: frozen parameters and saved buffers."""
    tensors = model.state_dict(keep_vars=True)
    return {name: tensor_sha256(t) for name, t in tensors.items() if not t.requires_grad}

def assert_unmoved(before: Mapping[str, str], model: nn.Module) -> None:
    """Raise ModelError naming the tensors of an earlier `frozen_hashes` whose bits have changed."""
    now = model.state_dict()
    if moved := [n for n, sha in before.items() if n not in now or tensor_sha256(now[n]) != sha]:
        raise ModelError(f"frozen tensors moved during training: {', '.join(moved)}")
