"""Attention of one new token per sequence, or of a chunk, over keys and values already cached.

Letters: B sequences, H = G R query heads, G key heads, Z = B G, D width, P pages, J each, S slots.

forward     o_b = softmax(scale q_b K_b^T) V_b over the first lengths_b slots of sequence b, or with
            a window over the last `window` of those; with a soft cap, cap tanh(scale q K^T / cap)
cost        4 H D sum_b lengths_b FLOP; reads 2 G D sum_b lengths_b cached values, so memory-bound
layout      pages, or one contiguous slab of S slots per sequence: on a CPU, gathering pages costs
            more than ten times the attention itself
GPU         kernels/attention_decode_triton.py, which reads pages where they lie
backward    none: decoding never trains"""

import torch
from torch import Tensor
from kernels.backend import Impl, kernels_of
from kernels.launch import MAX_HEAD_WIDTH
from kernels.softcap import capped

def attention_decode_reference(q_BHD: Tensor, k_PSGD: Tensor, v_PSGD: Tensor, lengths_B: Tensor, *,
                               scale: float, pages_BJ: Tensor | None = None,
                               window: int | None = None, softcap: float | None = None) -> Tensor:
    """The definition, one sequence at a time. In float64 it is the oracle."""
    outputs, S, heads_per_group = [], k_PSGD.shape[1], q_BHD.shape[1] // k_PSGD.shape[2]
    tables = [[b] for b in range(len(q_BHD))] if pages_BJ is None else pages_BJ.tolist()
    for q_HD, table, length in zip(q_BHD, tables, lengths_B.tolist(), strict=True):
        first = 0 if window is None else max(0, length - window)
        pages = table[: -(-length // S)]
        k_SGD, v_SGD = (x[pages].flatten(0, 1)[first:length] for x in (k_PSGD, v_PSGD))
        k_SHD, v_SHD = (x.repeat_interleave(heads_per_group, dim=1) for x in (k_SGD, v_SGD))
        scores_HS = capped(torch.einsum("hd,shd->hs", q_HD, k_SHD) * scale, softcap)
        outputs.append(torch.einsum("hs,shd->hd", scores_HS.softmax(-1), v_SHD))
    return torch.stack(outputs)

def attention_decode(q_BHD: Tensor, k_PSGD: Tensor, v_PSGD: Tensor, lengths_B: Tensor, *,
                     pages_BJ: Tensor | None = None, scale: float | None = None,
                     window: int | None = None, softcap: float | None = None, impl: Impl = "auto",
                     masks: dict[tuple[int, int | None], Tensor] | None = None) -> Tensor:
    """One decoding step of attention over a cache.

    q_BHD             one query per sequence, compute dtype
    k_PSGD, v_PSGD    cached keys and values, same dtype; slots past a length have no effect, but
                      must be finite; no copy is made where memory is laid out (P, G, S, D)
    lengths_B         int64, valid slots of each sequence, the new token's included; >= 1
    pages_BJ          int32, the pages of each sequence in order; entries past those that its length
                      needs are never read. None: page b is all of sequence b
    scale, softcap    as in `attention`
    window            only the last `window` valid slots are seen; None: all of them
    impl              see kernels/backend.py; "auto" is eager for fp32; eagerly, pages are copied
    masks             by S and window, filled eagerly for the next layer of the same lengths
    returns           o_BHD, compute dtype
    raises            ValueError: what kernels/attention_decode_triton.py does not take, on a GPU"""
    (B, H, D), scale = q_BHD.shape, q_BHD.shape[2] ** -0.5 if scale is None else scale
    fits = D <= MAX_HEAD_WIDTH and q_BHD.itemsize < 4
    if kernels := kernels_of("attention_decode", impl, q_BHD, fits=fits):
        rule = {"scale": scale, "window": window, "softcap": softcap}
        return kernels.attention_decode_triton(q_BHD, k_PSGD, v_PSGD, lengths_B, pages_BJ, **rule)
    k_BSGD, v_BSGD = k_PSGD, v_PSGD
    if pages_BJ is not None:
        slot_J = torch.arange(pages_BJ.shape[1], device=q_BHD.device) * k_PSGD.shape[1]
        pages_BJ = torch.where(slot_J < lengths_B[:, None], pages_BJ, pages_BJ[:, :1])
        k_BSGD, v_BSGD = (x[pages_BJ].flatten(1, 2) for x in (k_PSGD, v_PSGD))
    S, G = k_BSGD.shape[1:3]
    masks = {} if masks is None else masks
    if (S, window) not in masks:
        slot_S = torch.arange(S, device=q_BHD.device)
        outside_BS = slot_S >= lengths_B[:, None]
        if window is not None:
            outside_BS |= slot_S < lengths_B[:, None] - window
        mask_BS = q_BHD.new_zeros(B, S).masked_fill_(outside_BS, float("-inf"))
        masks[S, window] = mask_BS[:, None, None].expand(-1, G, -1, -1).flatten(0, 1)
    q_ZRD, k_ZDS = q_BHD.reshape(B * G, -1, D), k_BSGD.permute(0, 2, 3, 1).flatten(0, 1)
    scores_ZRS = (torch.baddbmm(masks[S, window], q_ZRD, k_ZDS, alpha=scale) if softcap is None
                  else capped(q_ZRD @ k_ZDS * scale, softcap) + masks[S, window])
    return (scores_ZRS.softmax(-1) @ v_BSGD.transpose(1, 2).flatten(0, 1)).view(B, H, D)

def attention_chunk(q_THD: Tensor, k_SGD: Tensor, v_SGD: Tensor, *, scale: float | None = None,
                    window: int | None = None, softcap: float | None = None,
                    impl: Impl = "auto") -> Tensor:
    """o_THD of a sequence's last T tokens over all its S, as a prompt is read in chunks; the rule
    is that of `attention_decode`, in torch whatever the `impl`."""
    (T, H, D), (S, G, _) = q_THD.shape, k_SGD.shape
    q_GZD = q_THD.view(T, G, H // G, D).permute(1, 2, 0, 3).reshape(G, -1, D)
    q_GZD = q_GZD * (D**-0.5 if scale is None else scale)
    scores_GZS = capped(q_GZD @ k_SGD.permute(1, 2, 0), softcap)
    key_S = torch.arange(S, device=q_THD.device)
    behind_TS = key_S[S - T :, None] - key_S
    hidden_TS = (behind_TS < 0) | (behind_TS >= (S if window is None else window))
    scores_GZS.view(G, -1, T, S).masked_fill_(hidden_TS, float("-inf"))
    wide = torch.promote_types(q_THD.dtype, torch.float32)
    o_GZD = scores_GZS.softmax(-1, dtype=wide).to(v_SGD.dtype) @ v_SGD.transpose(0, 1)
    return o_GZD.view(G, -1, T, D).permute(2, 0, 1, 3).reshape(T, H, D)
