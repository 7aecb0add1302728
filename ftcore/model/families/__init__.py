"""Model families: each file maps one HF `model_type`: its config and tensor names, both ways."""

from importlib import import_module

from ftcore.errors import ModelError
from ftcore.model.families.family import Family

ENCODERS = ("bert", "distilbert", "modernbert", "roberta")
DECODERS = ("gemma2", "gpt2", "gpt_neox", "llama", "mistral", "qwen2", "qwen3")
FILES = {name: name for name in (*ENCODERS, *DECODERS)} | {"gemma3_text": "gemma3"}


def family_named(model_type: str) -> Family:
    """One of the families; its file is imported when it is asked for."""
    return import_module(f"{__name__}.{FILES[model_type]}").FAMILY


def family_of(config: dict, where: str) -> Family:
    """The family of a `config.json`.

    raises  ModelError: `model_type` is missing or not one of those known here
    """
    name = config.get("model_type")
    if not isinstance(name, str) or name not in FILES:
        known = ", ".join(sorted(FILES))
        raise ModelError(
            f"{where}: model_type is {name!r}; this code knows {known}. Convert the model to one"
            " of them, or add a file to ftcore/model/families."
        )
    return family_named(name)
