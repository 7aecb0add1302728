"""Attention over a flat stream of documents: softmax(q k^T scale + mask) v inside each document.

Letters: N tokens of the stream, H query heads, G key/value heads (H a multiple of G), D head width,
B documents of a block, T their length, R = H / G query heads per key/value head.

forward     s = scale q k^T, p = softmax(s) over the keys of the same document (causal: not later)
            o = p v
backward    dv = p^T do, dp = do v^T, ds = p (dp - rowsum(do o)), dq = scale ds k, dk = scale ds^T q
dtypes      q, k, v and o share one compute dtype; softmax is accumulated in fp32
cost        4 sum_b T_b^2 H D FLOP forward (half when causal), 2.5 times that backward

CPU path: plain matmul, softmax, matmul on blocks planned by `Docs`, because the backward of torch's
CPU flash attention is 3 to 8 times slower at these lengths; above `SDPA_LENGTH` tokens, where the
T x T scores no longer fit the cache, torch's scaled_dot_product_attention takes over.

source      Vaswani et al. 2017, arXiv:1706.03762; grouped: Ainslie et al. 2023, arXiv:2305.13245
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx

from kernels.docs import Docs, Group

SDPA_LENGTH = 512  # tokens; documents longer than this use torch's fused CPU attention


def attention_reference(
    q_NHD: Tensor, k_NGD: Tensor, v_NGD: Tensor, docs: Docs, *, is_causal: bool, scale: float
) -> Tensor:
    """The definition, over one N x N mask. In float64 it is the oracle."""
    heads_per_group = q_NHD.shape[1] // k_NGD.shape[1]
    k_NHD = k_NGD.repeat_interleave(heads_per_group, dim=1)
    v_NHD = v_NGD.repeat_interleave(heads_per_group, dim=1)
    doc_N = docs.doc_of_N()
    allowed_NN = doc_N[:, None] == doc_N[None, :]
    if is_causal:
        allowed_NN = allowed_NN.tril()
    scores_HNN = torch.einsum("nhd,mhd->hnm", q_NHD, k_NHD) * scale
    scores_HNN = scores_HNN.masked_fill(~allowed_NN, float("-inf"))
    return torch.einsum("hnm,mhd->nhd", scores_HNN.softmax(-1), v_NHD)


class _Scatter(torch.autograd.Function):
    """Rows of x into distinct rows of a block of zeros; its gradient is a gather."""

    @staticmethod
    def forward(ctx: FunctionCtx, x_N: Tensor, slots_N: Tensor, num_rows: int) -> Tensor:
        ctx.save_for_backward(slots_N)
        return x_N.new_zeros(num_rows, *x_N.shape[1:]).index_copy_(0, slots_N, x_N)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None]:
        (slots_N,) = ctx.saved_tensors
        return grad.index_select(0, slots_N), None, None


class _Gather(torch.autograd.Function):
    """Distinct rows of a block; its gradient is a scatter, without index_add's sums."""

    @staticmethod
    def forward(ctx: FunctionCtx, block: Tensor, slots_N: Tensor) -> Tensor:
        ctx.save_for_backward(slots_N)
        ctx.num_rows = block.shape[0]
        return block.index_select(0, slots_N)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        (slots_N,) = ctx.saved_tensors
        return grad.new_zeros(ctx.num_rows, *grad.shape[1:]).index_copy_(0, slots_N, grad), None


