"""Model families: each file maps one HF `model_type`: its config and tensor names, both ways."""

from ftcore.errors import ModelError
from ftcore.model.families import (
    bert,
    distilbert,
    gemma2,
    gemma3,
    gpt2,
    gpt_neox,
    llama,
    mistral,
    modernbert,
    qwen2,
    qwen3,
    roberta,
)
from ftcore.model.families.family import Family

FAMILIES: dict[str, Family] = {
    module.FAMILY.name: module.FAMILY
    for module in (
        *(bert, distilbert, modernbert, roberta),
        *(gemma2, gemma3, gpt2, gpt_neox, llama, mistral, qwen2, qwen3),
    )
}


def family_of(config: dict, where: str) -> Family:
    """The family of a `config.json`.

    raises  ModelError: `model_type` is missing or not one of those known here
    """
    name = config.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise ModelError(
            f"{where}: model_type is {name!r}; this code knows {known}. Convert the model to one"
            " of them, or add a file to ftcore/model/families."
        )
    return FAMILIES[name]
