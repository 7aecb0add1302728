"""GPT-NeoX and Pythia: a causal decoder whose attention and MLP read the same state.

Rotary positions turn the first channels of each head. On disk the queries, keys and values are one
matrix, whose rows lie head by head.

source  Black et al. 2022, arXiv:2204.06745; Biderman et al. 2023, arXiv:2304.01373; HF layout of
        `GPTNeoXForCausalLM`
"""

from ftcore.model.families.family import Family, expect, read_float, read_heads, read_int
from ftcore.model.families.positions import read_rope, rope_config
from ftcore.model.spec import ModelSpec

LAYER, OURS = "layers.{i}", "trunk.layers.{i}"


def to_spec(config: dict) -> ModelSpec:
    """Read a GPT-NeoX config.json.

    raises  ModelError: a size out of range, another activation, no biases, or an unknown scaling
            of the angles
    """
    expect(config, {"hidden_act": "gelu", "attention_bias": True})
    hidden_size = read_int(config, "hidden_size")
    num_heads = read_int(config, "num_attention_heads")
    head_dim = read_heads(hidden_size, num_heads)
    part = "partial_rotary_factor"
    rope = config.get("rope_parameters") or {}
    turned = read_float(*((rope, part) if part in rope else (config, "rotary_pct")), default=0.25)
    return ModelSpec(
        vocab_size=read_int(config, "vocab_size"),
        hidden_size=hidden_size,
        num_layers=read_int(config, "num_hidden_layers"),
        intermediate_size=read_int(config, "intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=head_dim,
        max_positions=read_int(config, "max_position_embeddings", default=2048),
        is_causal=True,
        norm="layer_norm",
        norm_eps=read_float(config, "layer_norm_eps", default=1e-5),
        norm_first=True,
        is_parallel=bool(config.get("use_parallel_residual", True)),
        position="rope",
        **read_rope(config, theta_key="rotary_emb_base"),
        rope_dim=int(head_dim * turned),
        mlp="gelu",
        linear_bias=True,
        qkv_bias=True,
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        dropout=read_float(config, "hidden_dropout", default=0.0),
        initializer_range=read_float(config, "initializer_range", default=0.02),
    )


def to_config(spec: ModelSpec) -> dict:
    """The keys of config.json that the spec decides."""
    turned = spec.rope_dim / spec.head_dim
    return {
        "model_type": "gpt_neox",
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "intermediate_size": spec.intermediate_size,
        "hidden_act": "gelu",
        "max_position_embeddings": spec.max_positions,
        "layer_norm_eps": spec.norm_eps,
        "use_parallel_residual": spec.is_parallel,
        "rope_parameters": rope_config(spec) | {"partial_rotary_factor": turned},
        "rotary_pct": turned,
        "rotary_emb_base": spec.rope_theta,
        "attention_bias": True,
        "hidden_dropout": spec.dropout,
        "tie_word_embeddings": spec.tie_word_embeddings,
        "initializer_range": spec.initializer_range,
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
    to_spec=to_spec,
    to_config=to_config,
    architectures={
        "lm": "GPTNeoXForCausalLM",
        "classify": "GPTNeoXForSequenceClassification",
        "trunk": "GPTNeoXModel",
    },
    fused_by_head=True,
)
