"""Gemma 3, its text model: Gemma 2 with QK-norm for soft caps, and a base of its own in windows.

source  Gemma team 2025, arXiv:2503.19786; HF layout of `Gemma3ForCausalLM`
"""

from dataclasses import replace
from typing import Any

from ftcore.model.families import gemma2, llama
from ftcore.model.families.family import read_int
from ftcore.model.families.positions import FULL, WINDOWED, read_two_ropes, two_ropes_config
from ftcore.model.families.qwen3 import QK_NORM
from ftcore.model.spec import ModelSpec


def read(config: dict) -> dict[str, Any]:
    """Both bases of the angles; every sixth layer sees the whole document."""
    num_layers = read_int(config, "num_hidden_layers")
    period = read_int(config, "sliding_window_pattern", default=6)
    types = [WINDOWED if index % period else FULL for index in range(1, num_layers + 1)]
    return gemma2.read_gemma(config, types) | read_two_ropes(
        config, theta=("rope_theta", 1e6), local_theta=("rope_local_base_freq", 1e4)
    )


def write(spec: ModelSpec) -> dict[str, Any]:
    """Undoes `read`."""
    return gemma2.write_gemma(spec) | {"rope_parameters": two_ropes_config(spec)}


FAMILY = replace(
    gemma2.FAMILY,
    name="gemma3_text",
    trunk_names=llama.NAMES | gemma2.NORMS | QK_NORM,
    architectures={
        "lm": "Gemma3ForCausalLM",
        "classify": "Gemma3TextForSequenceClassification",
        "trunk": "Gemma3TextModel",
    },
    switches={**gemma2.FAMILY.switches, "qk_norm": True},
    fixed={**gemma2.FAMILY.fixed, **{key: None for key, _ in gemma2.CAPS.values()}},
    read=read,
    write=write,
)
