"""GPT-2: a causal decoder with learned positions, layer norms before each sub-layer and GELU.

On disk its matrices are (inputs, outputs), and queries, keys and values are one of them.

source  Radford et al. 2019, Language models are unsupervised multitask learners; HF layout of
        `GPT2LMHeadModel`
"""

from ftcore.model.families.family import Family, expect, read_float, read_heads, read_int
from ftcore.model.spec import ModelSpec

LAYER, OURS = "h.{i}", "trunk.layers.{i}"


def to_spec(config: dict) -> ModelSpec:
    """Read a GPT-2 config.json.

    raises  ModelError: a size out of range, another activation or scale of the scores
    """
    expect(
        config,
        {
            "activation_function": "gelu_new",
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "add_cross_attention": False,
        },
    )
    hidden_size = read_int(config, "n_embd", default=768)
    num_heads = read_int(config, "n_head", default=12)
    return ModelSpec(
        vocab_size=read_int(config, "vocab_size", default=50257),
        hidden_size=hidden_size,
        num_layers=read_int(config, "n_layer", default=12),
        intermediate_size=read_int(config, "n_inner", default=4 * hidden_size),
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=read_heads(hidden_size, num_heads),
        max_positions=read_int(config, "n_positions", default=1024),
        is_causal=True,
        norm="layer_norm",
        norm_eps=read_float(config, "layer_norm_epsilon", default=1e-5),
        norm_first=True,
        position="learned",
        mlp="gelu_tanh",
        linear_bias=True,
        qkv_bias=True,
        tie_word_embeddings=bool(config.get("tie_word_embeddings", True)),
        dropout=read_float(config, "resid_pdrop", default=0.1),
        initializer_range=read_float(config, "initializer_range", default=0.02),
    )


def to_config(spec: ModelSpec) -> dict:
    """The keys of config.json that the spec decides."""
    is_default = spec.intermediate_size == 4 * spec.hidden_size
    return {
        "model_type": "gpt2",
        "vocab_size": spec.vocab_size,
        "n_embd": spec.hidden_size,
        "n_layer": spec.num_layers,
        "n_head": spec.num_heads,
        "n_inner": None if is_default else spec.intermediate_size,
        "n_positions": spec.max_positions,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": spec.norm_eps,
        "resid_pdrop": spec.dropout,
        "tie_word_embeddings": spec.tie_word_embeddings,
        "initializer_range": spec.initializer_range,
    }


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
    to_spec=to_spec,
    to_config=to_config,
    architectures={
        "lm": "GPT2LMHeadModel",
        "classify": "GPT2ForSequenceClassification",
        "trunk": "GPT2Model",
    },
    transposed=("*.c_attn.weight", "*.c_proj.weight", "*.c_fc.weight"),
)
