"""Attention over a flat stream of documents: softmax(q k^T scale + mask) v inside each document.

Letters: N tokens of the stream, H query heads, G key/value heads (H a multiple of G), D head width,
B documents of a block, T their length, R = H / G query heads per key/value head, P = B G pairs of a
document and a key/value head, Z = R T queries of a pair.

forward     s = scale q k^T, p = softmax(s) over the keys of the same document (causal: not later)
            o = p v
            with a soft cap, s = cap tanh(scale q k^T / cap)
backward    dv = p^T do, dp = do v^T, ds = p (dp - rowsum(do o)), dq = scale ds k, dk = scale ds^T q
            with a soft cap, ds (1 - (s / cap)^2) in place of ds
dtypes      q, k, v and o share one compute dtype; softmax is accumulated in fp32
cost        4 sum_b T_b^2 H D FLOP forward, twice that backward, and as much for filled slots

CPU path: plain matmul, softmax, matmul on blocks planned by `Docs`, because the backward of torch's
CPU flash attention is 3 to 8 times slower at these lengths; above `LONG` tokens, where the
T x T scores no longer fit the cache, torch's scaled_dot_product_attention takes over, which knows
no soft cap and whose exponential is too coarse for fp32: those scores are formed at any length. A
window hides scores but does not save them. On a GPU the op is that of attention_triton.py.

source      Vaswani et al. 2017, arXiv:1706.03762; grouped: Ainslie et al. 2023, arXiv:2305.13245;
            window: Beltagy et al. 2020, arXiv:2004.05150; soft cap: Gemma 2, arXiv:2408.00118"""

from dataclasses import dataclass
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from kernels.backend import Impl, kernels_of
from kernels.docs import LONG, Docs, Group
from kernels.launch import MAX_HEAD_WIDTH
from kernels.softcap import capped

def attention_reference(q_NHD: Tensor, k_NGD: Tensor, v_NGD: Tensor, docs: Docs, *, is_causal: bool,
                        scale: float, window: int | None = None,
                        softcap: float | None = None) -> Tensor:
    """The definition, over one N x N mask. In float64 it is the oracle."""
    heads_per_group = q_NHD.shape[1] // k_NGD.shape[1]
    k_NHD, v_NHD = (x.repeat_interleave(heads_per_group, dim=1) for x in (k_NGD, v_NGD))
    doc_N = docs.doc_of_N()
    allowed_NN = doc_N[:, None] == doc_N[None, :]
    if is_causal:
        allowed_NN = allowed_NN.tril()
    if window is not None:
        allowed_NN = allowed_NN.tril(window - 1).triu(1 - window)
    scores_HNN = capped(torch.einsum("nhd,mhd->hnm", q_NHD, k_NHD) * scale, softcap)
    scores_HNN = scores_HNN.masked_fill(~allowed_NN, float("-inf"))
    return torch.einsum("hnm,mhd->nhd", scores_HNN.softmax(-1), v_NHD)

class _Reorder(torch.autograd.Function):
    """Row order_N[i] of x becomes row i, or the inverse; each is the other's gradient, without the
    sums of index_add."""

    @staticmethod
    def forward(ctx: FunctionCtx, x_N: Tensor, order_N: Tensor, is_inverse: bool) -> Tensor:
        ctx.save_for_backward(order_N)
        ctx.is_inverse = is_inverse
        return (torch.empty_like(x_N).index_copy_(0, order_N, x_N) if is_inverse else
                x_N.index_select(0, order_N))

    @staticmethod
    def backward(ctx: FunctionCtx, grad_N: Tensor) -> tuple[Tensor, None, None]:
        return _Reorder.apply(grad_N, *ctx.saved_tensors, not ctx.is_inverse), None, None

