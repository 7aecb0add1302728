"""Qwen3: a causal decoder with grouped heads, QK-norm, rotary positions and SwiGLU.

source  Qwen team 2025, arXiv:2505.09388; HF layout of `Qwen3ForCausalLM`
"""

from ftcore.errors import ModelError
from ftcore.model.families.family import Family, expect, read_float, read_int
from ftcore.model.spec import ModelSpec

LAYER = "layers.{i}"
PLAIN_ROPE = (None, "default")


def to_spec(config: dict) -> ModelSpec:
    """Read a Qwen3 config.json, with `rope_theta` at the top or inside `rope_parameters`.

    raises  ModelError: scaled rotary positions, a sliding window, or another activation
    """
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict) or rope.get("rope_type", rope.get("type")) not in PLAIN_ROPE:
        raise ModelError(f"config.json: rope_parameters = {rope}: only plain rotary is known")
    expect(config, {"use_sliding_window": False, "hidden_act": "silu", "attention_bias": False})
    num_heads = read_int(config, "num_attention_heads")
    num_kv_heads = read_int(config, "num_key_value_heads", default=num_heads)
    if num_heads % num_kv_heads:
        raise ModelError(
            f"config.json: num_attention_heads = {num_heads} must be a multiple of"
            f" num_key_value_heads = {num_kv_heads}"
        )
    theta = "rope_theta"  # at the top in files of older transformers
    return ModelSpec(
        vocab_size=read_int(config, "vocab_size"),
        hidden_size=read_int(config, "hidden_size"),
        num_layers=read_int(config, "num_hidden_layers"),
        intermediate_size=read_int(config, "intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=read_int(config, "head_dim", default=128),
        max_positions=read_int(config, "max_position_embeddings", default=32768),
        is_causal=True,
        norm="rms_norm",
        norm_eps=read_float(config, "rms_norm_eps", default=1e-6),
        norm_first=True,
        position="rope",
        rope_theta=read_float(rope if theta in rope else config, theta, default=10000.0),
        mlp="swiglu",
        qk_norm=True,
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        initializer_range=read_float(config, "initializer_range", default=0.02),
    )


def to_config(spec: ModelSpec) -> dict:
    """The keys of config.json that the spec decides."""
    return {
        "model_type": "qwen3",
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        "intermediate_size": spec.intermediate_size,
        "hidden_act": "silu",
        "max_position_embeddings": spec.max_positions,
        "rms_norm_eps": spec.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": spec.rope_theta},
        "rope_theta": spec.rope_theta,
        "tie_word_embeddings": spec.tie_word_embeddings,
        "initializer_range": spec.initializer_range,
        "attention_bias": False,
        "use_sliding_window": False,
    }


FAMILY = Family(
    name="qwen3",
    trunk_prefix="model.",
    trunk_names={
        "embed_tokens": "trunk.embed_tokens",
        **{
            f"{LAYER}.{name}": "trunk.layers.{i}." + name
            for name in (
                "input_layernorm",
                "post_attention_layernorm",
                *(f"self_attn.{part}" for part in ("q_proj", "k_proj", "v_proj", "o_proj")),
                *(f"self_attn.{part}" for part in ("q_norm", "k_norm")),
                *(f"mlp.{part}" for part in ("gate_proj", "up_proj", "down_proj")),
            )
        },
        "norm": "trunk.norm",
    },
    head_names={"lm_head": "head.lm_head", "score": "head.classifier"},
    ignored=(),
    to_spec=to_spec,
    to_config=to_config,
    architectures={
        "lm": "Qwen3ForCausalLM",
        "classify": "Qwen3ForSequenceClassification",
        "trunk": "Qwen3Model",
    },
)
