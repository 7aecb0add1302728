"""Llama 2 and 3, and what the families that follow its layout share.

A causal decoder with grouped heads, rotary positions, RMSNorm before each sub-layer and SwiGLU.

source  Touvron et al. 2023, arXiv:2307.09288; Llama team 2024, arXiv:2407.21783;
        HF layout of `LlamaForCausalLM`
"""

from ftcore.model.families.family import KEYS, Family, architectures
from ftcore.model.families.positions import read_rope, write_rope

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


FAMILY = Family(
    name="llama",
    trunk_prefix="model.",
    trunk_names=NAMES,
    head_names={"lm_head": "head.lm_head", "score": "head.classifier"},
    ignored=("*.rotary_emb.inv_freq",),
    architectures=architectures("Llama", "lm"),
    switches={
        "is_causal": True,
        "norm": "rms_norm",
        "norm_first": True,
        "position": "rope",
        "mlp": "swiglu",
    },
    keys=KEYS
    | {
        "num_kv_heads": ("num_key_value_heads", None),
        "head_dim": ("head_dim", None),
        "norm_eps": ("rms_norm_eps", 1e-6),
        "tie_word_embeddings": ("tie_word_embeddings", False),
    },
    fixed={"hidden_act": "silu", "attention_bias": False, "mlp_bias": False},
    read=read_rope,
    write=write_rope,
)
