"""Llama 2 and 3, and what the families that follow its layout share.

A causal decoder with grouped heads, rotary positions, RMSNorm before each sub-layer and SwiGLU.

source  Touvron et al. 2023, arXiv:2307.09288; Llama team 2024, arXiv:2407.21783;
        HF layout of `LlamaForCausalLM`
"""

from collections.abc import Callable, Mapping
from typing import Any

from ftcore.errors import ModelError
from ftcore.model.families.family import Family, expect, read_float, read_heads, read_int
from ftcore.model.families.positions import read_rope, rope_config
from ftcore.model.spec import ModelSpec

LAYER, OURS = "layers.{i}", "trunk.layers.{i}"
NAMES = {
    "embed_tokens": "trunk.embed_tokens",
    **{
        f"{LAYER}.{name}": f"{OURS}.{name}"
        for name in (
            "input_layernorm",
            "post_attention_layernorm",
            *(f"self_attn.{part}" for part in ("q_proj", "k_proj", "v_proj", "o_proj")),
            *(f"mlp.{part}" for part in ("gate_proj", "up_proj", "down_proj")),
        )
    },
    "norm": "trunk.norm",
}


def read_decoder(
    config: dict, *, is_tied: bool = False, head_dim: int | None = None, **switches: Any
) -> ModelSpec:
    """The sizes of a config.json in Llama's layout.

    is_tied, head_dim   where the file does not say; head_dim None: hidden_size / heads
    switches            of the spec, beside those that the layout has
    raises              ModelError: a size out of range, or sizes that do not fit each other
    """
    hidden_size = read_int(config, "hidden_size")
    num_heads = read_int(config, "num_attention_heads")
    num_kv_heads = read_int(config, "num_key_value_heads", default=num_heads)
    if num_heads % num_kv_heads:
        raise ModelError(
            f"config.json: num_attention_heads = {num_heads} must be a multiple of"
            f" num_key_value_heads = {num_kv_heads}"
        )
    if config.get("head_dim") is None and head_dim is None:
        head_dim = read_heads(hidden_size, num_heads)
    tied = config.get("tie_word_embeddings")
    layout = {
        "vocab_size": read_int(config, "vocab_size"),
        "hidden_size": hidden_size,
        "num_layers": read_int(config, "num_hidden_layers"),
        "intermediate_size": read_int(config, "intermediate_size"),
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": read_int(config, "head_dim", default=head_dim),
        "max_positions": read_int(config, "max_position_embeddings", default=32768),
        "is_causal": True,
        "norm": "rms_norm",
        "norm_eps": read_float(config, "rms_norm_eps", default=1e-6),
        "norm_first": True,
        "position": "rope",
        "mlp": "swiglu",
        "tie_word_embeddings": is_tied if tied is None else bool(tied),
        "initializer_range": read_float(config, "initializer_range", default=0.02),
    }
    return ModelSpec(**layout | switches)


def decoder_config(spec: ModelSpec, name: str, **keys: Any) -> dict:
    """The config.json keys of `read_decoder`, and further ones of the family `name`."""
    return {
        "model_type": name,
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        "intermediate_size": spec.intermediate_size,
        "max_position_embeddings": spec.max_positions,
        "rms_norm_eps": spec.norm_eps,
        "rope_parameters": rope_config(spec),
        "rope_theta": spec.rope_theta,
        "tie_word_embeddings": spec.tie_word_embeddings,
        "initializer_range": spec.initializer_range,
        **keys,
    }


def decoder_family(
    name: str,
    classes: str,
    to_spec: Callable[[dict], ModelSpec],
    to_config: Callable[[ModelSpec], dict],
    *,
    names: Mapping[str, str] = NAMES,
) -> Family:
    """A family in Llama's layout; `classes` starts the names of its HF classes."""
    return Family(
        name=name,
        trunk_prefix="model.",
        trunk_names=names,
        head_names={"lm_head": "head.lm_head", "score": "head.classifier"},
        ignored=("*.rotary_emb.inv_freq",),
        to_spec=to_spec,
        to_config=to_config,
        architectures={
            "lm": f"{classes}ForCausalLM",
            "classify": f"{classes}ForSequenceClassification",
            "trunk": f"{classes}Model",
        },
    )


def to_spec(config: dict) -> ModelSpec:
    """Read a Llama config.json.

    raises  ModelError: an unknown scaling of the angles, another activation, or biases
    """
    expect(config, {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False})
    return read_decoder(config, **read_rope(config))


def to_config(spec: ModelSpec) -> dict:
    """The keys of config.json that the spec decides."""
    return decoder_config(spec, "llama", hidden_act="silu", attention_bias=False, mlp_bias=False)


FAMILY = decoder_family("llama", "Llama", to_spec, to_config)
