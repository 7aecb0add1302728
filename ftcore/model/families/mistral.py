"""Mistral: Llama's layout, every layer with the same window or none.

source  Jiang et al. 2023, arXiv:2310.06825; HF layout of `MistralForCausalLM`
"""

from dataclasses import replace
from typing import Any

from ftcore.model.families import llama
from ftcore.model.families.family import architectures, read_value
from ftcore.model.families.positions import read_rope, write_rope
from ftcore.model.spec import ModelSpec


def read(config: dict) -> dict[str, Any]:
    """The angles, and one window for all layers: 4096, the first model's, if it is not named."""
    windows: tuple[int, ...] = ()
    if config.get("sliding_window", 4096) is not None:
        window = read_value(config, "sliding_window", 4096)
        windows = (window,) * read_value(config, "num_hidden_layers")
    return read_rope(config) | {"windows": windows}


def write(spec: ModelSpec) -> dict[str, Any]:
    """Undoes `read`."""
    return write_rope(spec) | {"sliding_window": spec.windows[0] if spec.windows else None}


FAMILY = replace(
    llama.FAMILY,
    name="mistral",
    architectures=architectures("Mistral", "lm"),
    fixed={"hidden_act": "silu"},
    read=read, write=write,
)  # fmt: skip
