"""Named recipes: flags that are placed before the user's own, so that the last one wins."""

import tomllib
from pathlib import Path
from typing import Any

def presets() -> dict[str, dict[str, dict[str, dict[str, Any]]]]:
    """Those of presets.toml: task -> name -> section -> option -> value."""
    return tomllib.loads(Path(__file__).with_suffix(".toml").read_text("utf-8"))
