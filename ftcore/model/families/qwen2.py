"""Qwen2 and Qwen2.5: Llama's layout with biases on queries, keys and values.

source  Qwen team 2024, arXiv:2407.10671; HF layout of `Qwen2ForCausalLM`
"""

from ftcore.model.families.family import expect
from ftcore.model.families.llama import decoder_config, decoder_family, read_decoder
from ftcore.model.families.positions import read_rope
from ftcore.model.spec import ModelSpec


def to_spec(config: dict) -> ModelSpec:
    """Read a Qwen2 config.json.

    raises  ModelError: an unknown scaling of the angles, a sliding window, or another activation
    """
    expect(config, {"use_sliding_window": False, "hidden_act": "silu"})
    return read_decoder(config, qkv_bias=True, **read_rope(config))


def to_config(spec: ModelSpec) -> dict:
    """The keys of config.json that the spec decides."""
    return decoder_config(spec, "qwen2", hidden_act="silu", use_sliding_window=False)


FAMILY = decoder_family("qwen2", "Qwen2", to_spec, to_config)
