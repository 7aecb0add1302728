"""Model families: one TOML file of tables for each HF `model_type`, beside this one.

like            another family, whose tables stand where this file has none; of [trunk], [switches]
                and [keys] each entry that this file lacks
trunk_prefix    HF prefix of the trunk's tensors, with the dot: some checkpoints leave it out, so
                either form is read, and the prefix is always written
ignored         HF patterns that a checkpoint may hold and we do not need
tagger          HF name of the token classifier, where it is not the other's
transposed      HF patterns of matrices stored (inputs, outputs)
fused_by_head   the rows of a fused matrix lie head by head, else part by part
[architectures] task = HF class name
[trunk] [head]  our name = HF's; {i} stands for the layer. Of several, the first is written. What
                HF keeps in one matrix has its name several times, in the order of the rows
[switches]      what the family decides of a spec
[keys]          field of the spec = key of config.json, as [key, default], or [key] if optional, or
                [key, default, true] where null is none
[fixed]         keys of config.json that can have one value only; `unset` lists those that are null
rules           what a table cannot say: names in rules.py, with options
"""

import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ftcore.errors import ModelError
from ftcore.model.families import rules
from ftcore.model.spec import ModelSpec

FOLDER = Path(__file__).parent

@dataclass(frozen=True)
class Family:
    """One HF `model_type`."""
    name: str  # `model_type` in config.json
    trunk_prefix: str
    names: Mapping[str, tuple[str, ...]]  # our pattern -> HF's, with the trunk's prefix or without
    architectures: Mapping[str, str]
    switches: Mapping[str, Any]
    keys: Mapping[str, tuple[Any, ...]]  # field of the spec -> what `read_value` takes
    fixed: Mapping[str, Any]
    rules: Mapping[str, dict[str, Any]] = field(default_factory=dict)  # name -> options
    ignored: Sequence[str] = ()
    transposed: Sequence[str] = ()
    fused_by_head: bool = False

    def to_spec(self, config: dict) -> ModelSpec:
        """Read a config.json. Raises ModelError: a value missing or out of range, sizes that do not
        fit each other, or a setting that the family does not have."""
        for key, value in self.fixed.items():
            if config.get(key, value) != value:
                raise ModelError(f"config.json: {key} = {config[key]!r}: only {value!r} is known")
        settings = {name: rules.read_value(config, *key) for name, key in self.keys.items()}
        settings |= self.switches
        for rule, options in self.rules.items():
            settings |= getattr(rules, f"read_{rule}")(config, **options)
        C, H = settings["hidden_size"], settings["num_heads"]
        if settings.get("head_dim") is None:
            settings["head_dim"] = _divided("hidden_size", C, "num_attention_heads", H)
        settings["num_kv_heads"] = settings.get("num_kv_heads") or H
        settings["intermediate_size"] = settings["intermediate_size"] or 4 * C
        _divided("num_attention_heads", H, "num_key_value_heads", settings["num_kv_heads"])
        return ModelSpec(**settings)

    def to_config(self, spec: ModelSpec) -> dict[str, Any]:
        """The keys of config.json that the tables name; what only rules read is not among them."""
        values = vars(spec) | {"max_positions": spec.max_positions + spec.position_offset}
        taken = {key: values[name] for name, (key, *_) in self.keys.items()}
        return {"model_type": self.name, **self.fixed, **taken}

    def to_ours(self, hf_name: str) -> tuple[str, ...]:
        """Our names of an HF tensor or module; none where the family does not know it."""
        # HF: files of 2018 call a norm's weight gamma and its bias beta.
        hf_name = re.sub(r"\.gamma$", ".weight", re.sub(r"\.beta$", ".bias", hf_name))
        pairs = ((hf, ours) for ours, hf_names in self.names.items() for hf in hf_names)
        return tuple(_renamed(hf_name, pairs))

    def to_hf(self, our_name: str, *, bare: bool = False) -> str:
        """HF name of one of our tensors or modules; `bare` leaves out the trunk's prefix."""
        pairs = ((ours, hf_names[0]) for ours, hf_names in self.names.items())
        hf_name = next(_renamed(our_name, pairs), None)
        if hf_name is None:
            raise ModelError(f"{our_name}: the family {self.name} has no name for it")
        return hf_name.removeprefix(self.trunk_prefix) if bare else hf_name

    def hf_shape(self, hf_name: str, shape: Sequence[int]) -> list[int]:
        """Shape of an HF tensor whose parts, ours, have the given shape each."""
        whole = [shape[0] * len(self.to_ours(hf_name)), *shape[1:]]
        return whole[::-1] if matches(hf_name, self.transposed) else whole

    def split(self, hf_name: str, tensor: Tensor, num_heads: int) -> list[Tensor]:
        """Ours of one HF tensor, in the order of `to_ours`."""
        rows = tensor.t() if matches(hf_name, self.transposed) else tensor
        if (num_parts := len(self.to_ours(hf_name))) == 1:
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

