"""Gemma 3, its text model: Gemma 2 with QK-norm for soft caps, and a base of its own in windows.

source  Gemma team 2025, arXiv:2503.19786; HF layout of `Gemma3ForCausalLM`
"""

from dataclasses import replace

from ftcore.model.families.family import expect, read_int
from ftcore.model.families.gemma2 import GEMMA_NAMES, gemma_config, read_gemma
from ftcore.model.families.llama import decoder_family
from ftcore.model.families.positions import FULL, WINDOWED, read_two_ropes, two_ropes_config
from ftcore.model.families.qwen3 import QK_NORM
from ftcore.model.spec import ModelSpec


def to_spec(config: dict) -> ModelSpec:
    """Read a Gemma 3 text config.json: every sixth layer sees the whole document.

    raises  ModelError: another activation, biases, soft caps, or an unknown scaling of the angles
    """
    expect(config, {"attn_logit_softcapping": None, "final_logit_softcapping": None})
    num_layers = read_int(config, "num_hidden_layers")
    period = read_int(config, "sliding_window_pattern", default=6)
    ropes = read_two_ropes(
        config, theta=("rope_theta", 1e6), local_theta=("rope_local_base_freq", 1e4)
    )
    types = [WINDOWED if index % period else FULL for index in range(1, num_layers + 1)]
    return read_gemma(config, types, qk_norm=True, **ropes)


def to_config(spec: ModelSpec) -> dict:
    """The keys of config.json that the spec decides."""
    return gemma_config(
        spec,
        "gemma3_text",
        rope_local_base_freq=spec.local_rope_theta,
    ) | {"rope_parameters": two_ropes_config(spec)}


FAMILY = replace(
    decoder_family("gemma3_text", "Gemma3Text", to_spec, to_config, names=GEMMA_NAMES | QK_NORM),
    architectures={
        "lm": "Gemma3ForCausalLM",
        "classify": "Gemma3TextForSequenceClassification",
        "trunk": "Gemma3TextModel",
    },
)
