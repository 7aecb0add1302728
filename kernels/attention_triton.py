"""Attention over a flat stream of documents on a GPU: the op of kernels/attention.py in Triton.

Letters: N tokens of the stream, H query heads, G key/value heads (H a multiple of G), D head width.

forward     s = scale q k^T (soft cap: cap tanh(scale q k^T / cap)), p = softmax(s) over the keys
            that a query sees, o = p v; online over steps of keys, in units of log2:
            p = exp2(s log2(e) - row_max), lse = row_max + log2(row_sum)
backward    delta = rowsum(do o), p = exp2(s log2(e) - lse), dp = do v^T, ds = p (dp - delta)
            (soft cap: ds (1 - tanh^2)), dq = scale ds k; dv = p^T do, dk = scale ds^T q
tiles       A program owns rows of ONE document and one head. `Docs.tiles` tells it which columns
            these rows see, so that no other document's are visited; steps that all of its rows
            see wholly need no mask and run in a loop of their own.
dtypes      q, k, v in bf16, fp16 or fp32; dots in that dtype, fp32 ones by FMA (ieee, no TF32);
            scores, softmax and all accumulators in fp32
determinism dk and dv are summed by the program that owns the keys, over the query heads of their
            group; dq by the one that owns the queries. No atomics: a second run gives equal bits,
            for 7 products backward in place of 5
cost        4 sum_b T_b^2 H D FLOP forward (half of it when causal), 3.5 times that backward; reads
            and writes each stream a few times instead of the T x T scores. Saved for backward:
            q, k, v, o and 4 bytes of lse for each row and head

source      Dao 2023, arXiv:2307.08691; Triton's tutorial 06; Milakov & Gimelshein 2018,
            arXiv:1805.02867
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from kernels.docs import Docs

LOG2_E = math.log2(math.e)
MAX_WIDTH = 256
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Config(NamedTuple):
    """Queries and keys of a step, and how a program runs."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# By kernel, kind of GPU and head width (a power of two; a smaller one takes the next).
CONFIGS: dict[tuple[str, str], dict[int, Config]] = {
    ("fwd", "interpreter"): {MAX_WIDTH: Config(32, 16, 1, 1)},
    ("dq", "interpreter"): {MAX_WIDTH: Config(32, 16, 1, 1)},
    ("dkv", "interpreter"): {MAX_WIDTH: Config(16, 32, 1, 1)},
    ("fwd", "sm_90"): {64: Config(128, 128, 8, 2), 128: Config(128, 128, 8, 2)},
    ("dq", "sm_90"): {64: Config(128, 64, 8, 2), 128: Config(128, 64, 8, 2)},
    ("dkv", "sm_90"): {64: Config(64, 128, 8, 2), 128: Config(64, 128, 8, 2)},
}


def kind_of(device: torch.device, dtype: torch.dtype) -> str:
    """Which rows of `CONFIGS` serve: GPUs of one kind have about the same shared memory.

    returns     "interpreter" on the CPU, "fp32" for that dtype on any GPU, "sm_90" (227 KiB, wgmma),
                "sm_80" (163 KiB) or "sm_120" (99 KiB)
    """
    if device.type == "cpu":
        return "interpreter"
    if dtype == torch.float32:
        return "fp32"
    capability = torch.cuda.get_device_capability(device)
    if capability in ((9, 0), (10, 0), (10, 3)):
        return "sm_90"
    return "sm_80" if capability == (8, 0) else "sm_120"


def config_for(kernel: str, kind: str, width: int) -> Config:
    """The row of `CONFIGS` of the next head width."""
    widths = CONFIGS[kernel, kind]
    return widths[min(known for known in widths if known >= width)]


@triton.jit
def _load_rows(
    base_ptr, row, stride, past,
    D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, IS_MASKED: tl.constexpr,
):  # fmt: skip
    """(BLOCK, BLOCK_D) of one head from `row` on; zero past width D and, if masked, row `past`."""
    offs_r, offs_d = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    # int64 where the product may span the stream; what is added to it spans one tile
    first_ptr = base_ptr + tl.cast(row, tl.int64) * stride
    ptrs = first_ptr + (offs_r[:, None] * stride + offs_d[None, :])
    if IS_MASKED and D != BLOCK_D:
        return tl.load(ptrs, mask=(row + offs_r < past)[:, None] & (offs_d < D)[None, :], other=0.0)
    if IS_MASKED:
        return tl.load(ptrs, mask=(row + offs_r < past)[:, None], other=0.0)
    if D != BLOCK_D:
        return tl.load(ptrs, mask=(offs_d < D)[None, :], other=0.0)
    return tl.load(ptrs)


