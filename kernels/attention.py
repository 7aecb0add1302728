"""Attention over a flat stream of documents: softmax(q k^T scale + mask) v inside each document.

Letters: N tokens of the stream, H query heads, G key/value heads (H a multiple of G), D head width,
B bins of a block, T their length, R = H / G query heads per key/value head, P = B G pairs of a bin
and a key/value head, Z = R T queries of a pair, n rows of all blocks, by head.

forward     s = scale q k^T, p = softmax(s) over the keys of the same document (causal: not later)
            o = p v
            with a soft cap, s = cap tanh(scale q k^T / cap)
backward    dv = p^T do, dp = do v^T, ds = p (dp - rowsum(do o)), dq = scale ds k, dk = scale ds^T q
            with a soft cap, ds (1 - (s / cap)^2) in place of ds
dtypes      q, k, v and o share one compute dtype; softmax is accumulated in fp32
cost        4 sum T^2 H D FLOP forward over all bins, twice that backward

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

@dataclass(frozen=True)
class Rule:
    """The settings of `attention`, `scale` resolved."""
    is_causal: bool
    scale: float
    window: int | None
    softcap: float | None

    def hidden(self, group: Group) -> Tensor | None:
        """True where a query must not see a key, for (B or 1, 1, T, T); None: it sees all."""
        length = group.doc_BT.shape[1]
        key = self.is_causal, min(self.window or length, length)
        if key not in group.hidden:
            doc_BT, key_T = group.doc_BT, torch.arange(length, device=group.doc_BT.device)
            past_T1 = key_T[:, None] + (1 if self.is_causal else key[1])
            hidden_BTT = (key_T >= past_T1) | (key_T <= key_T[:, None] - key[1])
            if not group.is_whole:
                # numerics: what is filling sees filling, or its softmax over nothing would be NaN
                hidden_BTT = (doc_BT[:, :, None] != doc_BT[:, None]).logical_or_(hidden_BTT)
            sees_all = group.is_whole and key == (False, length)
            group.hidden[key] = None if sees_all else hidden_BTT.view(-1, 1, length, length)
        return group.hidden[key]

class _Attend(torch.autograd.Function):
    """All documents, block by block; the steps are those at the head of this file.

    The query heads of one key/value head are rows of one product. A place that is filling holds a
    copy of its bin's first row: as a key it is hidden from documents, as a query it is dropped."""

    @staticmethod
    def forward(ctx: FunctionCtx, q_NHD: Tensor, k_NGD: Tensor, v_NGD: Tensor, docs: Docs,
                rule: Rule) -> Tensor:
        q_nD, k_nD, v_nD = blocks = [_to_blocks(x_N, docs) for x_N in (q_NHD, k_NGD, v_NGD)]
        (N, H, _), G, saved = q_NHD.shape, k_NGD.shape[1], []
        o_nD = q_nD.new_empty(len(q_nD) + 1, v_nD.shape[1])  # and a row of no document
        # cost: torch's bf16 softmax takes 2 to 3 times as long as the fp32 one and a cast
        wide = torch.promote_types(q_nD.dtype, torch.float32)
        ctx.docs, ctx.rule, ctx.heads, ctx.long = docs, rule, (H, G), set()
        for group in docs.walk[0]:
            q_PZD, k_PTD, v_PTD, o_PZD = group.of((q_nD, k_nD, v_nD, o_nD), (H, G, G, H), G)
            if len(group.doc_BT[0]) > LONG and rule.softcap is None and wide != q_nD.dtype:
                ctx.long.add(group)
                o_PZD.copy_(_attend_long(q_PZD, k_PTD, v_PTD, group, rule)[0].reshape(o_PZD.shape))
                continue
            slope_PZT, zero = None, q_nD.new_zeros(())
            # cost: the product's code scales on the way, a pass over the result would not
            scores_PZT = torch.baddbmm(zero, q_PZD, k_PTD.mT, beta=0, alpha=rule.scale)
            if rule.softcap is not None:
                slope_PZT = (scores_PZT / rule.softcap).tanh_()
                scores_PZT = slope_PZT * rule.softcap
                slope_PZT = 1 - slope_PZT.square()
            if (hidden := rule.hidden(group)) is not None:
                scores_PZT.view(len(hidden), -1, *hidden.shape[2:]).masked_fill_(hidden, -torch.inf)
            p_PZT = scores_PZT.softmax(-1, dtype=wide).to(q_nD.dtype)
            torch.bmm(p_PZT, v_PTD, out=o_PZD)
            saved += p_PZT, slope_PZT
        # zero times what is not finite is not zero, and would reach its bin; a meter has no values
        if type(o_nD) is Tensor and not docs.is_apart and not o_nD[:-1].sum(dtype=wide).isfinite():
            return _Attend.forward(ctx, q_NHD, k_NGD, v_NGD, docs.apart, rule)
        ctx.save_for_backward(*blocks, *saved)
        return _to_stream(o_nD, docs, H, N)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, do_NHD: Tensor) -> tuple[Tensor | None, ...]:
        q_nD, k_nD, v_nD, *saved = ctx.saved_tensors
        docs, (N, H, D), G, saved = ctx.docs, do_NHD.shape, ctx.heads[1], iter(saved)
        wide = torch.promote_types(q_nD.dtype, torch.float32)
        rows_n = docs.rows_of(H, N)[1][: docs.num_tokens * H]
        do_nD = do_NHD.new_zeros(len(q_nD), D)  # of what is filling
        do_nD.index_copy_(0, rows_n, do_NHD.reshape(-1, D)[: len(rows_n)])
        grads = [x_nD.new_empty(len(x_nD) + 1, x_nD.shape[1]) for x_nD in (q_nD, k_nD, v_nD)]
        for group in docs.walk[0]:
            q_PZD, k_PTD, v_PTD, do_PZD, dq_PZD, dk_PTD, dv_PTD = group.of(
                (q_nD, k_nD, v_nD, do_nD, *grads), (H, G, G, H, H, G, G), G)
            if group in ctx.long:
                o_BHTD, *leaves = _attend_long(q_PZD, k_PTD, v_PTD, group, ctx.rule)
                found = torch.autograd.grad(o_BHTD, leaves, do_PZD.view(o_BHTD.shape))
                for into, grad in zip((dq_PZD, dk_PTD, dv_PTD), found, strict=True):
                    into.copy_(grad.reshape(into.shape))
                continue
            p_PZT, slope_PZT = next(saved), next(saved)
            torch.bmm(p_PZT.mT, do_PZD, out=dv_PTD)
            dp_PZT = torch.bmm(do_PZD, v_PTD.mT)
            # cost: as in forward; torch's bf16 form takes up to 10 times as long
            ds_PZT = torch._softmax_backward_data(dp_PZT.to(wide), p_PZT.to(wide), -1, wide)
            ds_PZT = ds_PZT.to(p_PZT.dtype)
            if slope_PZT is not None:
                ds_PZT *= slope_PZT
            # cost: one pass more, but this product's code is the one that made o
            torch.bmm(ds_PZT, k_PTD, out=dq_PZD).mul_(ctx.rule.scale)
            torch.bmm(ds_PZT.mT, q_PZD, out=dk_PTD).mul_(ctx.rule.scale)
        return *map(_to_stream, grads, [docs] * 3, (H, G, G), [N] * 3), None, None

