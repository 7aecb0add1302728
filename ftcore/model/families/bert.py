"""BERT: a bidirectional encoder with learned positions, segments and norms after each sum.

source  Devlin et al. 2019, arXiv:1810.04805; HF layout of `BertModel`
"""

from ftcore.model.families.family import KEYS, Family, architectures, trunk_names

NAMES = trunk_names(
    "encoder.layer.{i}",
    embed_tokens="embeddings.word_embeddings", embed_positions="embeddings.position_embeddings",
    embed_types="embeddings.token_type_embeddings", embed_norm="embeddings.LayerNorm",
    q_proj="attention.self.query", k_proj="attention.self.key", v_proj="attention.self.value",
    o_proj="attention.output.dense", input_layernorm="attention.output.LayerNorm",
    up_proj="intermediate.dense", down_proj="output.dense",
    post_attention_layernorm="output.LayerNorm",
)  # fmt: skip
FAMILY = Family(
    name="bert",
    architectures=architectures("Bert", "mlm"),
    trunk_prefix="bert.",
    trunk_names=NAMES | {"pooler.dense": "head.pooler"},
    head_names={
        "classifier": "head.classifier",
        "cls.predictions.transform.dense": "head.transform.dense",
        "cls.predictions.transform.LayerNorm": "head.transform.norm",
        "cls.predictions.decoder.weight": "head.lm_head.weight",
        "cls.predictions.bias": "head.lm_head.bias",  # HF: `decoder.bias` is the same tensor
    },
    ignored=(
        "*embeddings.position_ids", "*pooler.dense.*", "cls.seq_relationship.*",
        "cls.predictions.decoder.bias",
    ),
    switches=dict(
        is_causal=False, norm="layer_norm", norm_first=False, position="learned", mlp="gelu",
        linear_bias=True, qkv_bias=True, embedding_norm=True, pooling="first", pooler="tanh",
    ),
    keys=KEYS | {
        "num_types": ("type_vocab_size", 2), "norm_eps": ("layer_norm_eps", 1e-12),
        "dropout": ("hidden_dropout_prob", 0.1),
    },
    fixed=dict(
        hidden_act="gelu", position_embedding_type="absolute", is_decoder=False,
        tie_word_embeddings=True,
    ),
)  # fmt: skip
