"""GPT-2: a causal decoder with learned positions, layer norms before each sub-layer and GELU.

On disk its matrices are (inputs, outputs), and queries, keys and values are one of them.

source  Radford et al. 2019, Language models are unsupervised multitask learners; HF layout of
        `GPT2LMHeadModel`
"""

from typing import Any

from ftcore.model.families.family import KEYS, Family, architectures, read_int
from ftcore.model.spec import ModelSpec

LAYER, OURS = "h.{i}", "trunk.layers.{i}"


def read(config: dict) -> dict[str, Any]:
    """The MLP's width, four times the model's where the file does not say."""
    return {"intermediate_size": read_int(config, "n_inner", default=4 * config["n_embd"])}


def write(spec: ModelSpec) -> dict[str, Any]:
    """Undoes `read`."""
    is_default = spec.intermediate_size == 4 * spec.hidden_size
    return {"n_inner": None if is_default else spec.intermediate_size}


FAMILY = Family(
    name="gpt2",
    trunk_prefix="transformer.",
    trunk_names={
        "wte": "trunk.embed_tokens",
        "wpe": "trunk.embed_positions",
        f"{LAYER}.ln_1": f"{OURS}.input_layernorm",
        f"{LAYER}.attn.c_attn": tuple(f"{OURS}.self_attn.{x}_proj" for x in "qkv"),
        f"{LAYER}.attn.c_proj": f"{OURS}.self_attn.o_proj",
        f"{LAYER}.ln_2": f"{OURS}.post_attention_layernorm",
        f"{LAYER}.mlp.c_fc": f"{OURS}.mlp.up_proj",
        f"{LAYER}.mlp.c_proj": f"{OURS}.mlp.down_proj",
        "ln_f": "trunk.norm",
    },
    head_names={"lm_head": "head.lm_head", "score": "head.classifier"},
    ignored=("*.attn.bias", "*.attn.masked_bias"),
    architectures=architectures("GPT2", "lm") | {"lm": "GPT2LMHeadModel"},
    tagger="classifier",
    switches={
        "is_causal": True,
        "norm": "layer_norm",
        "norm_first": True,
        "position": "learned",
        "mlp": "gelu_tanh",
        "linear_bias": True,
        "qkv_bias": True,
    },
    keys=KEYS
    | {
        "hidden_size": ("n_embd", int),
        "num_layers": ("n_layer", int),
        "num_heads": ("n_head", int),
        "intermediate_size": ("n_inner", None),
        "max_positions": ("n_positions", int),
        "norm_eps": ("layer_norm_epsilon", 1e-5),
        "dropout": ("resid_pdrop", 0.1),
    },
    fixed={
        "activation_function": "gelu_new",
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
    },
    read=read,
    write=write,
    transposed=("*.c_attn.weight", "*.c_proj.weight", "*.c_fc.weight"),
)
