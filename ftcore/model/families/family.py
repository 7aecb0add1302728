"""The form of a family: tables of config keys and of tensor names, each read in both directions.

A key table is a dict from a field of the spec to its HF key and default (see `read_value`).

A name table is a dict from HF pattern to our pattern; `{i}` stands for the layer number. The HF
side is written without the prefix of the trunk (`model.`, `bert.`), which some checkpoints leave
out: it is accepted either way when reading, and always written. Where HF keeps several matrices in
one, our side is the tuple of them, in the order of their rows.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ftcore.errors import ModelError
from ftcore.model.spec import ModelSpec

NameTable = Mapping[str, str | tuple[str, ...]]
KeyTable = Mapping[str, tuple[str, Any]]

KEYS: KeyTable = {
    "vocab_size": ("vocab_size", int), "hidden_size": ("hidden_size", int),
    "num_layers": ("num_hidden_layers", int), "num_heads": ("num_attention_heads", int),
    "intermediate_size": ("intermediate_size", int),
    "max_positions": ("max_position_embeddings", int),
    "tie_word_embeddings": ("tie_word_embeddings", True),
    "initializer_range": ("initializer_range", 0.02),
}  # fmt: skip
PLACES = {  # of our modules in the trunk
    "trunk": ("embed_tokens", "embed_positions", "embed_types", "embed_norm", "norm"),
    "trunk.layers.{i}": (
        "input_layernorm", "attn_output_norm", "post_attention_layernorm", "mlp_output_norm"
    ),
    "trunk.layers.{i}.self_attn": ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"),
    "trunk.layers.{i}.mlp": ("gate_proj", "up_proj", "down_proj"),
}  # fmt: skip
PATHS = {name: f"{place}.{name}" for place, names in PLACES.items() for name in names}
FUSED = {
    "qkv_proj": tuple(PATHS[f"{x}_proj"] for x in ("q", "k", "v")),
    "gate_up_proj": tuple(PATHS[f"{x}_proj"] for x in ("gate", "up")),
}


def trunk_names(layer: str, **hf_names: str) -> dict[str, str | tuple[str, ...]]:
    """The name table of a trunk, from what HF calls our modules of `PLACES`, or their matrices that
    it keeps in one (`FUSED`). The names of what a layer has are written without `layer`."""
    ours = PATHS | FUSED
    return {
        f"{layer}.{hf_name}" if "{i}" in str(ours[name]) else hf_name: ours[name]
        for name, hf_name in hf_names.items()
    }


@dataclass(frozen=True)
class Family:
    """One HF `model_type`."""

    name: str  # `model_type` in config.json
    trunk_prefix: str  # HF prefix of the trunk's tensors, with the dot
    trunk_names: NameTable
    head_names: NameTable
    architectures: Mapping[str, str]  # task -> HF class name
    switches: Mapping[str, Any]  # what the family decides of a spec
    keys: KeyTable  # what the spec takes from config.json as it is
    fixed: Mapping[str, Any]  # keys of config.json that can have one value only
    # what a table cannot say: config.json -> fields of the spec (or a ModelError), and back
    read: Callable[[dict], dict[str, Any]] = lambda config: {}
    write: Callable[[ModelSpec], dict[str, Any]] = lambda spec: {}
    ignored: tuple[str, ...] = ()  # HF patterns that a checkpoint may hold and we do not need
    tagger: str = ""  # HF name of the token classifier, where it is not the other's
    transposed: tuple[str, ...] = ()  # HF patterns of matrices stored (inputs, outputs)
    fused_by_head: bool = False  # the rows of a fused matrix lie head by head, else part by part

    def to_spec(self, config: dict) -> ModelSpec:
        """Read a config.json.

        raises  ModelError: a value missing or out of range, sizes that do not fit each other, or a
                setting that the family does not have
        """
        for key, value in self.fixed.items():
            if config.get(key, value) != value:
                raise ModelError(f"config.json: {key} = {config[key]!r}: only {value!r} is known")
        settings = {name: read_value(config, *key) for name, key in self.keys.items()}
        settings |= {**self.switches, **self.read(config)}
        C, H = settings["hidden_size"], settings["num_heads"]
        if settings.get("head_dim") is None:
            settings["head_dim"] = _divided("hidden_size", C, "num_attention_heads", H)
        if settings.get("num_kv_heads") is None:
            settings["num_kv_heads"] = H
        _divided("num_attention_heads", H, "num_key_value_heads", settings["num_kv_heads"])
        return ModelSpec(**settings)

    def to_config(self, spec: ModelSpec) -> dict[str, Any]:
        """The keys of config.json that the spec decides."""
        taken = {key: getattr(spec, name) for name, (key, _) in self.keys.items()}
        return {"model_type": self.name, **self.fixed, **taken, **self.write(spec)}

    def of(self, task: str) -> "Family":
        """The family with the head names of one task."""
        if task != "tag" or not self.tagger:
            return self
        return replace(self, head_names={self.tagger: "head.classifier", **self.head_names})

    def to_ours(self, hf_name: str) -> tuple[str, ...]:
        """Our names of an HF tensor or module; none where the family does not know it."""
        # HF: files of 2018 call a norm's weight gamma and its bias beta.
        hf_name = re.sub(r"\.gamma$", ".weight", re.sub(r"\.beta$", ".bias", hf_name))
        bare = hf_name.removeprefix(self.trunk_prefix)
        for table, name in ((self.trunk_names, bare), (self.head_names, hf_name)):
            for source, target in table.items():
                targets = (target,) if isinstance(target, str) else target
                found = [_renamed(name, source, one) for one in targets]
                if found[0] is not None:
                    return tuple(found)
        return ()

    def to_hf(self, our_name: str, *, bare: bool = False) -> str:
        """HF name of one of our tensors or modules; `bare` leaves out the trunk's prefix."""
        prefix = "" if bare else self.trunk_prefix
        for table, start in ((self.trunk_names, prefix), (self.head_names, "")):
            for target, sources in table.items():
                for source in (sources,) if isinstance(sources, str) else sources:
                    hf_name = _renamed(our_name, source, target)
                    if hf_name is not None:
                        return start + hf_name
        raise ModelError(f"{our_name}: the family {self.name} has no name for it")

    def hf_shape(self, hf_name: str, shape: Sequence[int]) -> list[int]:
        """Shape of an HF tensor whose parts, ours, have the given shape each."""
        whole = [shape[0] * len(self.to_ours(hf_name)), *shape[1:]]
        return whole[::-1] if matches(hf_name, self.transposed) else whole

    def split(self, hf_name: str, tensor: Tensor, num_heads: int) -> list[Tensor]:
        """Ours of one HF tensor, in the order of `to_ours`."""
        rows = tensor.t() if matches(hf_name, self.transposed) else tensor
        num_parts = len(self.to_ours(hf_name))
        if num_parts == 1:
            return [rows]
        num_blocks = num_heads if self.fused_by_head else 1
        parts = rows.unflatten(0, (num_blocks, num_parts, -1))
        return [part.flatten(0, 1) for part in parts.unbind(1)]

    def join(self, hf_name: str, parts: Sequence[Tensor], num_heads: int) -> Tensor:
        """The HF tensor of ours; undoes `split`."""
        rows = parts[0]
        if len(parts) > 1:
            num_blocks = num_heads if self.fused_by_head else 1
            blocks = [part.unflatten(0, (num_blocks, -1)) for part in parts]
            rows = torch.stack(blocks, dim=1).flatten(0, 2)
        return rows.t() if matches(hf_name, self.transposed) else rows


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether the name fits one of the globs."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


