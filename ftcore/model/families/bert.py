"""BERT: a bidirectional encoder with learned positions, segments and norms after each sum.

source  Devlin et al. 2019, arXiv:1810.04805; HF layout of `BertModel`
"""

from ftcore.model.families.family import KEYS, Family, architectures

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
SWITCHES = {
    "is_causal": False,
    "norm": "layer_norm",
    "norm_first": False,
    "position": "learned",
    "mlp": "gelu",
    "linear_bias": True,
    "qkv_bias": True,
    "embedding_norm": True,
    "pooling": "first",
    "pooler": "tanh",
}
BERT_KEYS = KEYS | {
    "num_types": ("type_vocab_size", 2),
    "norm_eps": ("layer_norm_eps", 1e-12),
    "dropout": ("hidden_dropout_prob", 0.1),
}
FIXED = {
    "hidden_act": "gelu",
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "tie_word_embeddings": True,
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
    architectures=architectures("Bert", "mlm"),
    switches=SWITCHES,
    keys=BERT_KEYS,
    fixed=FIXED,
)
