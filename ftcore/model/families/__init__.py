"""Model families: a TOML file of tables for each HF model_type; _common.toml says what they mean.

Rotary angles and windows are read as newer files (rope_parameters, with one entry per kind of layer
where these differ; layer_types) and older ones (rope_theta, rope_scaling; a period) write them."""

import re
import sys
import tomllib
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple
import torch
from torch import Tensor
from ftcore.errors import ModelError
from ftcore.model.transformer import ModelSpec

FOLDER = Path(__file__).parent
NAMES = sorted(path.stem for path in FOLDER.glob("[!_]*.toml"))
Fields = dict[str, Any]  # of the spec
Older = tuple[str, float]  # the key of older files for a number, and what it is without one

LAYER = re.compile(r"(?<=\.)\d+(?=\.)")  # its number in a name
TENSOR = re.compile(r"(.*?)(\.weight|\.bias)?", re.DOTALL)  # module, tensor of it
RANGES = {bool: (False, True, "true or false"), int: (1, 10_000_000, "an integer in [1, 10000000]"),
          float: (0, sys.float_info.max, "a finite number >= 0")}
WINDOWED, FULL = "sliding_attention", "full_attention"
PART = "partial_rotary_factor"

def read_value(config: dict, key: str, default: Any = int, null_is_none: bool = False) -> Any:
    """One value of a config.json, of the type of the default, which stands for a missing key or
    null; a type: there is none. With `null_is_none` null is None, or what is missing with a type.
    ModelError: missing, of another type, out of range: a hostile file cannot ask for 2^60 rows."""
    kind = default if isinstance(default, type) else type(default)
    if (value := config.get(key)) is None:
        if null_is_none and (key in config or default is kind):
            return None
        value = None if default is kind else default
    least, most, claim = RANGES[kind]
    if type(value) not in (int, kind) or not least <= value <= most:
        raise ModelError(f"config.json: {key} = {value!r}: must be {claim}")
    return kind(value)

def read_rope(config: dict, base: Older = ("rope_theta", 1e4), part: Older | None = None) -> Fields:
    """Fields rope_..., the share too if a `part` of a head turns. ModelError: other scalings."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type")) if isinstance(rope, dict) else rope
    if kind not in (None, "default", "linear", "llama3"):
        what = f"config.json: rope_type = {kind!r}: only default, linear and llama3 are known"
        raise ModelError(f"{what}. Set it to default: it serves up to the length before scaling.")
    rope = {"rope_theta": config.get(base[0]), **rope}
    fields: Fields = {"rope_theta": read_value(rope, "rope_theta", base[1])}
    if kind in ("linear", "llama3"):
        fields["rope_factor"] = read_value(rope, "factor", float)
    if kind == "llama3":
        low, high = (read_value(rope, f"{end}_freq_factor", float) for end in ("low", "high"))
        fields["rope_bands"] = low, high, read_value(rope, "original_max_position_embeddings")
    if part is not None:
        fields["rope_share"] = read_value({PART: config.get(part[0]), **rope}, PART, part[1])
        if not 0 < fields["rope_share"] <= 1:
            raise ModelError(f"config.json: {PART} = {fields['rope_share']}: must be in (0, 1]")
    return fields

def read_two_ropes(config: dict, base: Older, local_base: Older) -> Fields:
    if not isinstance(parts := config.get("rope_parameters") or {}, dict):
        raise ModelError(f"config.json: rope_parameters = {parts!r}: must be an object")
    fields = read_rope({**config, "rope_parameters": parts.get(FULL)}, base)
    local = {**config, "rope_parameters": parts.get(WINDOWED), "rope_scaling": None}
    if len(near := read_rope(local, local_base)) > 1:
        raise ModelError(f"config.json: rope_parameters of {WINDOWED}: only rope_type = 'default'")
    return fields | {"local_rope_theta": near["rope_theta"]}

def read_windows(config: dict, key: str = "sliding_window", default: int = 4096, *, full: int = -1,
                 has_both_sides: bool = False, period: int = 0, period_key: str = "") -> Fields:
    """The window of each layer, 0 for none, by `layer_types`; in files without it, of each `period`
    layers the one numbered `full` sees all. Raises ModelError: other kinds, or not one for each."""
    if config.get(key, default) is None:
        return {"windows": ()}
    window, num_layers = read_value(config, key, default), read_value(config, "num_hidden_layers")
    if has_both_sides:
        window = window // 2 + 1  # HF: half a side, and itself
    if period_key:
        period = read_value(config, period_key, period)
    usual = [FULL if period and (i - full) % period == 0 else WINDOWED for i in range(num_layers)]
    types, kinds = config.get("layer_types") or usual, (WINDOWED, FULL)
    if type(types) is not list or len(types) != num_layers or any(t not in kinds for t in types):
        raise ModelError(f"config.json: layer_types = {types}: {num_layers} of {WINDOWED}, {FULL}")
    return {"windows": tuple(window if kind == WINDOWED else 0 for kind in types)}

def read_powers(config: dict, **powers: tuple[str, int, float]) -> Fields:
    """Fields that are a power of a value: (key, default, exponent)."""
    return {name: read_value(config, *key) ** power for name, (*key, power) in powers.items()}

def read_pooling(config: dict) -> Fields:
    if (pooling := config.get("classifier_pooling", "cls")) not in ("cls", "mean"):
        raise ModelError(f"config.json: classifier_pooling = {pooling!r}: must be cls or mean")
    return {"pooling": pooling}

def read_padded_positions(config: dict) -> Fields:
    """The rows of the positions up to `pad_token_id` are no token's."""
    offset = read_value(config, "pad_token_id", 1) + 1
    rows = read_value(config, "max_position_embeddings")
    return {"position_offset": offset, "max_positions": rows - offset}