@dataclass(frozen=True)
class Rule:
    """The settings of `attention`, `scale` resolved."""
    is_causal: bool
    scale: float
    window: int | None
    softcap: float | None

    def hidden(self, group: Group) -> Tensor | None:
        """True where a query must not see a key, for (B or 1, 1, T or 1, T); None: it sees all."""
        reach = group.length if self.window is None else min(self.window, group.length)
        key = self.is_causal, reach
        if key not in group.hidden:
            group.hidden[key] = self._hidden(group, reach)
        return group.hidden[key]

    def _hidden(self, group: Group, reach: int) -> Tensor | None:
        key_T, masks = torch.arange(group.length, device=group.slots.device), []
        # causal: a document's keys come before its padding slots, which are hidden as later ones
        if group.lengths_B is not None and not self.is_causal:
            masks.append(key_T >= group.lengths_B[:, None, None, None])
        if self.is_causal or reach < group.length:
            query_11T1 = key_T[None, None, :, None]
            far_11TT = key_T >= query_11T1 + (1 if self.is_causal else reach)
            masks.append(far_11TT.logical_or_(key_T <= query_11T1 - reach))
        if len(masks) < 2:
            return masks[0] if masks else None
        # numerics: a padding slot sees itself, or its softmax over nothing would be NaN
        hidden_B1TT = masks[0] | masks[1]
        hidden_B1TT.diagonal(dim1=2, dim2=3).fill_(False)
        return hidden_B1TT

class _AttendBlock(torch.autograd.Function):
    """The documents of a group as one block; its steps are those at the head of this file.

    The query heads of one key/value head are rows of one product. A place past a document's end
    holds a copy of its first token: as a key it is hidden from the document, as a query its output
    and the gradient of that are dropped. Rows past the last document are dropped as queries."""

    @staticmethod
    def forward(ctx: FunctionCtx, q_NHD: Tensor, k_NGD: Tensor, v_NGD: Tensor, group: Group,
                rule: Rule) -> Tensor:
        B, T, G = group.num_docs, group.length, k_NGD.shape[1]
        q_PZD, k_PTD, v_PTD = (_to_block(x_N, group, G) for x_N in (q_NHD, k_NGD, v_NGD))
        scores_PZT = _scaled_bmm(q_PZD, k_PTD.transpose(1, 2), rule.scale)
        slope_PZT = None
        if rule.softcap is not None:
            slope_PZT = (scores_PZT / rule.softcap).tanh_()
            scores_PZT = slope_PZT * rule.softcap
            slope_PZT = 1 - slope_PZT.square()
        if (hidden := rule.hidden(group)) is not None:
            scores_PZT.view(B, -1, T, T).masked_fill_(hidden, float("-inf"))
        # cost: torch's bf16 softmax takes 2 to 3 times as long as the fp32 one and a cast
        wide = torch.promote_types(q_NHD.dtype, torch.float32)
        p_PZT = scores_PZT.softmax(-1, dtype=wide).to(q_NHD.dtype)
        ctx.save_for_backward(q_PZD, k_PTD, v_PTD, p_PZT, slope_PZT)
        ctx.group, ctx.rule = group, rule
        return _to_stream(torch.bmm(p_PZT, v_PTD), group)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, do_NHD: Tensor) -> tuple[Tensor | None, ...]:
        q_PZD, k_PTD, v_PTD, p_PZT, slope_PZT = ctx.saved_tensors
        group, G = ctx.group, len(k_PTD) // ctx.group.num_docs
        do_PZD = _to_block(do_NHD, group, G, is_gradient=True)
        dv_PTD = torch.bmm(p_PZT.transpose(1, 2), do_PZD)
        dp_PZT = torch.bmm(do_PZD, v_PTD.transpose(1, 2))
        # cost: as in forward; below 32 keys torch's bf16 form takes 4 to 10 times as long
        wide = torch.promote_types(p_PZT.dtype, torch.float32)
        ds_PZT = torch._softmax_backward_data(dp_PZT.to(wide), p_PZT.to(wide), -1, wide)
        ds_PZT = ds_PZT.to(p_PZT.dtype)
        if slope_PZT is not None:
            ds_PZT *= slope_PZT
        dq_PZD = _scaled_bmm(ds_PZT, k_PTD, ctx.rule.scale)
        dk_PTD = torch.bmm(ds_PZT.transpose(1, 2), q_PZD).mul_(ctx.rule.scale)
        return *(_to_stream(x, group) for x in (dq_PZD, dk_PTD, dv_PTD)), None, None

