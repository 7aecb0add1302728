"""DistilBERT: BERT with half the layers, without segments, with a ReLU before its classifier.

source  Sanh et al. 2019, arXiv:1910.01108; HF layout of `DistilBertModel`
"""

from ftcore.model.families import bert
from ftcore.model.families.family import KEYS, Family, architectures

LAYER, OURS = "transformer.layer.{i}", "trunk.layers.{i}"

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
    architectures=architectures("DistilBert", "mlm"),
    switches=bert.SWITCHES | {"pooler": "relu", "norm_eps": 1e-12},
    keys=KEYS
    | {
        "hidden_size": ("dim", int),
        "num_layers": ("n_layers", int),
        "num_heads": ("n_heads", int),
        "intermediate_size": ("hidden_dim", int),
        "dropout": ("dropout", 0.1),
    },
    fixed={"activation": "gelu"},
)