@triton.jit
def _store_rows(
    base_ptr, tile, row, stride, past,
    D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Undoes `_load_rows`; what stands past width D or row `past` is dropped."""
    offs_r, offs_d = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    first_ptr = base_ptr + tl.cast(row, tl.int64) * stride
    ptrs = first_ptr + (offs_r[:, None] * stride + offs_d[None, :])
    mask = (row + offs_r < past)[:, None] & (offs_d < D)[None, :]
    tl.store(ptrs, tile.to(base_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _sees(offs_q, offs_k, past, window, IS_CAUSAL: tl.constexpr):
    """Which queries see which keys; both are rows of one document, which ends at `past`."""
    sees = (offs_q < past) & (offs_k < past)
    if IS_CAUSAL:
        sees &= offs_q >= offs_k
    if window is not None:
        sees &= offs_q - offs_k < window
        if not IS_CAUSAL:
            sees &= offs_k - offs_q < window
    return sees


@triton.jit
def _tanh(x):
    # numerics: the closed form cancels near 0, where the continued fraction is exact to 1e-9
    square = x * x
    fraction = x * (945 + square * (105 + square)) / (945 + square * (420 + square * 15))
    return tl.where(square < 0.36, fraction, 1 - 2 / (tl.exp2(x * 2.8853900817779268) + 1))


@triton.jit
def _fwd_steps(
    acc, row_max, row_sum, q, k_ptr, v_ptr, offs_m, begin, end, past,
    stride_kn, stride_vn, factor, squash, window,
    IS_CAUSAL: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    IS_MASKED: tl.constexpr,
):  # fmt: skip
    """Softmax and its product with v, taken on over the keys begin .. end - 1."""
    for column in tl.range(begin, end, BLOCK_N):
        k = _load_rows(k_ptr, column, stride_kn, past, D, BLOCK_N, BLOCK_D, IS_MASKED)
        s = tl.dot(q, tl.trans(k), input_precision="ieee")  # (BLOCK_M, BLOCK_N)
        if squash is not None:
            s = _tanh(s * squash)
        if IS_MASKED:
            offs_n = column + tl.arange(0, BLOCK_N)
            s = tl.where(
                _sees(offs_m[:, None], offs_n[None, :], past, window, IS_CAUSAL), s, float("-inf")
            )
        new_max = tl.maximum(row_max, tl.max(s, 1) * factor)
        shift = new_max
        if IS_MASKED:
            # numerics: a row may have seen no key yet, and -inf - -inf would be NaN
            shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        p = tl.exp2(s * factor - shift[:, None])
        decay = tl.exp2(row_max - shift)
        row_sum = row_sum * decay + tl.sum(p, 1)
        v = _load_rows(v_ptr, column, stride_vn, past, D, BLOCK_N, BLOCK_D, IS_MASKED)
        acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
        row_max = new_max
    return acc, row_max, row_sum


@triton.jit
def _attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, tiles_ptr,
    N, stride_qn, stride_kn, stride_vn,
    factor, squash, window,
    GROUP: tl.constexpr, IS_CAUSAL: tl.constexpr, D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """o and lse of BLOCK_M queries of one document and head; grid (tiles, H)."""
    tile_ptr = tiles_ptr + tl.program_id(0) * 6
    row, past = tl.load(tile_ptr), tl.load(tile_ptr + 1)
    first, whole = tl.load(tile_ptr + 2), tl.load(tile_ptr + 3)
    edge, stop = tl.load(tile_ptr + 4), tl.load(tile_ptr + 5)
    head, stride_on = tl.program_id(1), tl.num_programs(1) * D
    k_ptr += head // GROUP * D
    v_ptr += head // GROUP * D

    offs_m = row + tl.arange(0, BLOCK_M)
    q = _load_rows(q_ptr + head * D, row, stride_qn, past, D, BLOCK_M, BLOCK_D, True)
    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    row_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    if window is not None:
        acc, row_max, row_sum = _fwd_steps(
            acc, row_max, row_sum, q, k_ptr, v_ptr, offs_m, first, whole, past,
            stride_kn, stride_vn, factor, squash, window,
            IS_CAUSAL, D, BLOCK_N, BLOCK_D, True,
        )  # fmt: skip
    acc, row_max, row_sum = _fwd_steps(
        acc, row_max, row_sum, q, k_ptr, v_ptr, offs_m, whole, edge, past,
        stride_kn, stride_vn, factor, squash, window,
        IS_CAUSAL, D, BLOCK_N, BLOCK_D, False,
    )  # fmt: skip
    acc, row_max, row_sum = _fwd_steps(
        acc, row_max, row_sum, q, k_ptr, v_ptr, offs_m, edge, stop, past,
        stride_kn, stride_vn, factor, squash, window,
        IS_CAUSAL, D, BLOCK_N, BLOCK_D, True,
    )  # fmt: skip

    lse_ptr += tl.cast(head, tl.int64) * N
    tl.store(lse_ptr + offs_m, row_max + tl.log2(row_sum), mask=offs_m < past)
    o = acc / row_sum[:, None]
    _store_rows(o_ptr + head * D, o, row, stride_on, past, D, BLOCK_M, BLOCK_D)


@triton.jit
def _dq_steps(
    dq, q, do, lse, delta, k_ptr, v_ptr, offs_m, begin, end, past,
    stride_kn, stride_vn, factor, squash, window,
    IS_CAUSAL: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    IS_MASKED: tl.constexpr,
):  # fmt: skip
    """Adds ds k over the keys begin .. end - 1."""
    for column in tl.range(begin, end, BLOCK_N):
        k = _load_rows(k_ptr, column, stride_kn, past, D, BLOCK_N, BLOCK_D, IS_MASKED)
        v = _load_rows(v_ptr, column, stride_vn, past, D, BLOCK_N, BLOCK_D, IS_MASKED)
        s = tl.dot(q, tl.trans(k), input_precision="ieee")  # (BLOCK_M, BLOCK_N)
        dp = tl.dot(do, tl.trans(v), input_precision="ieee")
        if squash is not None:
            s = _tanh(s * squash)
        p = tl.exp2(s * factor - lse[:, None])
        if IS_MASKED:
            offs_n = column + tl.arange(0, BLOCK_N)
            p = tl.where(_sees(offs_m[:, None], offs_n[None, :], past, window, IS_CAUSAL), p, 0.0)
        ds = p * (dp - delta[:, None])
        if squash is not None:
            ds *= 1 - s * s
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    return dq


@triton.jit
def _attention_bwd_dq_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, do_ptr, lse_ptr, delta_ptr, dq_ptr, tiles_ptr,
    N, stride_qn, stride_kn, stride_vn,
    factor, squash, window, scale,
    GROUP: tl.constexpr, IS_CAUSAL: tl.constexpr, D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dq and delta of BLOCK_M queries of one document and head; grid (tiles, H)."""
    tile_ptr = tiles_ptr + tl.program_id(0) * 6
    row, past = tl.load(tile_ptr), tl.load(tile_ptr + 1)
    first, whole = tl.load(tile_ptr + 2), tl.load(tile_ptr + 3)
    edge, stop = tl.load(tile_ptr + 4), tl.load(tile_ptr + 5)
    head, stride_on = tl.program_id(1), tl.num_programs(1) * D
    k_ptr += head // GROUP * D
    v_ptr += head // GROUP * D

    offs_m = row + tl.arange(0, BLOCK_M)
    q = _load_rows(q_ptr + head * D, row, stride_qn, past, D, BLOCK_M, BLOCK_D, True)
    do = _load_rows(do_ptr + head * D, row, stride_on, past, D, BLOCK_M, BLOCK_D, True)
    o = _load_rows(o_ptr + head * D, row, stride_on, past, D, BLOCK_M, BLOCK_D, True)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    head_offset = tl.cast(head, tl.int64) * N
    tl.store(delta_ptr + head_offset + offs_m, delta, mask=offs_m < past)
    lse = tl.load(lse_ptr + head_offset + offs_m, mask=offs_m < past, other=0.0)

    dq = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    if window is not None:
        dq = _dq_steps(
            dq, q, do, lse, delta, k_ptr, v_ptr, offs_m, first, whole, past,
            stride_kn, stride_vn, factor, squash, window,
            IS_CAUSAL, D, BLOCK_N, BLOCK_D, True,
        )  # fmt: skip
    dq = _dq_steps(
        dq, q, do, lse, delta, k_ptr, v_ptr, offs_m, whole, edge, past,
        stride_kn, stride_vn, factor, squash, window,
        IS_CAUSAL, D, BLOCK_N, BLOCK_D, False,
    )  # fmt: skip
    dq = _dq_steps(
        dq, q, do, lse, delta, k_ptr, v_ptr, offs_m, edge, stop, past,
        stride_kn, stride_vn, factor, squash, window,
        IS_CAUSAL, D, BLOCK_N, BLOCK_D, True,
    )  # fmt: skip
    _store_rows(dq_ptr + head * D, dq * scale, row, stride_on, past, D, BLOCK_M, BLOCK_D)


@triton.jit
def _dkv_steps(
    dk, dv, k, v, q_ptr, do_ptr, lse_ptr, delta_ptr, offs_n, begin, end, past,
    stride_qn, stride_on, factor, squash, window,
    IS_CAUSAL: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    IS_MASKED: tl.constexpr,
):  # fmt: skip
    """Adds p^T do and ds^T q over the queries begin .. end - 1; scores stand transposed."""
    for row in tl.range(begin, end, BLOCK_M):
        offs_m = row + tl.arange(0, BLOCK_M)
        q = _load_rows(q_ptr, row, stride_qn, past, D, BLOCK_M, BLOCK_D, IS_MASKED)
        do = _load_rows(do_ptr, row, stride_on, past, D, BLOCK_M, BLOCK_D, IS_MASKED)
        if IS_MASKED:
            lse = tl.load(lse_ptr + offs_m, mask=offs_m < past, other=0.0)
            delta = tl.load(delta_ptr + offs_m, mask=offs_m < past, other=0.0)
        else:
            lse, delta = tl.load(lse_ptr + offs_m), tl.load(delta_ptr + offs_m)
        s = tl.dot(k, tl.trans(q), input_precision="ieee")  # (BLOCK_N, BLOCK_M)
        if squash is not None:
            s = _tanh(s * squash)
        p = tl.exp2(s * factor - lse[None, :])
        if IS_MASKED:
            p = tl.where(_sees(offs_m[None, :], offs_n[:, None], past, window, IS_CAUSAL), p, 0.0)
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
        dp = tl.dot(v, tl.trans(do), input_precision="ieee")
        ds = p * (dp - delta[None, :])
        if squash is not None:
            ds *= 1 - s * s
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit
def _attention_bwd_dkv_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, tiles_ptr,
    N, stride_qn, stride_kn, stride_vn,
    factor, squash, window, scale,
    GROUP: tl.constexpr, IS_CAUSAL: tl.constexpr, D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dk and dv of BLOCK_N keys of one document and key head; grid (tiles, G)."""
    tile_ptr = tiles_ptr + tl.program_id(0) * 6
    row, past = tl.load(tile_ptr), tl.load(tile_ptr + 1)
    first, whole = tl.load(tile_ptr + 2), tl.load(tile_ptr + 3)
    edge, stop = tl.load(tile_ptr + 4), tl.load(tile_ptr + 5)
    key_head, stride_dn = tl.program_id(1), tl.num_programs(1) * D
    stride_on = stride_dn * GROUP

    offs_n = row + tl.arange(0, BLOCK_N)
    k = _load_rows(k_ptr + key_head * D, row, stride_kn, past, D, BLOCK_N, BLOCK_D, True)
    v = _load_rows(v_ptr + key_head * D, row, stride_vn, past, D, BLOCK_N, BLOCK_D, True)
    dk = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    for head in range(key_head * GROUP, key_head * GROUP + GROUP):
        q_head_ptr, do_head_ptr = q_ptr + head * D, do_ptr + head * D
        lse_head_ptr = lse_ptr + tl.cast(head, tl.int64) * N
        delta_head_ptr = delta_ptr + tl.cast(head, tl.int64) * N
        if window is not None or IS_CAUSAL:
            dk, dv = _dkv_steps(
                dk, dv, k, v, q_head_ptr, do_head_ptr, lse_head_ptr, delta_head_ptr,
                offs_n, first, whole, past, stride_qn, stride_on, factor, squash, window,
                IS_CAUSAL, D, BLOCK_M, BLOCK_D, True,
            )  # fmt: skip
        dk, dv = _dkv_steps(
            dk, dv, k, v, q_head_ptr, do_head_ptr, lse_head_ptr, delta_head_ptr,
            offs_n, whole, edge, past, stride_qn, stride_on, factor, squash, window,
            IS_CAUSAL, D, BLOCK_M, BLOCK_D, False,
        )  # fmt: skip
        dk, dv = _dkv_steps(
            dk, dv, k, v, q_head_ptr, do_head_ptr, lse_head_ptr, delta_head_ptr,
            offs_n, edge, stop, past, stride_qn, stride_on, factor, squash, window,
            IS_CAUSAL, D, BLOCK_M, BLOCK_D, True,
        )  # fmt: skip
    _store_rows(dk_ptr + key_head * D, dk * scale, row, stride_dn, past, D, BLOCK_N, BLOCK_D)
    _store_rows(dv_ptr + key_head * D, dv, row, stride_dn, past, D, BLOCK_N, BLOCK_D)


KERNELS = {
    "fwd": _attention_fwd_kernel,
    "dq": _attention_bwd_dq_kernel,
    "dkv": _attention_bwd_dkv_kernel,
}


@dataclass(frozen=True)
class _Rule:
    """The settings of `attention_triton`, `scale` resolved."""

    is_causal: bool
    scale: float
    window: int | None
    softcap: float | None

    @property
    def squash(self) -> float | None:
        """What a score is multiplied by before the tanh of the soft cap."""
        return None if self.softcap is None else self.scale / self.softcap

    @property
    def factor(self) -> float:
        """What a product of q and k, or its tanh, is multiplied by to be in units of log2."""
        return LOG2_E * (self.scale if self.softcap is None else self.softcap)


def _launch(name: str, tensors: list[Tensor], docs: Docs, rule: _Rule, **numbers: float) -> None:
    """Runs a kernel over the tiles of `docs`; its tensors begin with q, k and v."""
    q_NHD, k_NGD, v_NGD = tensors[:3]
    (N, H, D), G = q_NHD.shape, k_NGD.shape[1]
    config = config_for(name, kind_of(q_NHD.device, q_NHD.dtype), D)
    blocks = config.block_m, config.block_n
    back = docs.num_tokens if rule.window is None else rule.window - 1
    ahead = 0 if rule.is_causal else back
    if name == "dkv":  # rows are keys, columns the queries that see them
        tiles, heads = docs.tiles(*blocks[::-1], back=ahead, ahead=back), G
    else:
        tiles, heads = docs.tiles(*blocks, back=back, ahead=ahead), H
    with torch.cuda.device_of(q_NHD):
        KERNELS[name][len(tiles), heads](
            *tensors,
            tiles,
            N,
            *(x.stride(0) for x in (q_NHD, k_NGD, v_NGD)),
            rule.factor,
            rule.squash,
            rule.window,
            **numbers,
            GROUP=H // G,
            IS_CAUSAL=rule.is_causal,
            D=D,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_D=block_d(D),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )


def block_d(D: int) -> int:
    """The width that a tile of D columns has; a dot needs 16."""
    return max(16, triton.next_power_of_2(D))


def _packed(x_NHD: Tensor) -> Tensor:
    """x itself where its heads lie side by side, as in a part of a fused projection; or a copy."""
    return x_NHD if x_NHD.stride()[1:] == (x_NHD.shape[2], 1) else x_NHD.contiguous()


def _stream(x_NHD: Tensor, docs: Docs) -> Tensor:
    """A stream of x's shape for a kernel to fill; zero past the documents."""
    y_NHD = torch.empty(x_NHD.shape, dtype=x_NHD.dtype, device=x_NHD.device)
    if len(y_NHD) > docs.num_tokens:
        y_NHD[docs.num_tokens :].zero_()
    return y_NHD


def _check(q_NHD: Tensor, k_NGD: Tensor, v_NGD: Tensor, docs: Docs, rule: _Rule) -> None:
    """Every ValueError of `attention_triton`."""
    (N, H, D), G = q_NHD.shape, k_NGD.shape[1]
    if N not in (docs.num_tokens, docs.num_rows) or k_NGD.shape[0] != N:
        raise ValueError(
            f"docs plans {docs.num_tokens} tokens in {docs.num_rows} rows, q has {N},"
            f" k {k_NGD.shape[0]}"
        )
    if H % G:
        raise ValueError(f"{H} query heads are not a multiple of {G} key heads")
    if k_NGD.shape != v_NGD.shape or k_NGD.shape[2] != D:
        raise ValueError(
            f"q is {tuple(q_NHD.shape)}, k {tuple(k_NGD.shape)}, v {tuple(v_NGD.shape)}: k and v"
            " must be of one shape and q of their head width"
        )
    if D > MAX_WIDTH:
        raise ValueError(f"head width {D}: at most {MAX_WIDTH} here; kernels.attention has no limit")
    dtypes = [x.dtype for x in (q_NHD, k_NGD, v_NGD)]
    if len(set(dtypes)) > 1 or dtypes[0] not in DTYPES:
        raise ValueError(f"dtypes {dtypes}: cast q, k and v to one of {DTYPES}")
    devices = [x.device for x in (q_NHD, k_NGD, v_NGD, docs.cu_seqlens_B1)]
    if len(set(devices)) > 1:
        raise ValueError(f"q, k, v and docs are on {devices}: move them to one device")
    if devices[0].type != "cuda" and isinstance(KERNELS["fwd"], triton.JITFunction):
        raise ValueError(f"Triton does not run on {devices[0]}: use kernels.attention there")
    for name, value in (
        ("scale", rule.scale), ("window", rule.window), ("softcap", rule.softcap)
    ):  # fmt: skip
        if value is not None and not value > 0:
            raise ValueError(f"{name} = {value}: must be > 0")


class _Attention(torch.autograd.Function):
    """The steps at the head of this file; p is formed anew in backward."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, q_NHD: Tensor, k_NGD: Tensor, v_NGD: Tensor, docs: Docs, rule: _Rule
    ) -> Tensor:
        q_NHD, k_NGD, v_NGD = _packed(q_NHD), _packed(k_NGD), _packed(v_NGD)
        o_NHD = _stream(q_NHD, docs)
        lse_HN = q_NHD.new_empty(q_NHD.shape[1], len(q_NHD), dtype=torch.float32)
        _launch("fwd", [q_NHD, k_NGD, v_NGD, o_NHD, lse_HN], docs, rule)
        ctx.save_for_backward(q_NHD, k_NGD, v_NGD, o_NHD, lse_HN)
        ctx.docs, ctx.rule = docs, rule
        return o_NHD

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, do_NHD: Tensor) -> tuple[Tensor | None, ...]:
        q_NHD, k_NGD, v_NGD, o_NHD, lse_HN = ctx.saved_tensors
        do_NHD, delta_HN = do_NHD.contiguous(), torch.empty_like(lse_HN)
        dq_NHD, dk_NGD, dv_NGD = (_stream(x, ctx.docs) for x in (q_NHD, k_NGD, v_NGD))
        scale = {"scale": ctx.rule.scale}
        streams = [q_NHD, k_NGD, v_NGD]
        # in this order: the first finds the delta that the second reads
        _launch(
            "dq", [*streams, o_NHD, do_NHD, lse_HN, delta_HN, dq_NHD], ctx.docs, ctx.rule, **scale
        )
        if any(ctx.needs_input_grad[1:3]):
            kept = [do_NHD, lse_HN, delta_HN, dk_NGD, dv_NGD]
            _launch("dkv", [*streams, *kept], ctx.docs, ctx.rule, **scale)
        return dq_NHD, dk_NGD, dv_NGD, None, None


def attention_triton(
    q_NHD: Tensor,
    k_NGD: Tensor,
    v_NGD: Tensor,
    docs: Docs,
    *,
    is_causal: bool,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """`attention` of kernels/attention.py, with its arguments and its meaning, on a GPU.

    q_NHD           queries; bf16, fp16 or fp32; D at most 256
    k_NGD, v_NGD    keys and values, same dtype and D; H must be a multiple of G
    docs            on the same device
    scale, window,  as there, and all > 0
    softcap
    returns         o_NHD, compute dtype; zero in rows past the documents
    raises          ValueError: sizes, dtypes or devices that differ or are none of these
    """
    D = q_NHD.shape[2]
    rule = _Rule(is_causal, D**-0.5 if scale is None else scale, window, softcap)
    _check(q_NHD, k_NGD, v_NGD, docs, rule)
    return _Attention.apply(q_NHD, k_NGD, v_NGD, docs, rule)