def _scaled_bmm(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """scale a b; cost: the product's code scales on the way, a pass over the result would not."""
    return torch.baddbmm(a.new_zeros(()), a, b, beta=0, alpha=scale)

def _to_block(x_NHD: Tensor, group: Group, G: int, *, is_gradient: bool = False) -> Tensor:
    """The group's rows as (P, Z, D), R = 1 for keys and values; a gradient's filling is zero."""
    B, T, (_, H, D) = group.num_docs, group.length, x_NHD.shape
    block_rows, stream_rows = group.rows_of(H)
    x_nD = x_NHD.reshape(-1, D)
    if is_gradient and group.lengths_B is not None:
        block_nD = x_NHD.new_zeros(B * H * T, D).index_copy_(0, stream_rows, x_nD)
    else:
        block_nD = x_nD.index_select(0, block_rows)
    return block_nD.view(B * G, -1, D)

def _to_stream(x_PZD: Tensor, group: Group) -> Tensor:
    """Undoes `_to_block`; what stands in the filling is dropped."""
    D = x_PZD.shape[-1]
    H = x_PZD.numel() // (group.num_docs * group.length * D)
    return x_PZD.view(-1, D).index_select(0, group.rows_of(H)[1]).view(-1, H, D)

def _attend_long(q_NHD: Tensor, k_NGD: Tensor, v_NGD: Tensor, group: Group, rule: Rule) -> Tensor:
    """Documents of one length through torch's fused attention."""
    blocks_BHTD = (x_N.view(group.num_docs, group.length, *x_N.shape[1:]).transpose(1, 2)
                   for x_N in (q_NHD, k_NGD, v_NGD))
    is_windowed = rule.window is not None and rule.window < group.length
    o_BHTD = F.scaled_dot_product_attention(
        *blocks_BHTD, attn_mask=~rule.hidden(group) if is_windowed else None,
        is_causal=rule.is_causal and not is_windowed, scale=rule.scale,
        enable_gqa=q_NHD.shape[1] != k_NGD.shape[1])
    return o_BHTD.transpose(1, 2).flatten(0, 1)

def attention(q_NHD: Tensor, k_NGD: Tensor, v_NGD: Tensor, docs: Docs, *, is_causal: bool,
              scale: float | None = None, window: int | None = None, softcap: float | None = None,
              impl: Impl = "auto") -> Tensor:
    """Self-attention inside each document of a flat stream.

    q_NHD           queries, compute dtype
    k_NGD, v_NGD    keys and values, same dtype; H must be a multiple of G
    docs            borders of the documents; N is their tokens, or `num_rows`
    is_causal       a token sees itself and earlier tokens of its document, else all of them
    scale           factor on the scores; default D ** -0.5
    window          a token sees those fewer than `window` positions away; None: all of them
    softcap         bounds the scores smoothly to (-softcap, softcap); None: they are not bounded
    impl            see kernels/backend.py
    returns         o_NHD, compute dtype; zero in rows past the documents
    raises          ValueError: N is not the plan's, or H is not a multiple of G; by the kernels,
                    also other sizes, dtypes and devices, D above 256, and settings not above 0"""
    N, H, D = q_NHD.shape
    if N not in (docs.num_tokens, docs.num_rows) or k_NGD.shape[0] != N:
        plan = f"docs plans {docs.num_tokens} tokens in {docs.num_rows} rows"
        raise ValueError(f"{plan}, q has {N}, k {k_NGD.shape[0]}")
    if H % k_NGD.shape[1]:
        raise ValueError(f"{H} query heads are not a multiple of {k_NGD.shape[1]} key heads")
    rule = Rule(is_causal, D**-0.5 if scale is None else scale, window, softcap)
    if kernels := kernels_of("attention", impl, q_NHD, fits=D <= MAX_HEAD_WIDTH):
        return kernels.Attention.apply(q_NHD, k_NGD, v_NGD, docs, rule)
    streams, (groups, order_N) = (q_NHD, k_NGD, v_NGD), docs.walk
    if order_N is not None:
        order_N = torch.cat([order_N, torch.arange(docs.num_tokens, N, device=q_NHD.device)])
        streams = tuple(_Reorder.apply(x_N, order_N, False) for x_N in streams)
    # cost: split, not a slice for each group, whose gradient would be a zeroed stream of its own
    sizes = [*(len(group.slots) for group in groups), N - docs.num_tokens]
    parts = zip(*(x_N.split(sizes) for x_N in streams), strict=True)
    outputs, suits_sdpa = [], softcap is None and q_NHD.dtype != torch.float32
    for part, group in zip(parts, groups, strict=False):
        attend = _attend_long if group.length > LONG and suits_sdpa else _AttendBlock.apply
        outputs.append(attend(*part, group, rule))
    if sizes[-1]:
        outputs.append(q_NHD.new_zeros(sizes[-1], H, v_NGD.shape[-1]))
    o_NHD = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return o_NHD if order_N is None else _Reorder.apply(o_NHD, order_N, True)