def family_names() -> list[str]:
    """The families known here, by `model_type`: each has its file."""
    return sorted(path.stem for path in FOLDER.glob("[!_]*.toml"))

def family_of(config: dict, where: str, task: str) -> Family:
    """The family of a `config.json`. Raises ModelError: its `model_type` is not known here."""
    if (name := config.get("model_type")) not in family_names():
        what = f"{where}: model_type is {name!r}; this code knows {', '.join(family_names())}"
        raise ModelError(f"{what}. Convert it to one of these, or add it to ftcore/model/families.")
    return family_named(name, task)

def family_named(model_type: str, task: str = "") -> Family:
    """The family of MODEL_TYPE.toml, with its names for the head of one task."""
    tables = _tables(model_type)
    trunk, head, keys, tagger = (tables.pop(p, {}) for p in ("trunk", "head", "keys", "tagger"))
    names = {f"trunk.{ours}": (tables["trunk_prefix"] + hf, hf) for ours, hf in trunk.items()}
    for ours, hf in head.items():
        names[f"head.{ours}"] = (hf,) if isinstance(hf, str) else tuple(hf)
    if tagger and task == "tag":
        names["head.classifier"] = (tagger, *names["head.classifier"])
    tables["fixed"] |= dict.fromkeys(tables.pop("unset", ()))
    tables["keys"] = {
        name: (key, int) if isinstance(key, str) else (key[0], *(key[1:] or [None]))
        for name, key in keys.items()
    }
    return Family(name=model_type, names=names, **tables)

def _tables(name: str) -> dict[str, Any]:
    """What NAME.toml holds, and what it takes from the family that it is like."""
    own = tomllib.loads((FOLDER / f"{name}.toml").read_text("utf-8"))
    if "like" not in own:
        return own
    other = _tables(own.pop("like"))
    parts = ("trunk", "switches", "keys")
    return other | own | {part: other.get(part, {}) | own.get(part, {}) for part in parts}

def _renamed(name: str, pairs: Iterable[tuple[str, str]]) -> Iterator[str]:
    """The second of each pair whose first is the name, or that without .weight or .bias."""
    layer = re.search(r"(?<=\.)\d+(?=\.)", name)
    pattern = name if layer is None else f"{name[: layer.start()]}{{i}}{name[layer.end() :]}"
    module, _, tensor = pattern.rpartition(".")
    rests = {pattern: ""} | ({module: f".{tensor}"} if tensor in ("weight", "bias") else {})
    for source, target in pairs:
        if source in rests:
            yield (target + rests[source]).replace("{i}", layer[0] if layer else "")

def _divided(key: str, total: int, by_key: str, by: int) -> int:
    if total % by:
        raise ModelError(f"config.json: {key} = {total} must be a multiple of {by_key} = {by}")
    return total // by
