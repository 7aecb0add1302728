"""ModernBERT: an encoder with rotary positions, GeGLU, norms first, and windows in most layers.

source  Warner et al. 2024, arXiv:2412.13663; HF layout of `ModernBertModel`
"""

from ftcore.errors import ModelError
from ftcore.model.families.family import Family, expect, read_float, read_heads, read_int
from ftcore.model.families.positions import (
    FULL,
    WINDOWED,
    layer_types,
    read_two_ropes,
    read_windows,
    two_ropes_config,
)
from ftcore.model.spec import ModelSpec

LAYER, OURS = "layers.{i}", "trunk.layers.{i}"
PLAIN = {
    "hidden_activation": "gelu",
    "classifier_activation": "gelu",
    **{key: False for key in ("norm_bias", "attention_bias", "mlp_bias", "classifier_bias")},
    "decoder_bias": True,
    **{key: 0.0 for key in ("embedding_dropout", "attention_dropout", "mlp_dropout")},
    "classifier_dropout": 0.0,
}
POOLING = {"cls": "first", "mean": "mean"}


def to_spec(config: dict) -> ModelSpec:
    """Read a ModernBERT config.json.

    raises  ModelError: a size out of range; biases, dropout or activations other than those of the
            published models; scaled angles
    """
    expect(config, PLAIN)
    hidden_size = read_int(config, "hidden_size", default=768)
    num_heads = read_int(config, "num_attention_heads", default=12)
    num_layers = read_int(config, "num_hidden_layers", default=22)
    period = read_int(config, "global_attn_every_n_layers", default=3)
    types = [WINDOWED if index % period else FULL for index in range(num_layers)]
    # HF: half the width on each side, and the token itself
    window = read_int(config, "local_attention", default=128) // 2 + 1
    pooling = config.get("classifier_pooling", "cls")
    if pooling not in POOLING:
        raise ModelError(f"config.json: classifier_pooling = {pooling!r}: must be cls or mean")
    return ModelSpec(
        vocab_size=read_int(config, "vocab_size", default=50368),
        hidden_size=hidden_size,
        num_layers=num_layers,
        intermediate_size=read_int(config, "intermediate_size", default=1152),
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=read_heads(hidden_size, num_heads),
        max_positions=read_int(config, "max_position_embeddings", default=8192),
        is_causal=False,
        norm="layer_norm",
        norm_eps=read_float(config, "norm_eps", default=1e-5),
        norm_bias=False,
        norm_first=True,
        position="rope",
        **read_two_ropes(
            config, theta=("global_rope_theta", 160000.0), local_theta=("local_rope_theta", 10000.0)
        ),
        windows=read_windows(config, window, types),
        mlp="geglu",
        embedding_norm=True,
        pooling=POOLING[pooling],
        pooler="transform",
        tie_word_embeddings=bool(config.get("tie_word_embeddings", True)),
        initializer_range=read_float(config, "initializer_range", default=0.02),
    )


def to_config(spec: ModelSpec) -> dict:
    """The keys of config.json that the spec decides."""
    return {
        "model_type": "modernbert",
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "intermediate_size": spec.intermediate_size,
        "max_position_embeddings": spec.max_positions,
        "norm_eps": spec.norm_eps,
        "rope_parameters": two_ropes_config(spec),
        "local_attention": 2 * (max(spec.windows) - 1),
        "layer_types": layer_types(spec),
        "classifier_pooling": "cls" if spec.pooling == "first" else "mean",
        "tie_word_embeddings": spec.tie_word_embeddings,
        "initializer_range": spec.initializer_range,
        **PLAIN,
    }


FAMILY = Family(
    name="modernbert",
    trunk_prefix="model.",
    trunk_names={
        "embeddings.tok_embeddings": "trunk.embed_tokens",
        "embeddings.norm": "trunk.embed_norm",
        f"{LAYER}.attn_norm": f"{OURS}.input_layernorm",
        f"{LAYER}.attn.Wqkv": tuple(f"{OURS}.self_attn.{x}_proj" for x in "qkv"),
        f"{LAYER}.attn.Wo": f"{OURS}.self_attn.o_proj",
        f"{LAYER}.mlp_norm": f"{OURS}.post_attention_layernorm",
        f"{LAYER}.mlp.Wi": (f"{OURS}.mlp.gate_proj", f"{OURS}.mlp.up_proj"),
        f"{LAYER}.mlp.Wo": f"{OURS}.mlp.down_proj",
        "final_norm": "trunk.norm",
    },
    head_names={
        "head.dense": "head.transform.dense",
        "head.norm": "head.transform.norm",
        "decoder": "head.lm_head",
        "classifier": "head.classifier",
    },
    ignored=(),
    to_spec=to_spec,
    to_config=to_config,
    architectures={
        "mlm": "ModernBertForMaskedLM",
        "classify": "ModernBertForSequenceClassification",
        "trunk": "ModernBertModel",
    },
)
