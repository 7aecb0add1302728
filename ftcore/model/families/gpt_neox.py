"""GPT-NeoX and Pythia: a causal decoder whose attention and MLP read the same state.

Rotary positions turn the first channels of each head. On disk the queries, keys and values are one
matrix, whose rows lie head by head.

source  Black et al. 2022, arXiv:2204.06745; Biderman et al. 2023, arXiv:2304.01373; HF layout of
        `GPTNeoXForCausalLM`
"""

from typing import Any

from ftcore.model.families import gpt2
from ftcore.model.families.family import KEYS, Family, architectures, read_float
from ftcore.model.families.positions import read_rope, rope_config
from ftcore.model.spec import ModelSpec

LAYER, OURS = "layers.{i}", "trunk.layers.{i}"
TURNED = "partial_rotary_factor"


def read(config: dict) -> dict[str, Any]:
    """The angles, and how many channels of a head they turn."""
    rope = config.get("rope_parameters") or {}
    turned = read_float(
        *((rope, TURNED) if TURNED in rope else (config, "rotary_pct")), default=0.25
    )
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    return read_rope(config, theta_key="rotary_emb_base") | {"rope_dim": int(head_dim * turned)}


def write(spec: ModelSpec) -> dict[str, Any]:
    """Undoes `read`, for older readers too."""
    turned = spec.rope_dim / spec.head_dim
    return {
        "rope_parameters": rope_config(spec) | {TURNED: turned},
        "rotary_pct": turned,
        "rotary_emb_base": spec.rope_theta,
    }


FAMILY = Family(
    name="gpt_neox",
    trunk_prefix="gpt_neox.",
    trunk_names={
        "embed_in": "trunk.embed_tokens",
        f"{LAYER}.input_layernorm": f"{OURS}.input_layernorm",
        f"{LAYER}.attention.query_key_value": tuple(f"{OURS}.self_attn.{x}_proj" for x in "qkv"),
        f"{LAYER}.attention.dense": f"{OURS}.self_attn.o_proj",
        f"{LAYER}.post_attention_layernorm": f"{OURS}.post_attention_layernorm",
        f"{LAYER}.mlp.dense_h_to_4h": f"{OURS}.mlp.up_proj",
        f"{LAYER}.mlp.dense_4h_to_h": f"{OURS}.mlp.down_proj",
        "final_layer_norm": "trunk.norm",
    },
    head_names={
        "embed_out": "head.lm_head",
        "lm_head": "head.lm_head",  # HF: the newer name
        "score": "head.classifier",
    },
    ignored=("*.attention.bias", "*.attention.masked_bias", "*.rotary_emb.inv_freq"),
    architectures=architectures("GPTNeoX", "lm"),
    tagger="classifier",
    switches={**gpt2.FAMILY.switches, "position": "rope", "mlp": "gelu"},
    keys=KEYS
    | {
        "norm_eps": ("layer_norm_eps", 1e-5),
        "is_parallel": ("use_parallel_residual", True),
        "tie_word_embeddings": ("tie_word_embeddings", False),
        "dropout": ("hidden_dropout", 0.0),
    },
    fixed={"hidden_act": "gelu", "attention_bias": True},
    read=read,
    write=write,
    fused_by_head=True,
)
