"""Mistral: Llama's layout, every layer with the same window or none.

source  Jiang et al. 2023, arXiv:2310.06825; HF layout of `MistralForCausalLM`
"""

from ftcore.model.families.family import expect, read_int
from ftcore.model.families.llama import decoder_config, decoder_family, read_decoder
from ftcore.model.families.positions import read_rope
from ftcore.model.spec import ModelSpec


def to_spec(config: dict) -> ModelSpec:
    """Read a Mistral config.json; one without `sliding_window` has the first model's 4096.

    raises  ModelError: an unknown scaling of the angles, or another activation
    """
    expect(config, {"hidden_act": "silu"})
    windows: tuple[int, ...] = ()
    if config.get("sliding_window", 4096) is not None:
        window = read_int(config, "sliding_window", default=4096)
        windows = (window,) * read_int(config, "num_hidden_layers")
    return read_decoder(config, windows=windows, **read_rope(config))


def to_config(spec: ModelSpec) -> dict:
    """The keys of config.json that the spec decides."""
    window = spec.windows[0] if spec.windows else None
    return decoder_config(spec, "mistral", hidden_act="silu", sliding_window=window)


FAMILY = decoder_family("mistral", "Mistral", to_spec, to_config)
