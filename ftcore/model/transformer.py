"""The packed transformer: encoder or decoder, one flat stream of documents, no padding, no mask.

Letters: N tokens of the stream, M rows of it that are asked for, C width, H query heads, G
key/value heads, D head width, F MLP width, V vocabulary, L layers.

norm_first (GPT family)     h = h + attn(norm(h));  h = h + mlp(norm(h));  out = norm(h)
norm_last (BERT family)     h = norm(h + attn(h));  h = norm(h + mlp(h));  out = h
is_parallel (GPT-NeoX)      h = h + attn(norm(h)) + mlp(norm(h));  out = norm(h)
output_norms (Gemma)        h = h + norm(attn(norm(h)));  h = h + norm(mlp(norm(h)));  out = norm(h)

A family (families/) turns a `config.json` into a `ModelSpec` and back; the rest reads that alone.
Sub-module names are those of the HF Llama layout; the families map other names onto them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from ftcore.errors import ModelError
from kernels.attention import attention
from kernels.backend import Impl
from kernels.docs import Docs, rounded
from kernels.dropout import dropout
from kernels.linear import packed
from kernels.norm import layer_norm, rms_norm
from kernels.recompute import computed_again
from kernels.rope import norm_rope, rope, rope_angles
from kernels.swiglu import GATED

Attend = Callable[..., Tensor]  # (q_NHD, k_NGD, v_NGD, docs, scale, window, softcap) to o_NHD

@dataclass(frozen=True)
class ModelSpec:
    vocab_size: int  # V
    hidden_size: int  # C
    num_layers: int  # L
    intermediate_size: int  # F
    num_heads: int  # H
    num_kv_heads: int  # G, of which H is a multiple
    head_dim: int  # D
    max_positions: int  # longest document in tokens that the positions are made for
    is_causal: bool  # decoder (True) or encoder (False)
    norm: Literal["rms_norm", "layer_norm"]
    norm_eps: float  # added to the variance
    norm_first: bool  # normalise a sub-layer's input (True, with a final norm) or the sum after it
    position: Literal["rope", "learned"]
    mlp: Literal["swiglu", "geglu", "geglu_tanh", "gelu", "gelu_tanh"]  # the first three are gated
    norm_offset: float = 0.0  # added to the weight of an RMSNorm
    norm_bias: bool = True  # bias of a layer norm
    output_norms: bool = False  # with norm_first: normalise a sub-layer's output before the sum too
    is_parallel: bool = False  # with norm_first: attention and MLP read the same state
    position_offset: int = 0  # row of the learned positions that the first token takes
    rope_theta: float = 10000.0  # base of the rotary angles
    rope_share: float = 1.0  # of each head's channels, the first of them, that turn
    rope_factor: float = 1.0  # scales the angles, as rope_bands does: kernels/rope.py
    rope_bands: tuple[float, float, int] | None = None
    local_rope_theta: float | None = None  # base in windowed layers, never scaled; None: the same
    windows: tuple[int, ...] = ()  # by layer: a token sees those fewer positions away; 0, (): all
    attention_scale: float | None = None  # factor on the scores; None: D ** -0.5
    attention_softcap: float | None = None  # smooth bound of the scores
    logit_softcap: float | None = None  # smooth bound of the LM head's logits
    qk_norm: bool = False  # RMSNorm on each head's queries and keys
    linear_bias: bool = False  # biases on the MLP's linear maps and on o_proj
    qkv_bias: bool = False  # biases on q_proj, k_proj, v_proj
    num_types: int = 0  # segment embeddings (0: none)
    embedding_scale: float = 1.0  # factor on the token embeddings
    embedding_norm: bool = False  # of their sum; with norm_first the first attention then has none
    pooling: Literal["cls", "last", "mean"] = "last"  # of a document's tokens, for a classifier
    pooler: Literal["tanh", "relu", "transform"] | None = None  # before a classifier: heads.py
    tie_word_embeddings: bool = False  # the LM head is the embedding matrix
    dropout: float = 0.0  # probability on embeddings and sub-layer outputs while training
    initializer_range: float = 0.02

class Layer(nn.Module):
    """What computes, and how: set for all by `Model.use_kernels` and `Model.compute_in`."""

    impl: Impl = "auto"  # of its operations; of a last map, of the loss
    compute: torch.dtype | None = None  # of matrix products
    packed: Callable[[Tensor], Tensor] | None = None  # its linear maps of one input: `pack_linears`

    @property
    def is_packed(self) -> bool:
        return self.packed is not None and not torch.is_grad_enabled()

    def reset_parameters(self) -> None:
        """Nothing: values come later, from a checkpoint or from `Model.init_weights`."""

class Linear(Layer, nn.Linear):
    def forward(self, x_NC: Tensor) -> Tensor:
        return self.packed(x_NC) if self.is_packed else F.linear(*self.cast(x_NC))

    def cast(self, x_NC: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """x, weight and bias in the dtype of the product; gradients return in their own."""
        dtype = self.compute or self.weight.dtype
        bias_O = None if self.bias is None else self.bias.to(dtype)
        return x_NC.to(dtype), self.weight.to(dtype), bias_O

class Embedding(Layer, nn.Embedding):
    """An nn.Embedding whose values come later."""

class Norm(Layer):
    """y = (w + offset) x / rms(x) (RMSNorm) or w (x - mean) / std + b (LayerNorm), whichever the
    spec names; of x + residual: y and that sum. RMSNorm also turns y by angles."""

    def __init__(self, spec: ModelSpec, width: int | None = None) -> None:
        super().__init__()
        width, self.is_rms = width or spec.hidden_size, spec.norm == "rms_norm"
        self.eps, self.offset = spec.norm_eps, spec.norm_offset
        self.weight = nn.Parameter(torch.full((width,), 1 - self.offset))
        self.bias = nn.Parameter(torch.zeros(width)) if spec.norm_bias and not self.is_rms else None

    def forward(self, x_NC: Tensor, **more: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        if not self.is_rms:
            return layer_norm(x_NC, self.weight, self.bias, eps=self.eps, impl=self.impl, **more)
        more |= {"eps": self.eps, "offset": self.offset, "impl": self.impl}
        return (norm_rope if "cos_sin_2NE" in more else rms_norm)(x_NC, self.weight, **more)

class Attention(Layer):
    """Grouped-query self-attention over the stream's documents, in layer `index` of the model."""

    def __init__(self, spec: ModelSpec, index: int) -> None:
        super().__init__()
        C, H, G, D = spec.hidden_size, spec.num_heads, spec.num_kv_heads, spec.head_dim
        self.head_dim, self.is_causal, self.heads = D, spec.is_causal, (H, G, G)
        self.rule = {"scale": spec.attention_scale, "softcap": spec.attention_softcap}
        self.rule["window"] = (spec.windows[index] or None) if spec.windows else None
        self.q_proj = Linear(C, H * D, bias=spec.qkv_bias)
        self.k_proj = Linear(C, G * D, bias=spec.qkv_bias)
        self.v_proj = Linear(C, G * D, bias=spec.qkv_bias)
        self.o_proj = Linear(H * D, C, bias=spec.linear_bias)
        self.q_norm = Norm(spec, D) if spec.qk_norm else None
        self.k_norm = Norm(spec, D) if spec.qk_norm else None

    def forward(self, x_NC: Tensor, cos_sin_2NE: Tensor | None, docs: Docs, attend: Attend | None,
                rows_M: Tensor | None) -> Tensor:
        maps = self.q_proj, self.k_proj, self.v_proj
        by_head = x_NC.shape[0], -1, self.head_dim
        q_NHD, k_NGD, v_NGD = (self.packed(x_NC).view(by_head).split_with_sizes(self.heads, 1)
                               if self.is_packed else [each(x_NC).view(by_head) for each in maps])
        angles = {} if cos_sin_2NE is None else {"cos_sin_2NE": cos_sin_2NE}
        if self.q_norm is not None:
            q_NHD, k_NGD = self.q_norm(q_NHD, **angles), self.k_norm(k_NGD, **angles)
        elif angles:
            q_NHD, k_NGD = (rope(x, cos_sin_2NE, impl=self.impl) for x in (q_NHD, k_NGD))
        attend = attend or partial(attention, is_causal=self.is_causal)
        o_NHD = attend(q_NHD, k_NGD, v_NGD, docs, impl=self.impl, **self.rule)
        return self.o_proj((o_NHD if rows_M is None else o_NHD.index_select(0, rows_M)).flatten(1))