def _attend_block(
    q_BTHD: Tensor, k_BTGD: Tensor, v_BTGD: Tensor, group: Group, *, is_causal: bool, scale: float
) -> Tensor:
    """Attention inside each row of a block; keys past a document's length are masked out."""
    B, T, H, D = q_BTHD.shape
    G = k_BTGD.shape[2]
    if T > SDPA_LENGTH:
        o_BHTD = F.scaled_dot_product_attention(
            q_BTHD.transpose(1, 2),
            k_BTGD.transpose(1, 2),
            v_BTGD.transpose(1, 2),
            is_causal=is_causal,
            scale=scale,
            enable_gqa=H != G,
        )
        return o_BHTD.transpose(1, 2)

    # The query heads of one key/value head become rows of one product: (B, G, R T, D).
    q_BGMD = (q_BTHD * scale).view(B, T, G, H // G, D).permute(0, 2, 3, 1, 4)
    q_BGMD = q_BGMD.reshape(B, G, -1, D)
    scores_BGRTS = (q_BGMD @ k_BTGD.permute(0, 2, 3, 1)).view(B, G, H // G, T, T)
    if is_causal:  # a document's keys come before its padding slots, so this hides those too
        later_TT = torch.ones(T, T, dtype=torch.bool, device=q_BTHD.device).triu(1)
        scores_BGRTS = scores_BGRTS.masked_fill(later_TT, float("-inf"))
    elif group.lengths_B is not None:
        outside_BS = torch.arange(T, device=q_BTHD.device) >= group.lengths_B[:, None]
        scores_BGRTS = scores_BGRTS.masked_fill(outside_BS[:, None, None, None], float("-inf"))
    p_BGMS = scores_BGRTS.softmax(-1).view(B, G, -1, T)
    o_BGMD = p_BGMS @ v_BTGD.transpose(1, 2)
    return o_BGMD.view(B, G, H // G, T, D).permute(0, 3, 1, 2, 4).reshape(B, T, H, D)


def _attend_group(
    q_NHD: Tensor, k_NGD: Tensor, v_NGD: Tensor, group: Group, *, is_causal: bool, scale: float
) -> Tensor:
    """Attention of one group's tokens."""
    size = group.num_docs * group.length
    blocks = []
    for x_N in (q_NHD, k_NGD, v_NGD):
        rows = x_N if group.slots is None else _Scatter.apply(x_N, group.slots, size)
        blocks.append(rows.view(group.num_docs, group.length, *x_N.shape[1:]))
    o_BTHD = _attend_block(*blocks, group, is_causal=is_causal, scale=scale)
    o_rows = o_BTHD.reshape(size, *q_NHD.shape[1:])
    return o_rows if group.slots is None else _Gather.apply(o_rows, group.slots)


def attention(
    q_NHD: Tensor,
    k_NGD: Tensor,
    v_NGD: Tensor,
    docs: Docs,
    *,
    is_causal: bool,
    scale: float | None = None,
) -> Tensor:
    """Self-attention inside each document of a flat stream.

    q_NHD           queries, compute dtype
    k_NGD, v_NGD    keys and values, same dtype; H must be a multiple of G
    docs            borders of the documents; their lengths add up to N
    is_causal       a token sees itself and earlier tokens of its document, else all of them
    scale           factor on the scores; default D ** -0.5
    returns         o_NHD, compute dtype
    raises          ValueError: N is not the plan's, or H is not a multiple of G
    """
    N, H, D = q_NHD.shape
    if docs.num_tokens != N or k_NGD.shape[0] != N:
        raise ValueError(f"docs plans {docs.num_tokens} tokens, q has {N}, k {k_NGD.shape[0]}")
    if H % k_NGD.shape[1]:
        raise ValueError(f"{H} query heads are not a multiple of {k_NGD.shape[1]} key heads")
    scale = D**-0.5 if scale is None else scale
    streams = (q_NHD, k_NGD, v_NGD)
    if docs.order_N is not None:
        streams = tuple(_Gather.apply(x_N, docs.order_N) for x_N in streams)
    # cost: split, not a slice for each group, whose gradient would be a zeroed stream of its own
    sizes = [group.num_tokens for group in docs.groups]
    parts = zip(*(x_N.split(sizes) for x_N in streams), docs.groups, strict=True)
    outputs = [_attend_group(*part, is_causal=is_causal, scale=scale) for part in parts]
    o_NHD = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return o_NHD if docs.order_N is None else _Scatter.apply(o_NHD, docs.order_N, N)
