"""Qwen3: Llama's layout with a norm on each head's queries and keys.

source  Qwen team 2025, arXiv:2505.09388; HF layout of `Qwen3ForCausalLM`
"""

from ftcore.model.families.family import expect
from ftcore.model.families.llama import (
    LAYER,
    NAMES,
    OURS,
    decoder_config,
    decoder_family,
    read_decoder,
)
from ftcore.model.families.positions import read_rope
from ftcore.model.spec import ModelSpec

QK_NORM = {f"{LAYER}.self_attn.{part}": f"{OURS}.self_attn.{part}" for part in ("q_norm", "k_norm")}


def to_spec(config: dict) -> ModelSpec:
    """Read a Qwen3 config.json.

    raises  ModelError: an unknown scaling of the angles, a sliding window, another activation, or
            biases
    """
    expect(config, {"use_sliding_window": False, "hidden_act": "silu", "attention_bias": False})
    return read_decoder(config, head_dim=128, qk_norm=True, **read_rope(config))


def to_config(spec: ModelSpec) -> dict:
    """The keys of config.json that the spec decides."""
    return decoder_config(
        spec, "qwen3", hidden_act="silu", attention_bias=False, use_sliding_window=False
    )


FAMILY = decoder_family("qwen3", "Qwen3", to_spec, to_config, names=NAMES | QK_NORM)
