"""BERT: a bidirectional encoder with learned positions, segments and norms after each sum.

source  Devlin et al. 2019, arXiv:1810.04805; HF layout of `BertModel`
"""

from ftcore.errors import ModelError
from ftcore.model.families.family import Family, read_int
from ftcore.model.spec import ModelSpec

LAYER = "encoder.layer.{i}"


def to_spec(config: dict) -> ModelSpec:
    """Read a BERT config.json.

    raises  ModelError: an activation or position scheme that this family does not have
    """
    if config.get("hidden_act", "gelu") != "gelu":
        raise ModelError(f"config.json: hidden_act = {config['hidden_act']!r}: only 'gelu' is known")
    if config.get("position_embedding_type", "absolute") != "absolute":
        raise ModelError("config.json: position_embedding_type must be 'absolute'")
    hidden_size = read_int(config, "hidden_size", default=768)
    num_heads = read_int(config, "num_attention_heads", default=12)
    return ModelSpec(
        vocab_size=read_int(config, "vocab_size", default=30522),
        hidden_size=hidden_size,
        num_layers=read_int(config, "num_hidden_layers", default=12),
        intermediate_size=read_int(config, "intermediate_size", default=3072),
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=hidden_size // num_heads,
        max_positions=read_int(config, "max_position_embeddings", default=512),
        is_causal=False,
        norm="layer_norm",
        norm_eps=config.get("layer_norm_eps", 1e-12),
        norm_first=False,
        position="learned",
        mlp="gelu",
        linear_bias=True,
        qkv_bias=True,
        num_types=read_int(config, "type_vocab_size", default=2),
        embedding_norm=True,
        has_pooler=True,
        tie_word_embeddings=True,
        dropout=config.get("hidden_dropout_prob", 0.1),
        initializer_range=config.get("initializer_range", 0.02),
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
    trunk_names={
        "embeddings.word_embeddings": "trunk.embed_tokens",
        "embeddings.position_embeddings": "trunk.embed_positions",
        "embeddings.token_type_embeddings": "trunk.embed_types",
        "embeddings.LayerNorm": "trunk.embed_norm",
        f"{LAYER}.attention.self.query": "trunk.layers.{i}.self_attn.q_proj",
        f"{LAYER}.attention.self.key": "trunk.layers.{i}.self_attn.k_proj",
        f"{LAYER}.attention.self.value": "trunk.layers.{i}.self_attn.v_proj",
        f"{LAYER}.attention.output.dense": "trunk.layers.{i}.self_attn.o_proj",
        f"{LAYER}.attention.output.LayerNorm": "trunk.layers.{i}.input_layernorm",
        f"{LAYER}.intermediate.dense": "trunk.layers.{i}.mlp.up_proj",
        f"{LAYER}.output.dense": "trunk.layers.{i}.mlp.down_proj",
        f"{LAYER}.output.LayerNorm": "trunk.layers.{i}.post_attention_layernorm",
        "pooler.dense": "head.pooler",
    },
    head_names={"classifier": "head.classifier"},
    ignored=("*embeddings.position_ids", "cls.*", "*pooler.dense.*"),
    to_spec=to_spec,
    to_config=to_config,
    architectures={"classify": "BertForSequenceClassification", "trunk": "BertModel"},
)
