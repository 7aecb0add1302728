"""Attention of one new token per sequence on a GPU. Equations and letters are those of
kernels/attention_decode.py; also R = H / G, and X shares of the slots that a sequence sees.

split     X programs, which read the length on the device, each give o_x and lse_x, in log2, of one
          share; o = sum_x w_x o_x / sum_x w_x, w_x = exp2(lse_x - max lse_x)
dtypes    q, k, v in bf16, fp16 or fp32, which dots take (fp32: no TF32); all else is in fp32
cost      reads 2 G D values per slot seen, once per 32 of the R heads; writes X H D sums in fp32
source    Dao et al. 2023, flash-decoding; Kwon et al. 2023, PagedAttention, arXiv:2309.06180"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from kernels import launch
from kernels.attention_triton import LOG2_E, dot_width
from kernels.cross_entropy_triton import tanh

# What registers hold of shares and of heads; slots of a page that is all of a sequence, at most.
MAX_SPLITS, MAX_ROWS, SLAB = 64, 32, 1 << 30

@triton.jit(do_not_specialize=["capacity"])
def _attention_decode_kernel(
    q_ptr, k_ptr, v_ptr, lengths_ptr, pages_ptr, o_ptr, lse_ptr, capacity, factor, squash, window,
    stride_kp, stride_ks, stride_kg, stride_kd, stride_vp, stride_vs, stride_vg, stride_vd,
    R: tl.constexpr, S: tl.constexpr, D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """o and lse of one share of the slots, for BLOCK_R heads; grid (B, G ceil(R / BLOCK_R), X)."""
    sequence, split, num_splits = tl.program_id(0), tl.program_id(2), tl.num_programs(2)
    num_tiles: tl.constexpr = (R + BLOCK_R - 1) // BLOCK_R
    group = tl.cast(tl.program_id(1) // num_tiles, tl.int64)
    offs_r = tl.program_id(1) % num_tiles * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_s, offs_d = tl.arange(0, BLOCK_S), tl.arange(0, dot_width(D))
    in_r, in_d = (offs_r < R)[:, None], (offs_d < D)[None, :]
    head = (sequence * (tl.num_programs(1) // num_tiles) + group) * R + offs_r[:, None]
    q = tl.load(q_ptr + head * D + offs_d, mask=in_r & in_d, other=0.0)  # (BLOCK_R, width)
    length = tl.minimum(tl.load(lengths_ptr + sequence), capacity).to(tl.int32)
    first = 0 if window is None else tl.maximum(length - window, 0)
    share = tl.cdiv(tl.cdiv(length - first, BLOCK_S), num_splits) * BLOCK_S
    begin = first + split * share
    # numerics: past the end the last slot again, since others may hold NaN or have no page
    slot = tl.minimum(begin + offs_s, length - 1)
    row_ptr = None if pages_ptr is None else pages_ptr + sequence * (capacity // S)
    page = sequence if row_ptr is None else tl.load(row_ptr + slot // S)
    acc = tl.zeros([BLOCK_R, dot_width(D)], tl.float32)
    row_sum = tl.zeros([BLOCK_R, 1], tl.float32)
    row_max = row_sum - float("inf")
    for step in tl.range(begin, tl.minimum(begin + share, length), BLOCK_S):
        page_64, slot_64 = tl.cast(page, tl.int64), (slot % S).to(tl.int64)
        # cost: found a step ahead, as a load that waits for another one is not begun early
        slot = tl.minimum(step + BLOCK_S + offs_s, length - 1)
        page = sequence if row_ptr is None else tl.load(row_ptr + slot // S)
        k_offs = (page_64 * stride_kp + slot_64 * stride_ks + group * stride_kg)[:, None]
        k = tl.load(k_ptr + k_offs + offs_d * stride_kd, mask=in_d, other=0.0)  # (BLOCK_S, width)
        s = tl.dot(q, tl.trans(k), input_precision="ieee")
        if squash is not None:
            s = tanh(s * squash)
        s = tl.where((step + offs_s < length)[None, :], s * factor, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(s, 1, keep_dims=True))
        p, decay = tl.exp2(s - new_max), tl.exp2(row_max - new_max)
        row_sum = row_sum * decay + tl.sum(p, 1, keep_dims=True)
        v_offs = (page_64 * stride_vp + slot_64 * stride_vs + group * stride_vg)[:, None]
        v = tl.load(v_ptr + v_offs + offs_d * stride_vd, mask=in_d, other=0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * decay, input_precision="ieee")
        row_max = new_max
    part = head * num_splits + split  # with no slot left: lse = -inf, and o is not read
    tl.store(lse_ptr + part, row_max + tl.log2(row_sum), mask=in_r)
    tl.store(o_ptr + part * D + offs_d, acc / row_sum, mask=in_r & in_d)

@triton.jit
def _attention_decode_sum_kernel(o_ptr, lse_ptr, y_ptr, D: tl.constexpr, X: tl.constexpr):
    """One head's o from those of its shares; grid (B H)."""
    head, offs_d = tl.program_id(0).to(tl.int64), tl.arange(0, dot_width(D))
    part = head * X + tl.arange(0, X)[:, None]
    lse = tl.load(lse_ptr + part)
    weight = tl.exp2(lse - tl.max(lse))
    o = tl.load(o_ptr + part * D + offs_d, mask=(weight > 0) & (offs_d < D), other=0.0)
    y = tl.sum(o * weight, 0) / tl.sum(weight)
    tl.store(y_ptr + head * D + offs_d, y.to(y_ptr.dtype.element_ty), mask=offs_d < D)

