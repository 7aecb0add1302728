"""Rotary angles and attention windows of a config.json, as newer and older files write them.

newer   rope_parameters, with one entry per kind of layer where these differ; layer_types
older   rope_theta and rope_scaling; a period after which one layer sees everything
"""

from typing import Any

from ftcore.errors import ModelError
from ftcore.model.families.family import read_value
from ftcore.model.spec import ModelSpec

WINDOWED, FULL = "sliding_attention", "full_attention"
Base = tuple[str, float]  # of the angles: the key of older files, and what it is without one
BANDS = {
    "low_freq_factor": float, "high_freq_factor": float, "original_max_position_embeddings": int,
}  # fmt: skip


def read_rope(config: dict, theta: Base = ("rope_theta", 1e4)) -> dict[str, Any]:
    """The spec's rope_theta, rope_factor and rope_bands.

    raises  ModelError: a scaling that is not known here, or one with parts missing
    """
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type")) if isinstance(rope, dict) else rope
    if kind not in (None, "default", "linear", "llama3"):
        raise ModelError(
            f"config.json: rope_type = {kind!r}: only default, linear and llama3 are known. Set it"
            " to default, which serves documents up to the length before scaling."
        )
    place = (rope, "rope_theta") if "rope_theta" in rope else (config, theta[0])
    settings: dict[str, Any] = {"rope_theta": read_value(*place, theta[1])}
    if kind in ("linear", "llama3"):
        settings["rope_factor"] = read_value(rope, "factor", float)
    if kind == "llama3":
        settings["rope_bands"] = tuple(read_value(rope, *band) for band in BANDS.items())
    return settings


def rope_config(spec: ModelSpec) -> dict[str, Any]:
    """`rope_parameters` of a spec."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": spec.rope_theta}
    if spec.rope_factor != 1.0:
        rope |= {"rope_type": "linear", "factor": spec.rope_factor}
    if spec.rope_bands is not None:
        rope |= {"rope_type": "llama3", **dict(zip(BANDS, spec.rope_bands, strict=True))}
    return rope


def write_rope(spec: ModelSpec) -> dict[str, Any]:
    """Undoes `read_rope`; `rope_theta` at the top is for older readers."""
    return {"rope_parameters": rope_config(spec), "rope_theta": spec.rope_theta}


def read_two_ropes(config: dict, theta: Base, local_theta: Base) -> dict[str, Any]:
    """The same, and local_rope_theta, where layers with a window have a base of their own."""
    parts = config.get("rope_parameters") or {}
    settings = read_rope({**config, "rope_parameters": parts.get(FULL)}, theta)
    local = {**config, "rope_parameters": parts.get(WINDOWED), "rope_scaling": None}
    near = read_rope(local, local_theta)
    if len(near) > 1:
        raise ModelError(f"config.json: rope_parameters of {WINDOWED}: only rope_type = 'default'")
    return settings | {"local_rope_theta": near["rope_theta"]}


def two_ropes_config(spec: ModelSpec) -> dict[str, Any]:
    """`rope_parameters` of a spec with a local base."""
    local = {"rope_type": "default", "rope_theta": spec.local_rope_theta}
    return {FULL: rope_config(spec), WINDOWED: local}


def read_windows(config: dict, window: int, *, period: int, full: int) -> tuple[int, ...]:
    """The window of each layer, 0 for none, by `layer_types`.

    period, full    of files without it: of so many layers, which one sees the whole document
    raises          ModelError: another kind of layer, or not one for each
    """
    num_layers = read_value(config, "num_hidden_layers")
    usual = [FULL if index % period == full else WINDOWED for index in range(num_layers)]
    types = config.get("layer_types") or usual
    if len(types) != num_layers or not set(types) <= {WINDOWED, FULL}:
        raise ModelError(
            f"config.json: layer_types = {types}: must name {WINDOWED} or {FULL} for each of"
            f" {num_layers} layers"
        )
    return tuple(window if kind == WINDOWED else 0 for kind in types)


def layer_types(spec: ModelSpec) -> list[str]:
    """`layer_types` of a spec."""
    return [WINDOWED if window else FULL for window in spec.windows]
