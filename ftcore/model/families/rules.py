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
Older = tuple[str, float]  # the key of older files for a number, and what it is without one

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

def read_rope(
    config: dict, base: Older = ("rope_theta", 1e4), turned: Older | None = None
) -> Fields:
    """rope_theta, rope_factor, rope_bands; rope_dim where a share of each head is `turned`. Raises
    ModelError: an unknown or incomplete scaling."""
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
        fields["rope_bands"] = tuple(read_value(rope, *band) for band in BANDS.items())
    if turned is not None:
        share = read_value({TURNED: config.get(turned[0]), **rope}, TURNED, turned[1])
        fields["rope_dim"] = int(config["hidden_size"] // config["num_attention_heads"] * share)
    return fields

def read_two_ropes(config: dict, base: Older, local_base: Older) -> Fields:
    """The angles, and local_rope_theta, the base of layers with a window."""
    parts = config.get("rope_parameters") or {}
    fields = read_rope({**config, "rope_parameters": parts.get(FULL)}, base)
    local = {**config, "rope_parameters": parts.get(WINDOWED), "rope_scaling": None}
    near = read_rope(local, local_base)
    if len(near) > 1:
        raise ModelError(f"config.json: rope_parameters of {WINDOWED}: only rope_type = 'default'")
    return fields | {"local_rope_theta": near["rope_theta"]}

def read_windows(
    config: dict, key: str = "sliding_window", default: int = 4096, *, has_both_sides: bool = False,
    period: int = 0, period_key: str | None = None, full: int = -1,
) -> Fields:  # fmt: skip
    """The window of each layer, 0 for none, by `layer_types`; in files without it, of each `period`
    layers the one numbered `full` sees all. Raises ModelError: other kinds, or not one for each."""
    if config.get(key, default) is None:
        return {"windows": ()}
    window, num_layers = read_value(config, key, default), read_value(config, "num_hidden_layers")
    if has_both_sides:
        window = window // 2 + 1  # HF: half a side, and itself
    if period_key is not None:
        period = read_value(config, period_key, period)
    usual = [WINDOWED] * num_layers
    for index in range(full % period, num_layers, period) if period else ():
        usual[index] = FULL
    types = config.get("layer_types") or usual
    if len(types) != num_layers or not set(types) <= {WINDOWED, FULL}:
        must = f"must name {WINDOWED} or {FULL} for each of {num_layers} layers"
        raise ModelError(f"config.json: layer_types = {types}: {must}")
    return {"windows": tuple(window if kind == WINDOWED else 0 for kind in types)}

def read_gemma(config: dict) -> Fields:
    """Scales of embeddings and scores."""
    if config.get("use_bidirectional_attention"):
        raise ModelError("config.json: use_bidirectional_attention: only a causal Gemma is known")
    scale = read_value(config, "query_pre_attn_scalar", 256) ** -0.5
    return {"embedding_scale": read_value(config, "hidden_size") ** 0.5, "attention_scale": scale}

def read_pooling(config: dict) -> Fields:
    """What of a document's tokens a classifier gets."""
    if (pooling := config.get("classifier_pooling", "cls")) not in POOLING:
        raise ModelError(f"config.json: classifier_pooling = {pooling!r}: must be cls or mean")
    return {"pooling": POOLING[pooling]}

def read_padded_positions(config: dict) -> Fields:
    """The rows of the positions up to `pad_token_id` are no token's."""
    offset = read_value(config, "pad_token_id", 1) + 1
    rows = read_value(config, "max_position_embeddings")
    return {"position_offset": offset, "max_positions": rows - offset}