@cache
def _pattern(source: str) -> re.Pattern:
    layer = re.escape(source).replace(r"\{i\}", r"(?P<i>\d+)")
    return re.compile(layer + r"(?P<rest>(\.(weight|bias))?)")


def _renamed(name: str, source: str, target: str) -> str | None:
    """`name` with `source` made `target`, where that is its whole or its module prefix."""
    found = _pattern(source).fullmatch(name)
    return found and target.replace("{i}", found.groupdict().get("i", "")) + found["rest"]


def read_value(config: dict, key: str, default: Any = int) -> Any:
    """One value of a config.json, of the default's type.

    default     what a missing key or null stands for; a type: nothing, it must be there;
                None: None, and otherwise it is an integer
    raises      ModelError: missing, of another type, a float that is negative or not finite, an
                integer out of [1, 10,000,000]: a hostile file cannot ask for 2^60 rows
    """
    value = config.get(key)
    if value is None and not isinstance(default, type):
        value = default
    if isinstance(default, bool):
        return bool(value)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if isinstance(default, float) or default is float:
        if not is_number or not 0 <= value < math.inf:
            raise ModelError(f"config.json: {key} = {value!r}: must be a finite number >= 0")
        return float(value)
    if value is None and default is None:
        return None
    if not is_number or isinstance(value, float) or not 1 <= value <= 10_000_000:
        raise ModelError(f"config.json: {key} = {value!r}: must be an integer in [1, 10000000]")
    return value


def _divided(key: str, total: int, by_key: str, by: int) -> int:
    if total % by:
        raise ModelError(f"config.json: {key} = {total} must be a multiple of {by_key} = {by}")
    return total // by


def architectures(classes: str, lm: str) -> dict[str, str]:
    """HF's classes of a family by task, whose names start with `classes`; `lm` is "lm" or "mlm"."""
    heads = {
        lm: {"lm": "ForCausalLM", "mlm": "ForMaskedLM"}[lm],
        "classify": "ForSequenceClassification", "tag": "ForTokenClassification", "trunk": "Model",
    }  # fmt: skip
    return {task: classes + head for task, head in heads.items()}
