"""Llama 2 and 3, and what the families that follow its layout share.

A causal decoder with grouped heads, rotary positions, RMSNorm before each sub-layer and SwiGLU.

source  Touvron et al. 2023, arXiv:2307.09288; Llama team 2024, arXiv:2407.21783;
        HF layout of `LlamaForCausalLM`
"""

from ftcore.model.families.family import KEYS, PATHS, Family, architectures
from ftcore.model.families.positions import read_rope, write_rope

NAMES = {  # ours are those of this layout; the norms of queries and keys are its followers'
    PATHS[name].removeprefix("trunk."): PATHS[name]
    for name in (
        "embed_tokens", "norm", "input_layernorm", "post_attention_layernorm", "q_proj", "k_proj",
        "v_proj", "o_proj", "q_norm", "k_norm", "gate_proj", "up_proj", "down_proj",
    )
}  # fmt: skip
FAMILY = Family(
    name="llama",
    architectures=architectures("Llama", "lm"),
    trunk_prefix="model.",
    trunk_names=NAMES,
    head_names={"lm_head": "head.lm_head", "score": "head.classifier"},
    ignored=("*.rotary_emb.inv_freq",),
    switches=dict(
        is_causal=True, norm="rms_norm", norm_first=True, position="rope", mlp="swiglu"
    ),
    keys=KEYS | {
        "num_kv_heads": ("num_key_value_heads", None), "head_dim": ("head_dim", None),
        "norm_eps": ("rms_norm_eps", 1e-6), "tie_word_embeddings": ("tie_word_embeddings", False),
    },
    fixed=dict(hidden_act="silu", attention_bias=False, mlp_bias=False),
    read=read_rope, write=write_rope,
)  # fmt: skip
