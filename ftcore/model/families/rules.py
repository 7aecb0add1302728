"""What the tables of a family cannot say: rules, each from config.json to the spec and back.

A rule is a pair of functions: one reads a config.json, with the options that the family's file
gives, and returns fields of the spec; the other, write_NAME, undoes read_NAME: it returns the keys.

Rotary angles and windows are read as newer files write them (rope_parameters, with one entry per
kind of layer where these differ; layer_types) and older ones (rope_theta, rope_scaling; a period).
"""

import math
from collections.abc import Callable
from typing import Any

from ftcore.errors import ModelError
from ftcore.model.spec import ModelSpec

Fields = dict[str, Any]  # of the spec
Base = tuple[str, float]  # of the angles: the key of older files, and what it is without one

WINDOWED, FULL = "sliding_attention", "full_attention"
BANDS = {
    "low_freq_factor": float, "high_freq_factor": float, "original_max_position_embeddings": int,
}  # fmt: skip
TURNED = "partial_rotary_factor"
POOLING = {"cls": "first", "mean": "mean"}

def read_value(config: dict, key: str, default: Any = int, null_is_none: bool = False) -> Any:
    """One value of a config.json, of the default's type.

    default     what a missing key or null stands for; a type: nothing; None: None or an integer
    null_is_none    null is None, whatever stands for a missing key
    raises      ModelError: missing, of another type, a float that is negative or not finite, an
                integer out of [1, 10,000,000]: a hostile file cannot ask for 2^60 rows
    """
    value = config.get(key)
    if null_is_none and key in config and value is None:
        return None
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

def read_rope(config: dict, base: Base = ("rope_theta", 1e4)) -> Fields:
    """rope_theta, rope_factor, rope_bands. Raises ModelError: an unknown or incomplete scaling."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type")) if isinstance(rope, dict) else rope
    if kind not in (None, "default", "linear", "llama3"):
        what = f"config.json: rope_type = {kind!r}: only default, linear and llama3 are known"
        raise ModelError(f"{what}. Set it to default: it serves up to the length before scaling.")
    place = (rope, "rope_theta") if "rope_theta" in rope else (config, base[0])
    fields: Fields = {"rope_theta": read_value(*place, base[1])}
    if kind in ("linear", "llama3"):
        fields["rope_factor"] = read_value(rope, "factor", float)
    if kind == "llama3":
        fields["rope_bands"] = tuple(read_value(rope, *band) for band in BANDS.items())
    return fields

def rope_parameters(spec: ModelSpec) -> dict[str, Any]:
    """Those of the layers that see the whole document."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": spec.rope_theta}
    if spec.rope_factor != 1.0:
        rope |= {"rope_type": "linear", "factor": spec.rope_factor}
    if spec.rope_bands is not None:
        rope |= {"rope_type": "llama3", **dict(zip(BANDS, spec.rope_bands, strict=True))}
    return rope

def write_rope(spec: ModelSpec) -> dict[str, Any]:
    """Undoes `read_rope`; `rope_theta` at the top is for older readers."""
    return {"rope_parameters": rope_parameters(spec), "rope_theta": spec.rope_theta}

def read_partial_rope(config: dict) -> Fields:
    """The angles, and how many channels of a head they turn."""
    rope = config.get("rope_parameters") or {}
    place = (rope, TURNED) if TURNED in rope else (config, "rotary_pct")
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    rope_dim = int(head_dim * read_value(*place, 0.25))
    return read_rope(config, ("rotary_emb_base", 1e4)) | {"rope_dim": rope_dim}

def write_partial_rope(spec: ModelSpec) -> dict[str, Any]:
    """Undoes `read_partial_rope`, for older readers too."""
    turned = spec.rope_dim / spec.head_dim
    rope = rope_parameters(spec) | {TURNED: turned}
    return {"rope_parameters": rope, "rotary_pct": turned, "rotary_emb_base": spec.rope_theta}

def read_two_ropes(config: dict, base: Base, local_base: Base) -> Fields:
    """The angles, and local_rope_theta, the base of layers with a window."""
    parts = config.get("rope_parameters") or {}
    fields = read_rope({**config, "rope_parameters": parts.get(FULL)}, base)
    local = {**config, "rope_parameters": parts.get(WINDOWED), "rope_scaling": None}
    near = read_rope(local, local_base)
    if len(near) > 1:
        raise ModelError(f"config.json: rope_parameters of {WINDOWED}: only rope_type = 'default'")
    return fields | {"local_rope_theta": near["rope_theta"]}

