"""BERT: a bidirectional encoder with learned positions, segments and norms after each sum.

source  Devlin et al. 2019, arXiv:1810.04805; HF layout of `BertModel`
"""

from ftcore.model.families.family import Family, expect, read_float, read_heads, read_int
from ftcore.model.spec import ModelSpec

LAYER, OURS = "encoder.layer.{i}", "trunk.layers.{i}"
NAMES = {
    "embeddings.word_embeddings": "trunk.embed_tokens",
    "embeddings.position_embeddings": "trunk.embed_positions",
    "embeddings.token_type_embeddings": "trunk.embed_types",
    "embeddings.LayerNorm": "trunk.embed_norm",
    f"{LAYER}.attention.self.query": f"{OURS}.self_attn.q_proj",
    f"{LAYER}.attention.self.key": f"{OURS}.self_attn.k_proj",
    f"{LAYER}.attention.self.value": f"{OURS}.self_attn.v_proj",
    f"{LAYER}.attention.output.dense": f"{OURS}.self_attn.o_proj",
    f"{LAYER}.attention.output.LayerNorm": f"{OURS}.input_layernorm",
    f"{LAYER}.intermediate.dense": f"{OURS}.mlp.up_proj",
    f"{LAYER}.output.dense": f"{OURS}.mlp.down_proj",
    f"{LAYER}.output.LayerNorm": f"{OURS}.post_attention_layernorm",
}


def to_spec(config: dict) -> ModelSpec:
    """Read a BERT config.json.

    raises  ModelError: a size out of range; an activation or position scheme not known here; a
            masked-LM head that is not tied to the embeddings
    """
    expect(
        config,
        {
            "hidden_act": "gelu",
            "position_embedding_type": "absolute",
            "is_decoder": False,
            "tie_word_embeddings": True,
        },
    )
    hidden_size = read_int(config, "hidden_size", default=768)
    num_heads = read_int(config, "num_attention_heads", default=12)
    return ModelSpec(
        vocab_size=read_int(config, "vocab_size", default=30522),
        hidden_size=hidden_size,
        num_layers=read_int(config, "num_hidden_layers", default=12),
        intermediate_size=read_int(config, "intermediate_size", default=3072),
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=read_heads(hidden_size, num_heads),
        max_positions=read_int(config, "max_position_embeddings", default=512),
        is_causal=False,
        norm="layer_norm",
        norm_eps=read_float(config, "layer_norm_eps", default=1e-12),
        norm_first=False,
        position="learned",
        mlp="gelu",
        linear_bias=True,
        qkv_bias=True,
        num_types=read_int(config, "type_vocab_size", default=2),
        embedding_norm=True,
        pooling="first",
        pooler="tanh",
        tie_word_embeddings=True,
        dropout=read_float(config, "hidden_dropout_prob", default=0.1),
        initializer_range=read_float(config, "initializer_range", default=0.02),
    )


def to_config(spec: ModelSpec) -> dict:
    """The keys of config.json that the spec decides."""
    return {
        "model_type": "bert",
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "intermediate_size": spec.intermediate_size,
        "hidden_act": "gelu",
        "max_position_embeddings": spec.max_positions,
        "type_vocab_size": spec.num_types,
        "layer_norm_eps": spec.norm_eps,
        "hidden_dropout_prob": spec.dropout,
        "initializer_range": spec.initializer_range,
    }


FAMILY = Family(
    name="bert",
    trunk_prefix="bert.",
    trunk_names=NAMES | {"pooler.dense": "head.pooler"},
    head_names={
        "classifier": "head.classifier",
        "cls.predictions.transform.dense": "head.transform.dense",
        "cls.predictions.transform.LayerNorm": "head.transform.norm",
        "cls.predictions.decoder.weight": "head.lm_head.weight",
        "cls.predictions.bias": "head.lm_head.bias",
    },
    ignored=(
        "*embeddings.position_ids",
        "*pooler.dense.*",
        "cls.seq_relationship.*",
        "cls.predictions.decoder.bias",  # HF: the same tensor as cls.predictions.bias
    ),
    to_spec=to_spec,
    to_config=to_config,
    architectures={
        "mlm": "BertForMaskedLM",
        "classify": "BertForSequenceClassification",
        "trunk": "BertModel",
    },
)