GELUS = {"gelu": "none", "gelu_tanh": "tanh"}  # torch's names of approximations

class Mlp(Layer):
    """Feed-forward layer: down(act(gate) up) or down(act(up))."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        C, width, bias = spec.hidden_size, spec.intermediate_size, spec.linear_bias
        self.kind = spec.mlp
        self.gate_proj = Linear(C, width, bias=bias) if spec.mlp in GATED else None
        self.up_proj = Linear(C, width, bias=bias)
        self.down_proj = Linear(width, C, bias=bias)

    def forward(self, x_NC: Tensor) -> Tensor:
        if self.is_packed:
            return self.down_proj(self.packed(x_NC))
        up_NF = self.up_proj(x_NC)
        if self.gate_proj is None:
            return self.down_proj(F.gelu(up_NF, approximate=GELUS[self.kind]))
        return self.down_proj(GATED[self.kind](self.gate_proj(x_NC), up_NF, impl=self.impl))

class Block(nn.Module):
    def __init__(self, spec: ModelSpec, index: int) -> None:
        super().__init__()
        self.spec, self.dropout = spec, spec.dropout
        self.self_attn = Attention(spec, index)
        self.mlp = Mlp(spec)
        is_normed = spec.norm_first and spec.embedding_norm and index == 0
        self.input_layernorm = nn.Identity() if is_normed else Norm(spec)
        self.attn_output_norm = Norm(spec) if spec.output_norms else nn.Identity().forward
        self.post_attention_layernorm = Norm(spec)
        self.mlp_output_norm = Norm(spec) if spec.output_norms else nn.Identity().forward

    def forward(self, h_NC: Tensor, cos_sin_2NE: Tensor | None, docs: Docs, attend: Attend | None,
                rows_M: Tensor | None) -> Tensor:
        """h_MC: all rows are attended to, and those of `rows_M` (None: all) are computed."""
        x_NC = self.input_layernorm(h_NC) if self.spec.norm_first else h_NC
        attended_MC = self.self_attn(x_NC, cos_sin_2NE, docs, attend, rows_M).to(h_NC.dtype)
        h_MC = h_NC if rows_M is None else h_NC.index_select(0, rows_M)
        if not self.spec.norm_first:
            h_MC = self.input_layernorm(h_MC + self._drop(attended_MC))
            return self.post_attention_layernorm(h_MC + self._drop(self.mlp(h_MC)))
        attended_MC = self._drop(self.attn_output_norm(attended_MC))
        if self.spec.is_parallel:
            x_MC, h_MC = self.post_attention_layernorm(h_MC), h_MC + attended_MC
        else:
            x_MC, h_MC = self.post_attention_layernorm(attended_MC, residual_NC=h_MC)
        return h_MC + self._drop(self.mlp_output_norm(self.mlp(x_MC)))

    def _drop(self, x_NC: Tensor) -> Tensor:
        return dropout(x_NC, self.dropout, is_training=True) if self.training else x_NC

class Transformer(Layer):
    """Embeddings, L blocks and the final norm: tokens in, hidden states out. `recompute`: layers of
    which the backward pass computes what it needs again; selective: every second but the last."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec, C = spec, spec.hidden_size
        self.recompute = "none"  # or others of config.Recompute, whose import would cost 0.1 s
        self.routes: dict[str, Tensor] | None = None  # rows of the stream by adapter: tune/lora.py
        self.embed_tokens = Embedding(spec.vocab_size, C)
        rows = spec.max_positions + spec.position_offset
        self.embed_positions = Embedding(rows, C) if spec.position == "learned" else None
        self.embed_types = Embedding(spec.num_types, C) if spec.num_types else None
        self.embed_norm = Norm(spec) if spec.embedding_norm else nn.Identity()
        self.layers = nn.ModuleList(Block(spec, index) for index in range(spec.num_layers))
        self.norm = Norm(spec) if spec.norm_first else nn.Identity()

    def embed(self, tokens_N: Tensor, positions_N: Tensor, types_N: Tensor) -> Tensor:
        h_NC = self.embed_tokens(tokens_N)
        if self.spec.embedding_scale != 1.0:  # HF: rounded to the compute dtype first
            h_NC = h_NC * torch.tensor(self.spec.embedding_scale, dtype=h_NC.dtype).item()
        if self.embed_positions is not None:
            h_NC = h_NC + self.embed_positions(positions_N + self.spec.position_offset)
        if self.embed_types is not None:
            h_NC = h_NC + self.embed_types(types_N)
        return dropout(self.embed_norm(h_NC), self.spec.dropout, is_training=self.training)

    def angles(self, positions_N: Tensor, dtype: torch.dtype) -> list[Tensor | None]:
        """cos_sin_2NE of each layer; all None where the positions are learned."""
        spec = self.spec
        if spec.position != "rope":
            return [None] * spec.num_layers
        width = int(spec.rope_share * spec.head_dim)
        turn = partial(rope_angles, positions_N, head_dim=width, dtype=dtype)
        full = turn(theta=spec.rope_theta, factor=spec.rope_factor, bands=spec.rope_bands)
        local = full if spec.local_rope_theta is None else turn(theta=spec.local_rope_theta)
        return [local if window else full for window in spec.windows or [0] * spec.num_layers]

    def forward(self, tokens_N: Tensor, positions_N: Tensor, types_N: Tensor, docs: Docs,
                attends: Sequence[Attend] | None = None, rows_M: Tensor | None = None) -> Tensor:
        """h_MC, hidden states of every token, or of the int64 rows_M of the stream, which the last
        layer then computes alone. positions_N restart at 0 in every document; types_N are its
        segments, if the family has them; `attends` has one for each layer while generating
        (generate.py). Raises ModelError: a document is longer than the learned positions."""
        if self.embed_positions is not None and max(docs.lengths) > self.spec.max_positions:
            most = f"the model has positions for {self.spec.max_positions}: cut it or split it"
            raise ModelError(f"a document has {max(docs.lengths)} tokens, {most}")
        N, M = len(tokens_N), len(tokens_N if rows_M is None else rows_M)
        if docs.num_tokens != N:
            raise ValueError(f"docs plans {docs.num_tokens} tokens, there are {N}")
        if tokens_N.device.type == "cpu":
            # cost: products of few sizes are compiled once; rows added, of no document, go unread
            tokens_N, positions_N, types_N = (torch.cat([x_N, x_N[:1].expand(docs.num_rows - N)])
                                              for x_N in (tokens_N, positions_N, types_N))
            rows_M = rows_M if rows_M is None else F.pad(rows_M, (0, rounded(M) - M))
        h_NC = self.embed(tokens_N, positions_N, types_N)
        L, is_training = len(self.layers), self.training and torch.is_grad_enabled()
        again = {"none": (), "selective": range(L - 2, -1, -2), "all": range(L)}[self.recompute]
        angles = self.angles(positions_N, self.compute or h_NC.dtype)
        # routes are places in the whole stream, so all of it is computed to the end
        early_M, late_M = (rows_M, None) if self.routes is None else (None, rows_M)
        asked, attends = [None] * (L - 1) + [early_M], attends or [None] * L
        for index, layer in enumerate(self.layers):
            run = partial(computed_again, layer) if is_training and index in again else layer
            h_NC = run(h_NC, angles[index], docs, attends[index], asked[index])
        h_NC = h_NC if late_M is None else h_NC.index_select(0, late_M)
        return self.norm(h_NC[:M])

def pack_linears(model: nn.Module) -> None:
    """Lay out linear maps whose values no longer change for passes without gradients, on a CPU:
    kernels/linear.py. Those of q, k and v are one; a gelu is a part of the map before it."""
    done: set[nn.Module] = set()
    for module in model.modules():
        maps, gelu = (module,), None
        if isinstance(module, Attention):
            maps = module.q_proj, module.k_proj, module.v_proj
        elif isinstance(module, Mlp) and module.gate_proj is None:
            maps, gelu = (module.up_proj,), GELUS[module.kind]
        if done.isdisjoint(maps) and all(type(each) is Linear for each in maps):
            module.packed = packed(maps, module.compute, gelu)
            done |= {*maps}

@contextmanager
def packed_linears(model: nn.Module) -> Iterator[None]:
    """`pack_linears`, for as long as values stay."""
    pack_linears(model)
    try:
        yield
    finally:
        for module in model.modules():
            vars(module).pop("packed", None)
