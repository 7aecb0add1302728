"""Attention of one new token per sequence over the keys and values already cached.

Letters: B sequences, H query heads, G key/value heads, D head width, S slots of the cache.

forward     o_b = softmax(scale q_b K_b^T) V_b over the first lengths_b slots of sequence b, or with
            a window over the last `window` of those; with a soft cap, cap tanh(scale q K^T / cap)
cost        4 H D sum_b lengths_b FLOP; reads 2 G D sum_b lengths_b cached values, so memory-bound
layout      one contiguous slab of S slots per sequence: on a CPU, gathering pages costs more than
            ten times the attention itself

No backward: decoding never trains.
"""

import torch
from torch import Tensor


def attention_decode_reference(
    q_BHD: Tensor,
    k_BSGD: Tensor,
    v_BSGD: Tensor,
    lengths_B: Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """The definition, one sequence at a time. In float64 it is the oracle."""
    outputs = []
    heads_per_group = q_BHD.shape[1] // k_BSGD.shape[2]
    for q_HD, k_SGD, v_SGD, length in zip(q_BHD, k_BSGD, v_BSGD, lengths_B.tolist(), strict=True):
        first = 0 if window is None else max(0, length - window)
        k_SHD = k_SGD[first:length].repeat_interleave(heads_per_group, dim=1)
        v_SHD = v_SGD[first:length].repeat_interleave(heads_per_group, dim=1)
        scores_HS = torch.einsum("hd,shd->hs", q_HD, k_SHD) * scale
        if softcap is not None:
            scores_HS = softcap * (scores_HS / softcap).tanh()
        outputs.append(torch.einsum("hs,shd->hd", scores_HS.softmax(-1), v_SHD))
    return torch.stack(outputs)


def attention_decode(
    q_BHD: Tensor,
    k_BSGD: Tensor,
    v_BSGD: Tensor,
    lengths_B: Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """One decoding step of attention over a cache.

    q_BHD             one query per sequence, compute dtype
    k_BSGD, v_BSGD    cached keys and values, same dtype; slots past a length have no effect, but
                      must be finite; no copy is made where memory is laid out (B, G, S, D)
    lengths_B         int64, valid slots of each sequence, the new token's included; >= 1
    scale             factor on the scores; default D ** -0.5
    window            only the last `window` valid slots are seen; None: all of them
    softcap           bounds the scores smoothly to (-softcap, softcap); None: they are not bounded
    returns           o_BHD, compute dtype
    """
    B, H, D = q_BHD.shape
    S, G = k_BSGD.shape[1:3]
    scale = D**-0.5 if scale is None else scale
    q_BGRD = (q_BHD * scale).view(B, G, H // G, D)
    scores_BGRS = q_BGRD @ k_BSGD.permute(0, 2, 3, 1)
    if softcap is not None:
        scores_BGRS = softcap * (scores_BGRS / softcap).tanh()
    slot_S = torch.arange(S, device=q_BHD.device)
    outside_BS = slot_S >= lengths_B[:, None]
    if window is not None:
        outside_BS |= slot_S < lengths_B[:, None] - window
    scores_BGRS = scores_BGRS.masked_fill(outside_BS[:, None, None], float("-inf"))
    o_BGRD = scores_BGRS.softmax(-1) @ v_BSGD.transpose(1, 2)
    return o_BGRD.reshape(B, H, D)
