"""Gemma 3, its text model: Gemma 2 with QK-norm for soft caps, and a base of its own in windows.

source  Gemma team 2025, arXiv:2503.19786; HF layout of `Gemma3ForCausalLM`
"""

from dataclasses import replace
from typing import Any

from ftcore.model.families import gemma2
from ftcore.model.families.family import read_value
from ftcore.model.families.positions import read_two_ropes, two_ropes_config
from ftcore.model.spec import ModelSpec


def read(config: dict) -> dict[str, Any]:
    """Both bases of the angles; every sixth layer sees the whole document."""
    ropes = read_two_ropes(config, ("rope_theta", 1e6), ("rope_local_base_freq", 1e4))
    return gemma2.read_gemma(config, read_value(config, "sliding_window_pattern", 6)) | ropes


def write(spec: ModelSpec) -> dict[str, Any]:
    """Undoes `read`."""
    return gemma2.write_gemma(spec) | {"rope_parameters": two_ropes_config(spec)}


FAMILY = replace(
    gemma2.FAMILY,
    name="gemma3_text",
    architectures={
        "lm": "Gemma3ForCausalLM", "classify": "Gemma3TextForSequenceClassification",
        "trunk": "Gemma3TextModel",
    },
    switches={**gemma2.FAMILY.switches, "qk_norm": True},
    fixed={**gemma2.FAMILY.fixed, **{key: None for key, _ in gemma2.CAPS.values()}},
    read=read, write=write,
)  # fmt: skip
