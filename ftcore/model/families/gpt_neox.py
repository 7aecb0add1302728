"""GPT-NeoX and Pythia: a causal decoder whose attention and MLP read the same state.

Rotary positions turn the first channels of each head. On disk the queries, keys and values are one
matrix, whose rows lie head by head.

source  Black et al. 2022, arXiv:2204.06745; Biderman et al. 2023, arXiv:2304.01373; HF layout of
        `GPTNeoXForCausalLM`
"""

from typing import Any

from ftcore.model.families import gpt2
from ftcore.model.families.family import KEYS, Family, architectures, read_value, trunk_names
from ftcore.model.families.positions import read_rope, rope_config
from ftcore.model.spec import ModelSpec

TURNED = "partial_rotary_factor"


def read(config: dict) -> dict[str, Any]:
    """The angles, and how many channels of a head they turn."""
    rope = config.get("rope_parameters") or {}
    place = (rope, TURNED) if TURNED in rope else (config, "rotary_pct")
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    rope_dim = int(head_dim * read_value(*place, 0.25))
    return read_rope(config, ("rotary_emb_base", 1e4)) | {"rope_dim": rope_dim}


def write(spec: ModelSpec) -> dict[str, Any]:
    """Undoes `read`, for older readers too."""
    turned = spec.rope_dim / spec.head_dim
    rope = rope_config(spec) | {TURNED: turned}
    return {"rope_parameters": rope, "rotary_pct": turned, "rotary_emb_base": spec.rope_theta}


FAMILY = Family(
    name="gpt_neox",
    architectures=architectures("GPTNeoX", "lm"),
    trunk_prefix="gpt_neox.",
    trunk_names=trunk_names(
        "layers.{i}",
        embed_tokens="embed_in", norm="final_layer_norm", input_layernorm="input_layernorm",
        qkv_proj="attention.query_key_value", o_proj="attention.dense",
        post_attention_layernorm="post_attention_layernorm",
        up_proj="mlp.dense_h_to_4h", down_proj="mlp.dense_4h_to_h",
    ),
    head_names={
        "embed_out": "head.lm_head", "score": "head.classifier",
        "lm_head": "head.lm_head",  # HF: the newer name
    },
    tagger="classifier",
    ignored=("*.attention.bias", "*.attention.masked_bias", "*.rotary_emb.inv_freq"),
    fused_by_head=True,
    switches={**gpt2.FAMILY.switches, "position": "rope", "mlp": "gelu"},
    keys=KEYS | {
        "norm_eps": ("layer_norm_eps", 1e-5), "is_parallel": ("use_parallel_residual", True),
        "tie_word_embeddings": ("tie_word_embeddings", False), "dropout": ("hidden_dropout", 0.0),
    },
    fixed=dict(hidden_act="gelu", attention_bias=True),
    read=read, write=write,
)  # fmt: skip
