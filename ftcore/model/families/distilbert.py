"""DistilBERT: BERT with half the layers, without segments, with a ReLU before its classifier.

source  Sanh et al. 2019, arXiv:1910.01108; HF layout of `DistilBertModel`
"""

from ftcore.model.families import bert
from ftcore.model.families.family import KEYS, Family, architectures, trunk_names

FAMILY = Family(
    name="distilbert",
    architectures=architectures("DistilBert", "mlm"),
    trunk_prefix="distilbert.",
    trunk_names=trunk_names(
        "transformer.layer.{i}",
        embed_tokens="embeddings.word_embeddings", embed_norm="embeddings.LayerNorm",
        embed_positions="embeddings.position_embeddings",
        q_proj="attention.q_lin", k_proj="attention.k_lin", v_proj="attention.v_lin",
        o_proj="attention.out_lin", input_layernorm="sa_layer_norm",
        up_proj="ffn.lin1", down_proj="ffn.lin2", post_attention_layernorm="output_layer_norm",
    ),
    head_names={
        "pre_classifier": "head.pooler", "classifier": "head.classifier",
        "vocab_transform": "head.transform.dense", "vocab_layer_norm": "head.transform.norm",
        "vocab_projector": "head.lm_head",
    },
    switches={**bert.FAMILY.switches, "pooler": "relu", "norm_eps": 1e-12},
    keys=KEYS | {
        "hidden_size": ("dim", int), "num_layers": ("n_layers", int), "num_heads": ("n_heads", int),
        "intermediate_size": ("hidden_dim", int), "dropout": ("dropout", 0.1),
    },
    fixed={"activation": "gelu"},
)  # fmt: skip
