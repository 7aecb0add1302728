"""Gemma 2: Llama's layout with norms on both sides of a sub-layer, soft caps, alternating windows.

source  Gemma team 2024, arXiv:2408.00118; HF layout of `Gemma2ForCausalLM`
"""

from collections.abc import Sequence
from typing import Any

from ftcore.errors import ModelError
from ftcore.model.families.family import expect, read_float, read_int
from ftcore.model.families.llama import (
    LAYER,
    NAMES,
    OURS,
    decoder_config,
    decoder_family,
    read_decoder,
)
from ftcore.model.families.positions import FULL, WINDOWED, layer_types, read_rope, read_windows
from ftcore.model.spec import ModelSpec

GEMMA_NAMES = NAMES | {
    f"{LAYER}.post_attention_layernorm": f"{OURS}.attn_output_norm",
    f"{LAYER}.pre_feedforward_layernorm": f"{OURS}.post_attention_layernorm",
    f"{LAYER}.post_feedforward_layernorm": f"{OURS}.mlp_output_norm",
}
PLAIN = {"hidden_activation": "gelu_pytorch_tanh", "attention_bias": False}


def read_gemma(config: dict, default_types: Sequence[str], **switches: Any) -> ModelSpec:
    """A config.json of Gemma 2 or 3; `default_types` of its layers where it does not say."""
    expect(config, PLAIN)
    if config.get("use_bidirectional_attention"):
        raise ModelError("config.json: use_bidirectional_attention: only a causal Gemma is known")
    window = read_int(config, "sliding_window", default=4096)
    return read_decoder(
        config,
        is_tied=True,
        head_dim=256,
        norm_offset=1.0,
        output_norms=True,
        embedding_scale=read_int(config, "hidden_size") ** 0.5,
        mlp="geglu_tanh",
        windows=read_windows(config, window, default_types),
        attention_scale=read_int(config, "query_pre_attn_scalar", default=256) ** -0.5,
        **switches,
    )


def gemma_config(spec: ModelSpec, name: str, **keys: Any) -> dict:
    """The keys of config.json that the spec of a Gemma 2 or 3 decides."""
    return decoder_config(
        spec,
        name,
        sliding_window=max(spec.windows),
        layer_types=layer_types(spec),
        query_pre_attn_scalar=round(spec.attention_scale**-2),
        **PLAIN,
        **keys,
    )


def to_spec(config: dict) -> ModelSpec:
    """Read a Gemma 2 config.json.

    raises  ModelError: another activation, biases, or an unknown scaling of the angles
    """
    caps = {
        key: None if config.get(key, default) is None else read_float(config, key, default=default)
        for key, default in (("attn_logit_softcapping", 50.0), ("final_logit_softcapping", 30.0))
    }
    num_layers = read_int(config, "num_hidden_layers")
    return read_gemma(
        config,
        [FULL if index % 2 else WINDOWED for index in range(num_layers)],
        attention_softcap=caps["attn_logit_softcapping"],
        logit_softcap=caps["final_logit_softcapping"],
        **read_rope(config),
    )


def to_config(spec: ModelSpec) -> dict:
    """The keys of config.json that the spec decides."""
    return gemma_config(
        spec,
        "gemma2",
        attn_logit_softcapping=spec.attention_softcap,
        final_logit_softcapping=spec.logit_softcap,
    )


FAMILY = decoder_family("gemma2", "Gemma2", to_spec, to_config, names=GEMMA_NAMES)
