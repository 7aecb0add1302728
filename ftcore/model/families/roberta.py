"""RoBERTa: BERT whose positions start behind the padding token's, and whose heads are its own.

source  Liu et al. 2019, arXiv:1907.11692; HF layout of `RobertaModel`
"""

from dataclasses import replace
from typing import Any

from ftcore.model.families import bert
from ftcore.model.families.family import architectures, read_value
from ftcore.model.spec import ModelSpec


def read(config: dict) -> dict[str, Any]:
    """The rows of the positions up to `pad_token_id` are no token's."""
    offset = read_value(config, "pad_token_id", 1) + 1
    rows = read_value(config, "max_position_embeddings")
    return {"position_offset": offset, "max_positions": rows - offset}


def write(spec: ModelSpec) -> dict[str, Any]:
    """Undoes `read`."""
    rows = spec.max_positions + spec.position_offset
    return {"pad_token_id": spec.position_offset - 1, "max_position_embeddings": rows}


FAMILY = replace(
    bert.FAMILY,
    name="roberta",
    architectures=architectures("Roberta", "mlm"),
    trunk_prefix="roberta.",
    trunk_names=bert.NAMES,
    head_names={
        "classifier.dense": "head.pooler", "classifier.out_proj": "head.classifier",
        "lm_head.dense": "head.transform.dense", "lm_head.layer_norm": "head.transform.norm",
        "lm_head.decoder.weight": "head.lm_head.weight",
        "lm_head.bias": "head.lm_head.bias",  # HF: `decoder.bias` is the same tensor
    },
    tagger="classifier",
    ignored=("*embeddings.position_ids", "*pooler.dense.*", "lm_head.decoder.bias"),
    read=read, write=write,
)  # fmt: skip
