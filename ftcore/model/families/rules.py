"""What the tables of a family cannot say: rules, each from config.json to fields of the spec.

A family's file names a rule, `read_NAME` here, with options. Nothing leads back: what a rule reads
is kept in config.json as it was read.

Rotary angles and windows are read as newer files write them (rope_parameters, with one entry per
kind of layer where these differ; layer_types) and older ones (rope_theta, rope_scaling; a period).
"""

import math
from typing import Any

from ftcore.errors import ModelError

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
    if value is None:
        if default is None or (null_is_none and key in config):
            return None
        value = None if isinstance(default, type) else default
    if isinstance(default, bool):
        return bool(value)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if isinstance(default, float) or default is float:
        if not is_number or not 0 <= value < math.inf:
            raise ModelError(f"config.json: {key} = {value!r}: must be a finite number >= 0")
        return float(value)
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

def read_partial_rope(config: dict) -> Fields:
    """The angles, and how many channels of a head they turn."""
    rope = config.get("rope_parameters") or {}
    place = (rope, TURNED) if TURNED in rope else (config, "rotary_pct")
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    rope_dim = int(head_dim * read_value(*place, 0.25))
    return read_rope(config, ("rotary_emb_base", 1e4)) | {"rope_dim": rope_dim}

def read_two_ropes(config: dict, base: Base, local_base: Base) -> Fields:
    """The angles, and local_rope_theta, the base of layers with a window."""
    parts = config.get("rope_parameters") or {}
    fields = read_rope({**config, "rope_parameters": parts.get(FULL)}, base)
    local = {**config, "rope_parameters": parts.get(WINDOWED), "rope_scaling": None}
    near = read_rope(local, local_base)
    if len(near) > 1:
        raise ModelError(f"config.json: rope_parameters of {WINDOWED}: only rope_type = 'default'")
    return fields | {"local_rope_theta": near["rope_theta"]}

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

def read_one_window(config: dict) -> Fields:
    """The same window in all layers, or null: 4096, the first Mistral's, if it is not named."""
    if config.get("sliding_window", 4096) is None:
        return {"windows": ()}
    window = read_value(config, "sliding_window", 4096)
    return {"windows": (window,) * read_value(config, "num_hidden_layers")}

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

def read_modernbert(config: dict) -> Fields:
    """Windows, none in the first layer of each period, and what a classifier pools."""
    period = read_value(config, "global_attn_every_n_layers", 3)
    window = read_value(config, "local_attention", 128) // 2 + 1  # HF: half a side, and itself
    if (pooling := config.get("classifier_pooling", "cls")) not in POOLING:
        raise ModelError(f"config.json: classifier_pooling = {pooling!r}: must be cls or mean")
    windows = read_windows(config, window, period=period, full=0)
    return {"windows": windows, "pooling": POOLING[pooling]}

def read_padded_positions(config: dict) -> Fields:
    """The rows of the positions up to `pad_token_id` are no token's."""
    offset = read_value(config, "pad_token_id", 1) + 1
    rows = read_value(config, "max_position_embeddings")
    return {"position_offset": offset, "max_positions": rows - offset}
