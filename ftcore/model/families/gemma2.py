"""Gemma 2: Llama's layout with norms on both sides of a sub-layer, soft caps, alternating windows.

source  Gemma team 2024, arXiv:2408.00118; HF layout of `Gemma2ForCausalLM`
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ftcore.errors import ModelError
from ftcore.model.families import llama, positions
from ftcore.model.families.family import architectures, read_float, read_int
from ftcore.model.families.positions import FULL, WINDOWED, read_rope, write_rope
from ftcore.model.spec import ModelSpec

LAYER, OURS = llama.LAYER, llama.OURS
NORMS = {
    f"{LAYER}.post_attention_layernorm": f"{OURS}.attn_output_norm",
    f"{LAYER}.pre_feedforward_layernorm": f"{OURS}.post_attention_layernorm",
    f"{LAYER}.post_feedforward_layernorm": f"{OURS}.mlp_output_norm",
}
CAPS = {
    "attention_softcap": ("attn_logit_softcapping", 50.0),
    "logit_softcap": ("final_logit_softcapping", 30.0),
}


def read_gemma(config: dict, default_types: Sequence[str]) -> dict[str, Any]:
    """What Gemma 2 and 3 share; `default_types` of the layers where the file does not say."""
    if config.get("use_bidirectional_attention"):
        raise ModelError("config.json: use_bidirectional_attention: only a causal Gemma is known")
    window = read_int(config, "sliding_window", default=4096)
    return {
        "embedding_scale": read_int(config, "hidden_size") ** 0.5,
        "attention_scale": read_int(config, "query_pre_attn_scalar", default=256) ** -0.5,
        "windows": positions.read_windows(config, window, default_types),
    }


def write_gemma(spec: ModelSpec) -> dict[str, Any]:
    """Undoes `read_gemma`."""
    return {
        "query_pre_attn_scalar": round(spec.attention_scale**-2),
        "sliding_window": max(spec.windows),
        "layer_types": positions.layer_types(spec),
    }


def read(config: dict) -> dict[str, Any]:
    """Every other layer has a window, the first one too."""
    caps = {
        name: None if config.get(key, default) is None else read_float(config, key, default=default)
        for name, (key, default) in CAPS.items()
    }
    num_layers = read_int(config, "num_hidden_layers")
    types = [FULL if index % 2 else WINDOWED for index in range(num_layers)]
    return read_gemma(config, types) | read_rope(config) | caps


def write(spec: ModelSpec) -> dict[str, Any]:
    """Undoes `read`."""
    caps = {key: getattr(spec, name) for name, (key, _) in CAPS.items()}
    return write_gemma(spec) | write_rope(spec) | caps


FAMILY = replace(
    llama.FAMILY,
    name="gemma2",
    trunk_names=llama.NAMES | NORMS,
    architectures=architectures("Gemma2", "lm"),
    switches=llama.FAMILY.switches
    | {"norm_offset": 1.0, "output_norms": True, "mlp": "geglu_tanh"},
    keys=llama.FAMILY.keys
    | {"head_dim": ("head_dim", 256), "tie_word_embeddings": ("tie_word_embeddings", True)},
    fixed={"hidden_activation": "gelu_pytorch_tanh", "attention_bias": False},
    read=read,
    write=write,
)
