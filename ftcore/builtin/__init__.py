"""The embedded default: a tiny pre-trained base model and a chat data set made by code.

Its wording is in the TOML files of words/: a list there is an array of strings, or one string with
commas, line breaks counting as spaces. The order of a list decides what a random draw gives.
"""

import tomllib
from functools import cache
from pathlib import Path
from typing import Any

@cache
def wording(name: str, folder: Path = Path(__file__).parent / "words") -> dict[str, Any]:
    """The table of NAME.toml, each list of it a tuple of strings."""
    return _with_tuples(tomllib.loads((folder / f"{name}.toml").read_text(encoding="utf-8")))

def _with_tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_tuples(inner) for key, inner in value.items()}
    if isinstance(value, str):
        return tuple(" ".join(entry.split()) for entry in value.split(","))
    return tuple(value) if isinstance(value, list) else value