RULES = {rule.__name__.removeprefix("read_"): rule for rule in (
    read_rope, read_two_ropes, read_windows, read_powers, read_pooling, read_padded_positions)}

class Family(NamedTuple):
    name: str  # `model_type` in config.json
    trunk_prefix: str
    names: Mapping[str, tuple[str, ...]]  # our pattern -> HF's, with the trunk's prefix or without
    architectures: Mapping[str, str]
    switches: Mapping[str, Any]
    keys: Mapping[str, tuple[Any, ...]]  # field of the spec -> what `read_value` takes
    fixed: Mapping[str, Any]
    rules: Mapping[str, dict[str, Any]]  # name -> options
    ignored: Sequence[str] = ()
    transposed: Sequence[str] = ()
    by_head: Sequence[str] = ()

    def to_spec(self, config: dict) -> ModelSpec:
        """Read a config.json. ModelError: values missing, out of range or not fitting."""
        for key, value in self.fixed.items():
            if (found := config.get(key, value)) != value and (found or value):  # null is false
                raise ModelError(f"config.json: {key} = {found!r}: only {value!r} is known")
        settings = {name: read_value(config, *key) for name, key in self.keys.items()}
        settings |= self.switches
        for rule, options in self.rules.items():
            settings |= RULES[rule](config, **options)
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
        module, rename = _parted(hf_name)
        return tuple(ours if hf_name in names else rename(ours)
                     for ours, names in self.names.items() if {module, hf_name} & {*names})

    def to_hf(self, our_name: str) -> str:
        """HF name of one of our tensors or modules."""
        module, rename = _parted(our_name)
        if not (names := self.names.get(our_name) or self.names.get(module)):
            raise ModelError(f"{our_name}: the family {self.name} has no name for it")
        return names[0] if our_name in self.names else rename(names[0])

    def hf_shape(self, hf_name: str, shape: Sequence[int]) -> list[int]:
        """Shape of an HF tensor whose parts, ours, have the given shape each."""
        whole = [shape[0] * len(self.to_ours(hf_name)), *shape[1:]]
        return whole[::-1] if matches(hf_name, self.transposed) else whole

    def split(self, hf_name: str, tensor: Tensor, num_heads: int) -> Sequence[Tensor]:
        """Ours of one HF tensor, in the order of `to_ours`."""
        rows = tensor.t() if matches(hf_name, self.transposed) else tensor
        if matches(hf_name, self.by_head):
            rows = rows.unflatten(0, (num_heads, 3, -1)).transpose(0, 1).flatten(0, 2)
        return rows.chunk(len(self.to_ours(hf_name)))

    def join(self, hf_name: str, parts: Sequence[Tensor], num_heads: int) -> Tensor:
        """The HF tensor of ours; undoes `split`."""
        rows = torch.cat([*parts]) if len(parts) > 1 else parts[0]
        if matches(hf_name, self.by_head):
            rows = rows.unflatten(0, (3, num_heads, -1)).transpose(0, 1).flatten(0, 2)
        return rows.t() if matches(hf_name, self.transposed) else rows

def matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)

def family_named(model_type: str, task: str = "", *, where: str = "config.json") -> Family:
    """MODEL_TYPE.toml as a family, with the head of a task. ModelError: it is not known here."""
    if model_type not in NAMES:
        what = f"{where}: model_type is {model_type!r}; this code knows {', '.join(NAMES)}"
        raise ModelError(f"{what}. Convert it to one of these, or add it to ftcore/model/families.")
    tables = _tables(model_type)
    trunk, head, keys, rules = (tables.pop(p, {}) for p in ("trunk", "head", "keys", "rules"))
    tagger = tables.pop("tagger", head["classifier"])
    head |= {"classifier": tagger} if task == "tag" else {}
    names = {f"trunk.{ours}": (tables["trunk_prefix"] + hf, hf) for ours, hf in trunk.items()}
    names |= {f"head.{n}": (hf,) if isinstance(hf, str) else tuple(hf) for n, hf in head.items()}
    tables["fixed"] |= dict.fromkeys(tables.pop("unset", ()))
    tables["keys"] = {name: (key,) if isinstance(key, str) else (key[0], *(key[1:] or [int, True]))
                      for name, key in keys.items()}
    return Family(name=model_type, names=names, rules=rules, **tables)

def _tables(name: str) -> dict[str, Any]:
    """What NAME.toml holds, and what it takes from the family that it is like."""
    own = tomllib.loads((FOLDER / f"{name}.toml").read_text("utf-8"))
    other = _tables(own.pop("like")) if "like" in own else {}
    parts = ("trunk", "switches", "keys")
    return other | own | {part: other.get(part, {}) | own.get(part, {}) for part in parts}

def _parted(name: str) -> tuple[str, Callable[[str], str]]:
    """A name's module, with {i} for its layer; what puts layer and tensor into another module's."""
    module, tensor = TENSOR.fullmatch(LAYER.sub("{i}", name, count=1)).groups("")
    return module, lambda other: other.replace("{i}", "".join(LAYER.findall(name)[:1])) + tensor

def _divided(key: str, total: int, by_key: str, by: int) -> int:
    if total % by:
        raise ModelError(f"config.json: {key} = {total} must be a multiple of {by_key} = {by}")
    return total // by
