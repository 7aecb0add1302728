"""GPT-2: a causal decoder with learned positions, layer norms before each sub-layer and GELU.

On disk its matrices are (inputs, outputs), and queries, keys and values are one of them.

source  Radford et al. 2019, Language models are unsupervised multitask learners; HF layout of
        `GPT2LMHeadModel`
"""

from typing import Any

from ftcore.model.families.family import KEYS, Family, architectures, read_value, trunk_names
from ftcore.model.spec import ModelSpec


def read(config: dict) -> dict[str, Any]:
    """The MLP's width, four times the model's where the file does not say."""
    return {"intermediate_size": read_value(config, "n_inner", 4 * config["n_embd"])}


def write(spec: ModelSpec) -> dict[str, Any]:
    """Undoes `read`."""
    is_default = spec.intermediate_size == 4 * spec.hidden_size
    return {"n_inner": None if is_default else spec.intermediate_size}


FAMILY = Family(
    name="gpt2",
    architectures=architectures("GPT2", "lm") | {"lm": "GPT2LMHeadModel"},
    trunk_prefix="transformer.",
    trunk_names=trunk_names(
        "h.{i}",
        embed_tokens="wte", embed_positions="wpe", norm="ln_f",
        input_layernorm="ln_1", qkv_proj="attn.c_attn", o_proj="attn.c_proj",
        post_attention_layernorm="ln_2", up_proj="mlp.c_fc", down_proj="mlp.c_proj",
    ),
    head_names={"lm_head": "head.lm_head", "score": "head.classifier"},
    tagger="classifier",
    ignored=("*.attn.bias", "*.attn.masked_bias"),
    transposed=("*.c_attn.weight", "*.c_proj.weight", "*.c_fc.weight"),
    switches=dict(
        is_causal=True, norm="layer_norm", norm_first=True, position="learned", mlp="gelu_tanh",
        linear_bias=True, qkv_bias=True,
    ),
    keys=KEYS | {
        "hidden_size": ("n_embd", int), "num_layers": ("n_layer", int),
        "num_heads": ("n_head", int), "intermediate_size": ("n_inner", None),
        "max_positions": ("n_positions", int), "norm_eps": ("layer_norm_epsilon", 1e-5),
        "dropout": ("resid_pdrop", 0.1),
    },
    fixed=dict(
        activation_function="gelu_new", scale_attn_weights=True,
        scale_attn_by_inverse_layer_idx=False, add_cross_attention=False,
    ),
    read=read, write=write,
)  # fmt: skip