def attention_decode_triton(q_BHD: Tensor, k_PSGD: Tensor, v_PSGD: Tensor, lengths_B: Tensor,
                            pages_BJ: Tensor | None, *, scale: float, window: int | None,
                            softcap: float | None) -> Tensor:
    """`attention_decode` by the kernels, and its ValueErrors; unseen slots may hold anything."""
    (B, H, D), (P, S, G, _), device = q_BHD.shape, k_PSGD.shape, q_BHD.device
    if H % G:
        raise ValueError(f"{H} query heads are not a multiple of {G} key heads")
    launch.check(device, (B if pages_BJ is None else P, S, G, D), q_BHD.dtype, k=k_PSGD, v=v_PSGD)
    launch.check(device, (B,), torch.int64, lengths=lengths_B)
    capacity, page_size = S, SLAB
    if pages_BJ is not None:
        launch.check(device, (B, pages_BJ.shape[-1]), torch.int32, pages=pages_BJ)
        capacity, page_size, pages_BJ = S * pages_BJ.shape[1], S, pages_BJ.contiguous()
    block_r = min(MAX_ROWS, dot_width(R := H // G))
    programs = B * (tiles := G * triton.cdiv(R, block_r))
    config = dict(launch.config_of("attention_decode", D * q_BHD.element_size(), device))
    tasks = programs * triton.cdiv(capacity, config["BLOCK_S"])
    fill = launch.num_programs(tasks, config.pop("PER_SM"), device)
    X = min(MAX_SPLITS, triton.next_power_of_2(triton.cdiv(fill, max(1, programs))))
    o_BHXD, lse_BHX1 = (q_BHD.new_empty(B, H, X, n, dtype=torch.float32) for n in (D, 1))
    y_BHD = torch.empty(B, H, D, dtype=q_BHD.dtype, device=device)
    with torch.cuda.device_of(q_BHD):
        _attention_decode_kernel[B, tiles, X](
            q_BHD.contiguous(), k_PSGD, v_PSGD, lengths_B.contiguous(), pages_BJ, o_BHXD, lse_BHX1,
            capacity, LOG2_E * (softcap or scale), None if softcap is None else scale / softcap,
            window, *k_PSGD.stride(), *v_PSGD.stride(),
            R=R, S=page_size, D=D, BLOCK_R=block_r, **config)
        _attention_decode_sum_kernel[(B * H,)](o_BHXD, lse_BHX1, y_BHD, D=D, X=X)
    return y_BHD
