"""Model families: each TOML file maps one HF `model_type`: its config and tensor names."""

from ftcore.errors import ModelError
from ftcore.model.families.family import FOLDER, Family, family_named

def family_names() -> list[str]:
    """The families known here, by `model_type`: each has its file."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))

def family_of(config: dict, where: str) -> Family:
    """The family of a `config.json`. Raises ModelError: its `model_type` is not known here."""
    if (name := config.get("model_type")) not in family_names():
        what = f"{where}: model_type is {name!r}; this code knows {', '.join(family_names())}"
        raise ModelError(f"{what}. Convert it to one of these, or add it to ftcore/model/families.")
    return family_named(name)