def _to_blocks(x_NHD: Tensor, docs: Docs) -> Tensor:
    """The rows of all blocks, (n, D)."""
    N, H, D = x_NHD.shape
    return x_NHD.reshape(-1, D).index_select(0, docs.rows_of(H, N)[0])

def _to_stream(x_nD: Tensor, docs: Docs, H: int, N: int) -> Tensor:
    """Undoes `_to_blocks`; what stands in the filling is dropped, rows past the documents are 0."""
    x_nD[-1] = 0
    return x_nD.index_select(0, docs.rows_of(H, N)[1]).view(N, H, -1)

@torch.enable_grad()
def _attend_long(q_PZD: Tensor, k_PTD: Tensor, v_PTD: Tensor, group: Group,
                 rule: Rule) -> tuple[Tensor, ...]:
    """A block through torch's fused attention: o, and what it is a function of. It is computed
    again for the backward pass: its graph would keep more than was saved."""
    B, T = group.doc_BT.shape
    is_masked = (rule.window or T) < T or not group.is_whole
    leaves = [x.view(B, -1, T, x.shape[-1]).detach().requires_grad_()
              for x in (q_PZD, k_PTD, v_PTD)]
    o_BHTD = F.scaled_dot_product_attention(
        *leaves, attn_mask=~rule.hidden(group) if is_masked else None,
        is_causal=rule.is_causal and not is_masked, scale=rule.scale,
        enable_gqa=len(leaves[0][0]) != len(leaves[1][0]))
    return o_BHTD, *leaves

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
    return _Attend.apply(q_NHD, k_NGD, v_NGD, docs, rule)
