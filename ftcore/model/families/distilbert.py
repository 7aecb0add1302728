"""DistilBERT: BERT with half the layers, without segments, with a ReLU before its classifier.

source  Sanh et al. 2019, arXiv:1910.01108; HF layout of `DistilBertModel`
"""

from ftcore.model.families.family import Family, expect, read_float, read_heads, read_int
from ftcore.model.spec import ModelSpec

LAYER, OURS = "transformer.layer.{i}", "trunk.layers.{i}"


def to_spec(config: dict) -> ModelSpec:
    """Read a DistilBERT config.json.

    raises  ModelError: a size out of range, or another activation
    """
    expect(config, {"activation": "gelu"})
    hidden_size = read_int(config, "dim", default=768)
    num_heads = read_int(config, "n_heads", default=12)
    return ModelSpec(
        vocab_size=read_int(config, "vocab_size", default=30522),
        hidden_size=hidden_size,
        num_layers=read_int(config, "n_layers", default=6),
        intermediate_size=read_int(config, "hidden_dim", default=3072),
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=read_heads(hidden_size, num_heads),
        max_positions=read_int(config, "max_position_embeddings", default=512),
        is_causal=False,
        norm="layer_norm",
        norm_eps=1e-12,  # HF: not in the file
        norm_first=False,
        position="learned",
        mlp="gelu",
        linear_bias=True,
        qkv_bias=True,
        embedding_norm=True,
        pooling="first",
        pooler="relu",
        tie_word_embeddings=bool(config.get("tie_word_embeddings", True)),
        dropout=read_float(config, "dropout", default=0.1),
        initializer_range=read_float(config, "initializer_range", default=0.02),
    )


def to_config(spec: ModelSpec) -> dict:
    """The keys of config.json that the spec decides."""
    return {
        "model_type": "distilbert",
        "vocab_size": spec.vocab_size,
        "dim": spec.hidden_size,
        "n_layers": spec.num_layers,
        "n_heads": spec.num_heads,
        "hidden_dim": spec.intermediate_size,
        "activation": "gelu",
        "max_position_embeddings": spec.max_positions,
        "dropout": spec.dropout,
        "tie_word_embeddings": spec.tie_word_embeddings,
        "initializer_range": spec.initializer_range,
    }


FAMILY = Family(
    name="distilbert",
    trunk_prefix="distilbert.",
    trunk_names={
        "embeddings.word_embeddings": "trunk.embed_tokens",
        "embeddings.position_embeddings": "trunk.embed_positions",
        "embeddings.LayerNorm": "trunk.embed_norm",
        f"{LAYER}.attention.q_lin": f"{OURS}.self_attn.q_proj",
        f"{LAYER}.attention.k_lin": f"{OURS}.self_attn.k_proj",
        f"{LAYER}.attention.v_lin": f"{OURS}.self_attn.v_proj",
        f"{LAYER}.attention.out_lin": f"{OURS}.self_attn.o_proj",
        f"{LAYER}.sa_layer_norm": f"{OURS}.input_layernorm",
        f"{LAYER}.ffn.lin1": f"{OURS}.mlp.up_proj",
        f"{LAYER}.ffn.lin2": f"{OURS}.mlp.down_proj",
        f"{LAYER}.output_layer_norm": f"{OURS}.post_attention_layernorm",
    },
    head_names={
        "pre_classifier": "head.pooler",
        "classifier": "head.classifier",
        "vocab_transform": "head.transform.dense",
        "vocab_layer_norm": "head.transform.norm",
        "vocab_projector": "head.lm_head",
    },
    ignored=(),
    to_spec=to_spec,
    to_config=to_config,
    architectures={
        "mlm": "DistilBertForMaskedLM",
        "classify": "DistilBertForSequenceClassification",
        "trunk": "DistilBertModel",
    },
)
