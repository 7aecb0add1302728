"""Gemma 2: Llama's layout with norms on both sides of a sub-layer, soft caps, alternating windows.

source  Gemma team 2024, arXiv:2408.00118; HF layout of `Gemma2ForCausalLM`
"""

from dataclasses import replace
from typing import Any

from ftcore.errors import ModelError
from ftcore.model.families import llama, positions
from ftcore.model.families.family import architectures, read_value, trunk_names
from ftcore.model.families.positions import read_rope, write_rope
from ftcore.model.spec import ModelSpec

CAPS = {
    "attention_softcap": ("attn_logit_softcapping", 50.0),
    "logit_softcap": ("final_logit_softcapping", 30.0),
}


def read_gemma(config: dict, period: int) -> dict[str, Any]:
    """What Gemma 2 and 3 share; the last of each `period` layers sees the whole document."""
    if config.get("use_bidirectional_attention"):
        raise ModelError("config.json: use_bidirectional_attention: only a causal Gemma is known")
    window = read_value(config, "sliding_window", 4096)
    return {
        "embedding_scale": read_value(config, "hidden_size") ** 0.5,
        "attention_scale": read_value(config, "query_pre_attn_scalar", 256) ** -0.5,
        "windows": positions.read_windows(config, window, period=period, full=period - 1),
    }


def write_gemma(spec: ModelSpec) -> dict[str, Any]:
    """Undoes `read_gemma`."""
    return {
        "query_pre_attn_scalar": round(spec.attention_scale**-2),
        "sliding_window": max(spec.windows),
        "layer_types": positions.layer_types(spec),
    }


def read(config: dict) -> dict[str, Any]:
    """Caps that are null are none; every other layer has a window, the first one too."""
    present = {name: key for name, key in CAPS.items() if config.get(*key) is not None}
    caps = {name: read_value(config, *key) for name, key in present.items()}
    return read_gemma(config, period=2) | read_rope(config) | caps


def write(spec: ModelSpec) -> dict[str, Any]:
    """Undoes `read`."""
    caps = {key: getattr(spec, name) for name, (key, _) in CAPS.items()}
    return write_gemma(spec) | write_rope(spec) | caps


FAMILY = replace(
    llama.FAMILY,
    name="gemma2",
    architectures=architectures("Gemma2", "lm"),
    trunk_names=llama.NAMES | trunk_names(
        "layers.{i}", attn_output_norm="post_attention_layernorm",
        post_attention_layernorm="pre_feedforward_layernorm",
        mlp_output_norm="post_feedforward_layernorm",
    ),
    switches={
        **llama.FAMILY.switches, "norm_offset": 1.0, "output_norms": True, "mlp": "geglu_tanh"
    },
    keys={
        **llama.FAMILY.keys, "head_dim": ("head_dim", 256),
        "tie_word_embeddings": ("tie_word_embeddings", True),
    },
    fixed={"hidden_activation": "gelu_pytorch_tanh", "attention_bias": False},
    read=read, write=write,
)  # fmt: skip
