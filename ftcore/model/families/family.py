"""The form of a family: a config map and a tensor-name table, each read in both directions.

A name table is a dict from HF pattern to our pattern; `{i}` stands for the layer number. The HF
side is written without the prefix of the trunk (`model.`, `bert.`), which some checkpoints leave
out: it is accepted either way when reading, and always written.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from ftcore.errors import ModelError
from ftcore.model.spec import ModelSpec


@dataclass(frozen=True)
class Family:
    """One HF `model_type`.

    name                        `model_type` in config.json
    trunk_prefix                HF prefix of the trunk's tensors, with the dot
    trunk_names, head_names     HF pattern -> our pattern, `{i}` = layer
    ignored                     HF patterns that a checkpoint may hold and we do not need
    to_spec                     config.json -> ModelSpec
    to_config                   ModelSpec -> the config.json keys that the spec decides
    architectures               task ("lm", "classify", "trunk") -> HF class name
    """

    name: str
    trunk_prefix: str
    trunk_names: Mapping[str, str]
    head_names: Mapping[str, str]
    ignored: tuple[str, ...]
    to_spec: Callable[[dict], ModelSpec]
    to_config: Callable[[ModelSpec], dict]
    architectures: Mapping[str, str]

    def to_ours(self, hf_name: str) -> str | None:
        """Our name of an HF tensor or module, or None where the family does not know it."""
        bare = hf_name.removeprefix(self.trunk_prefix)
        for table, name in ((self.trunk_names, bare), (self.head_names, hf_name)):
            ours = _translate(name, table)
            if ours is not None:
                return ours
        return None

    def to_hf(self, our_name: str, *, bare: bool = False) -> str:
        """HF name of one of our tensors or modules; `bare` leaves out the trunk's prefix."""
        inverse = {ours: hf for hf, ours in self.trunk_names.items()}
        hf_name = _translate(our_name, inverse)
        if hf_name is not None:
            return hf_name if bare else self.trunk_prefix + hf_name
        hf_name = _translate(our_name, {ours: hf for hf, ours in self.head_names.items()})
        if hf_name is None:
            raise ModelError(f"{our_name}: the family {self.name} has no name for it")
        return hf_name

    def is_ignored(self, hf_name: str) -> bool:
        """Whether a checkpoint may hold this tensor without our using it."""
        return any(fnmatchcase(hf_name, pattern) for pattern in self.ignored)


def _translate(name: str, table: Mapping[str, str]) -> str | None:
    """Rewrite `name` by the first pattern of the table that is its whole or its module prefix."""
    for source, target in table.items():
        pattern = re.escape(source).replace(r"\{i\}", r"(?P<i>\d+)")
        found = re.fullmatch(pattern + r"(?P<rest>(\.(weight|bias))?)", name)
        if found:
            layer = found.groupdict().get("i")
            return (target if layer is None else target.format(i=layer)) + found["rest"]
    return None


def read_int(config: dict, key: str, *, default: int | None = None) -> int:
    """A positive integer of a config.json, bounded so that a hostile file cannot ask for 2^60 rows.

    raises  ModelError: missing without default, not an integer, or out of [1, 10,000,000]
    """
    value = default if config.get(key) is None else config[key]
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 10_000_000:
        raise ModelError(f"config.json: {key} = {value!r}: must be an integer in [1, 10000000]")
    return value


def read_float(config: dict, key: str, *, default: float) -> float:
    """A finite number >= 0 of a config.json.

    raises  ModelError: not a number, negative or not finite
    """
    value = default if config.get(key) is None else config[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise ModelError(f"config.json: {key} = {value!r}: must be a finite number >= 0")
    return float(value)


def expect(config: dict, known: Mapping[str, object]) -> None:
    """Refuse a config.json that asks for what the family does not have.

    raises  ModelError: a key of `known` is there with another value
    """
    for key, value in known.items():
        if config.get(key, value) != value:
            raise ModelError(f"config.json: {key} = {config[key]!r}: only {value!r} is known")


def read_heads(hidden_size: int, num_heads: int) -> int:
    """Width of one head, where the heads share the model's width.

    raises  ModelError: the width is not a multiple of the number of heads
    """
    if hidden_size % num_heads:
        raise ModelError(
            f"config.json: hidden_size = {hidden_size} must be a multiple of"
            f" num_attention_heads = {num_heads}"
        )
    return hidden_size // num_heads
