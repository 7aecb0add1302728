"""RoBERTa: BERT whose positions start behind the padding token's, and whose heads are its own.

source  Liu et al. 2019, arXiv:1907.11692; HF layout of `RobertaModel`
"""

from dataclasses import replace

from ftcore.model.families import bert
from ftcore.model.families.family import Family, read_int
from ftcore.model.spec import ModelSpec


def to_spec(config: dict) -> ModelSpec:
    """Read a RoBERTa config.json: the rows up to `pad_token_id` are no positions of a token.

    raises  ModelError: as BERT
    """
    offset = read_int(config, "pad_token_id", default=1) + 1
    rows = read_int(config, "max_position_embeddings", default=514)
    spec = bert.to_spec({"layer_norm_eps": 1e-5, "type_vocab_size": 1, **config})
    return replace(spec, position_offset=offset, max_positions=rows - offset)


def to_config(spec: ModelSpec) -> dict:
    """The keys of config.json that the spec decides."""
    return {
        **bert.to_config(spec),
        "model_type": "roberta",
        "max_position_embeddings": spec.max_positions + spec.position_offset,
        "pad_token_id": spec.position_offset - 1,
    }


FAMILY = Family(
    name="roberta",
    trunk_prefix="roberta.",
    trunk_names=bert.NAMES,
    head_names={
        "classifier.dense": "head.pooler",
        "classifier.out_proj": "head.classifier",
        "lm_head.dense": "head.transform.dense",
        "lm_head.layer_norm": "head.transform.norm",
        "lm_head.decoder.weight": "head.lm_head.weight",
        "lm_head.bias": "head.lm_head.bias",
    },
    ignored=(
        "*embeddings.position_ids",
        "*pooler.dense.*",
        "lm_head.decoder.bias",  # HF: the same tensor as lm_head.bias
    ),
    to_spec=to_spec,
    to_config=to_config,
    architectures={
        "mlm": "RobertaForMaskedLM",
        "classify": "RobertaForSequenceClassification",
        "trunk": "RobertaModel",
    },
)
