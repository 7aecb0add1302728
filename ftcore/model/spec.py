"""What a transformer is made of, free of any family's file format.

A family (`ftcore/model/families/`) turns a `config.json` into a `ModelSpec` and back; the
transformer reads nothing but the spec. Every switch is a plain value with one meaning.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ModelSpec:
    """Sizes and switches of one transformer.

    vocab_size, hidden_size, num_layers, intermediate_size      V, C, L, F
    num_heads, num_kv_heads, head_dim                           H, G, D (H a multiple of G)
    max_positions       longest document in tokens that the positions are made for
    is_causal           decoder (True) or encoder (False)
    norm                "rms_norm", or "layer_norm" with bias
    norm_eps            added to the variance
    norm_first          normalise a sub-layer's input (True, with a final norm) or the sum after it
    position            "rope" or "learned"
    rope_theta          base of the rotary angles
    mlp                 "swiglu" (gate, up, down) or "gelu" (up, down)
    qk_norm             RMSNorm on each head's queries and keys
    linear_bias         biases on the MLP's linear maps and on o_proj
    qkv_bias            biases on q_proj, k_proj, v_proj
    num_types           segment embeddings (0: none)
    embedding_norm      normalise the sum of the embeddings
    has_pooler          dense + tanh on the first token, before a classifier
    tie_word_embeddings the LM head is the embedding matrix
    dropout             probability on embeddings and sub-layer outputs while training
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    is_causal: bool
    norm: Literal["rms_norm", "layer_norm"]
    norm_eps: float
    norm_first: bool
    position: Literal["rope", "learned"]
    mlp: Literal["swiglu", "gelu"]
    rope_theta: float = 10000.0
    qk_norm: bool = False
    linear_bias: bool = False
    qkv_bias: bool = False
    num_types: int = 0
    embedding_norm: bool = False
    has_pooler: bool = False
    tie_word_embeddings: bool = False
    dropout: float = 0.0
    initializer_range: float = 0.02