def write_two_ropes(spec: ModelSpec) -> dict[str, Any]:
    local = {"rope_type": "default", "rope_theta": spec.local_rope_theta}
    return {"rope_parameters": {FULL: rope_parameters(spec), WINDOWED: local}}

def read_windows(config: dict, window: int, *, period: int, full: int) -> tuple[int, ...]:
    """The window of each layer, 0 for none, by `layer_types`; in files without it, of each `period`
    layers the one numbered `full` sees all. Raises ModelError: other kinds, or not one for each."""
    num_layers = read_value(config, "num_hidden_layers")
    usual = [FULL if index % period == full else WINDOWED for index in range(num_layers)]
    types = config.get("layer_types") or usual
    if len(types) != num_layers or not set(types) <= {WINDOWED, FULL}:
        must = f"must name {WINDOWED} or {FULL} for each of {num_layers} layers"
        raise ModelError(f"config.json: layer_types = {types}: {must}")
    return tuple(window if kind == WINDOWED else 0 for kind in types)

def layer_types(spec: ModelSpec) -> list[str]:
    """Undoes `read_windows`."""
    return [WINDOWED if window else FULL for window in spec.windows]

def read_one_window(config: dict) -> Fields:
    """The same window in all layers, or null: 4096, the first Mistral's, if it is not named."""
    if config.get("sliding_window", 4096) is None:
        return {"windows": ()}
    window = read_value(config, "sliding_window", 4096)
    return {"windows": (window,) * read_value(config, "num_hidden_layers")}

def write_one_window(spec: ModelSpec) -> dict[str, Any]:
    return {"sliding_window": spec.windows[0] if spec.windows else None}

def read_gemma(config: dict, period: int, period_key: str | None = None) -> Fields:
    """Scales of embeddings and scores, and windows: none in the last layer of each period."""
    if config.get("use_bidirectional_attention"):
        raise ModelError("config.json: use_bidirectional_attention: only a causal Gemma is known")
    window = read_value(config, "sliding_window", 4096)
    period = read_value(config, period_key, period) if period_key else period
    return {
        "embedding_scale": read_value(config, "hidden_size") ** 0.5,
        "attention_scale": read_value(config, "query_pre_attn_scalar", 256) ** -0.5,
        "windows": read_windows(config, window, period=period, full=period - 1),
    }

def write_gemma(spec: ModelSpec) -> dict[str, Any]:
    windows = {"sliding_window": max(spec.windows), "layer_types": layer_types(spec)}
    return {"query_pre_attn_scalar": round(spec.attention_scale**-2), **windows}

def read_modernbert(config: dict) -> Fields:
    """Windows, none in the first layer of each period, and what a classifier pools."""
    period = read_value(config, "global_attn_every_n_layers", 3)
    window = read_value(config, "local_attention", 128) // 2 + 1  # HF: half a side, and itself
    if (pooling := config.get("classifier_pooling", "cls")) not in POOLING:
        raise ModelError(f"config.json: classifier_pooling = {pooling!r}: must be cls or mean")
    windows = read_windows(config, window, period=period, full=0)
    return {"windows": windows, "pooling": POOLING[pooling]}

def write_modernbert(spec: ModelSpec) -> dict[str, Any]:
    pooling = "cls" if spec.pooling == "first" else "mean"
    width, types = 2 * (max(spec.windows) - 1), layer_types(spec)
    return {"local_attention": width, "layer_types": types, "classifier_pooling": pooling}

def read_padded_positions(config: dict) -> Fields:
    """The rows of the positions up to `pad_token_id` are no token's."""
    offset = read_value(config, "pad_token_id", 1) + 1
    rows = read_value(config, "max_position_embeddings")
    return {"position_offset": offset, "max_positions": rows - offset}

def write_padded_positions(spec: ModelSpec) -> dict[str, Any]:
    rows = spec.max_positions + spec.position_offset
    return {"pad_token_id": spec.position_offset - 1, "max_position_embeddings": rows}

RULES: dict[str, tuple[Callable[..., Fields], Callable[[ModelSpec], dict[str, Any]]]] = {
    "rope": (read_rope, write_rope), "partial_rope": (read_partial_rope, write_partial_rope),
    "two_ropes": (read_two_ropes, write_two_ropes),
    "one_window": (read_one_window, write_one_window), "gemma": (read_gemma, write_gemma),
    "modernbert": (read_modernbert, write_modernbert),
    "padded_positions": (read_padded_positions, write_padded_positions),
}
