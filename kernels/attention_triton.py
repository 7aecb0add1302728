"""Attention over a flat stream of documents on a GPU; equations and letters are those of
kernels/attention.py.

forward     online over steps of keys, in units of log2: p = exp2(s log2(e) - row_max), and
            lse = row_max + log2(row_sum)
backward    p = exp2(s log2(e) - lse) is formed anew, delta = rowsum(do o)
tiles       A program owns rows of ONE document and one head. `Docs.tiles` tells it which columns
            these rows see, so that no other document's are visited; steps that all of its rows
            see wholly need no mask and run in a loop of their own.
dtypes      q, k, v in bf16, fp16 or fp32, which dots take (fp32: no TF32); all else is in fp32
determinism dk and dv are summed by the program that owns the keys, over the query heads of their
            group, dq by the one that owns the queries: no atomics, but 7 products in place of 5
cost        backward 3.5 times the FLOP of forward, each half as much when causal; the T x T scores
            are never stored. Saved for backward: q, k, v, o, and lse in fp32
source      Dao 2023, arXiv:2307.08691; Milakov & Gimelshein 2018, arXiv:1805.02867"""

import math
import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from triton.tools.tensor_descriptor import TensorDescriptor
from kernels import launch
from kernels.attention import Rule
from kernels.cross_entropy_triton import tanh
from kernels.docs import Docs

LOG2_E = math.log2(math.e)

@triton.constexpr_function
def dot_width(D: int) -> int:
    """The width of a tile of D columns; a dot needs 16."""
    return max(16, triton.next_power_of_2(D))

@triton.jit
def _load_rows(source, row, past, D: tl.constexpr, BLOCK: tl.constexpr, IS_EDGE: tl.constexpr):
    """BLOCK rows of one head from `row` on; at an edge, the last one again from row `past` on.

    source      stream, its descriptor (TMA) or None, its stride, and the head's first column"""
    ptr, desc, stride, column = source
    offs_r, offs_d = tl.arange(0, BLOCK), tl.arange(0, dot_width(D))
    if IS_EDGE:
        # cost: takes fewer registers than a mask and a value for what it hides
        offs_r = tl.minimum(offs_r, past - 1 - row)
    # int64 where the product may span the stream; what is added to it spans one tile
    ptrs = ptr + tl.cast(row, tl.int64) * stride + column
    ptrs += offs_r[:, None] * stride + offs_d[None, :]
    if dot_width(D) != D:
        rows = tl.load(ptrs, mask=(offs_d < D)[None, :], other=0.0)
    elif desc is None or IS_EDGE:
        rows = tl.load(ptrs)
    else:
        rows = desc.load([row, column])
    return rows

@triton.jit
def _store_rows(ptr, rows, row, stride, past, D: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK rows of one head from `row` on; drops what stands past width D or row `past`."""
    offs_r, offs_d = tl.arange(0, BLOCK), tl.arange(0, dot_width(D))
    ptrs = ptr + tl.cast(row, tl.int64) * stride + (offs_r[:, None] * stride + offs_d[None, :])
    mask = (row + offs_r < past)[:, None] & (offs_d < D)[None, :]
    tl.store(ptrs, rows.to(ptr.dtype.element_ty), mask=mask)

@triton.jit
def _sees(offs_q, offs_k, inside, window, IS_CAUSAL: tl.constexpr):
    """Which queries see which keys of their document, of those that are inside it."""
    if IS_CAUSAL:
        inside = inside & (offs_q >= offs_k)
    if window is not None:
        inside = inside & (tl.abs(offs_q - offs_k) < window)
    return inside

@triton.jit
def _load_tile(tiles_ptr):
    """This program's first row, and the rest of its line of the table that `Docs.tiles` made."""
    ptr = tiles_ptr + tl.program_id(0) * 6
    past, first, whole = tl.load(ptr + 1), tl.load(ptr + 2), tl.load(ptr + 3)
    return tl.load(ptr), (past, first, whole, tl.load(ptr + 4), tl.load(ptr + 5))

@triton.jit
def _fwd_steps(acc, row_max, row_sum, q, k_source, v_source, offs_m, tile, factor, squash, window,
               IS_CAUSAL: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr,
               IS_EDGE: tl.constexpr):
    """Softmax and its product with v, taken on over the keys of the whole steps or the edges."""
    past, first, whole, edge, stop = tile
    begin, end = (first, stop - (edge - whole)) if IS_EDGE else (whole, edge)
    for step in tl.range(begin, end, BLOCK_N):
        column = step + tl.where(step >= whole, edge - whole, 0) if IS_EDGE else step
        k = _load_rows(k_source, column, past, D, BLOCK_N, IS_EDGE)
        s = tl.dot(q, tl.trans(k), input_precision="ieee")  # (BLOCK_M, BLOCK_N)
        if squash is not None:
            s = tanh(s * squash)
        if IS_EDGE:
            offs_n = column + tl.arange(0, BLOCK_N)
            inside = (offs_n < past)[None, :]
            sees = _sees(offs_m[:, None], offs_n[None, :], inside, window, IS_CAUSAL)
            s = tl.where(sees, s, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(s, 1) * factor)
        shift = new_max
        if IS_EDGE:
            # numerics: a row may have seen no key yet, and -inf - -inf would be NaN
            shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        p = tl.exp2(s * factor - shift[:, None])
        decay = tl.exp2(row_max - shift)
        row_sum = row_sum * decay + tl.sum(p, 1)
        v = _load_rows(v_source, column, past, D, BLOCK_N, IS_EDGE)
        acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
        row_max = new_max
    return acc, row_max, row_sum

@triton.jit(do_not_specialize=["N"])
def _attention_fwd_kernel(q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, tiles_ptr, k_desc, v_desc, N,
                          stride_qn, stride_kn, stride_vn, factor, squash, window,
                          GROUP: tl.constexpr, IS_CAUSAL: tl.constexpr, D: tl.constexpr,
                          BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """o and lse of BLOCK_M queries of one document and head; grid (tiles, H)."""
    row, tile = _load_tile(tiles_ptr)
    past, head = tile[0], tl.program_id(1)
    k_source = (k_ptr, k_desc, stride_kn, head // GROUP * D)
    v_source = (v_ptr, v_desc, stride_vn, head // GROUP * D)

    offs_m = row + tl.arange(0, BLOCK_M)
    q = _load_rows((q_ptr, None, stride_qn, head * D), row, past, D, BLOCK_M, True)
    acc = tl.zeros([BLOCK_M, dot_width(D)], dtype=tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    row_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    for is_edge in tl.static_range(2):
        acc, row_max, row_sum = _fwd_steps(acc, row_max, row_sum, q, k_source, v_source, offs_m,
                                           tile, factor, squash, window, IS_CAUSAL, D, BLOCK_N,
                                           is_edge)

    rows = tl.cast(head, tl.int64) * N + offs_m
    tl.store(lse_ptr + rows, row_max + tl.log2(row_sum), mask=offs_m < past)
    o, stride_on = acc / row_sum[:, None], tl.num_programs(1) * D
    _store_rows(o_ptr + head * D, o, row, stride_on, past, D, BLOCK_M)

@triton.jit
def _dq_steps(dq, q, do, lse, delta, k_source, v_source, offs_m, tile, factor, squash, window,
              IS_CAUSAL: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr,
              IS_EDGE: tl.constexpr):
    """Adds ds k over the keys of the whole steps or the edges."""
    past, first, whole, edge, stop = tile
    begin, end = (first, stop - (edge - whole)) if IS_EDGE else (whole, edge)
    for step in tl.range(begin, end, BLOCK_N):
        column = step + tl.where(step >= whole, edge - whole, 0) if IS_EDGE else step
        k = _load_rows(k_source, column, past, D, BLOCK_N, IS_EDGE)
        v = _load_rows(v_source, column, past, D, BLOCK_N, IS_EDGE)
        s = tl.dot(q, tl.trans(k), input_precision="ieee")  # (BLOCK_M, BLOCK_N)
        dp = tl.dot(do, tl.trans(v), input_precision="ieee")
        if squash is not None:
            s = tanh(s * squash)
        p = tl.exp2(s * factor - lse[:, None])
        if IS_EDGE:
            offs_n = column + tl.arange(0, BLOCK_N)
            inside = (offs_n < past)[None, :]
            p = tl.where(_sees(offs_m[:, None], offs_n[None, :], inside, window, IS_CAUSAL), p, 0.0)
        ds = p * (dp - delta[:, None])
        if squash is not None:
            ds *= 1 - s * s
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    return dq

@triton.jit(do_not_specialize=["N"])
def _attention_bwd_dq_kernel(q_ptr, k_ptr, v_ptr, o_ptr, do_ptr, lse_ptr, stats_ptr, dq_ptr,
                             tiles_ptr, k_desc, v_desc, N, stride_qn, stride_kn, stride_vn, factor,
                             squash, window, scale, GROUP: tl.constexpr, IS_CAUSAL: tl.constexpr,
                             D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """dq of BLOCK_M queries of one document and head, and their lse and delta; grid (tiles, H)."""
    row, tile = _load_tile(tiles_ptr)
    past, head, H = tile[0], tl.program_id(1), tl.num_programs(1)
    k_source = (k_ptr, k_desc, stride_kn, head // GROUP * D)
    v_source = (v_ptr, v_desc, stride_vn, head // GROUP * D)

    offs_m = row + tl.arange(0, BLOCK_M)
    q = _load_rows((q_ptr, None, stride_qn, head * D), row, past, D, BLOCK_M, True)
    do = _load_rows((do_ptr, None, H * D, head * D), row, past, D, BLOCK_M, True)
    o = _load_rows((o_ptr, None, H * D, head * D), row, past, D, BLOCK_M, True)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    rows = tl.cast(head, tl.int64) * N + offs_m
    lse = tl.load(lse_ptr + rows, mask=offs_m < past, other=0.0)
    tl.store(stats_ptr + rows * 2, lse, mask=offs_m < past)
    tl.store(stats_ptr + rows * 2 + 1, delta, mask=offs_m < past)

    dq = tl.zeros([BLOCK_M, dot_width(D)], dtype=tl.float32)
    for is_edge in tl.static_range(2):
        dq = _dq_steps(dq, q, do, lse, delta, k_source, v_source, offs_m, tile, factor, squash,
                       window, IS_CAUSAL, D, BLOCK_N, is_edge)
    _store_rows(dq_ptr + head * D, dq * scale, row, H * D, past, D, BLOCK_M)

@triton.jit
def _load_stats(stats_ptr, row, past, BLOCK: tl.constexpr, IS_EDGE: tl.constexpr):
    """lse and delta of BLOCK rows of one head, as `_load_rows` loads them."""
    offs_r = tl.arange(0, BLOCK)
    if IS_EDGE:
        offs_r = tl.minimum(offs_r, past - 1 - row)
    part = tl.arange(0, 2)[None, :]
    pairs = tl.load(stats_ptr + row * 2 + (offs_r[:, None] * 2 + part))
    # cost: a sum keeps the load as it is; loaded apart or split, each thread would load the words
    # that it needs, and that other threads need too, one by one
    return tl.sum(tl.where(part == 0, pairs, 0.0), 1), tl.sum(tl.where(part == 1, pairs, 0.0), 1)

@triton.jit
def _dkv_steps(dk, dv, k, v, q_source, do_source, stats_ptr, offs_n, tile, factor, squash, window,
               IS_CAUSAL: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr,
               IS_EDGE: tl.constexpr):
    """Adds ds^T q and p^T do over the queries of the whole steps or the edges; s is transposed."""
    past, first, whole, edge, stop = tile
    begin, end = (first, stop - (edge - whole)) if IS_EDGE else (whole, edge)
    for step in tl.range(begin, end, BLOCK_M):
        row = step + tl.where(step >= whole, edge - whole, 0) if IS_EDGE else step
        q = _load_rows(q_source, row, past, D, BLOCK_M, IS_EDGE)
        do = _load_rows(do_source, row, past, D, BLOCK_M, IS_EDGE)
        lse, delta = _load_stats(stats_ptr, row, past, BLOCK_M, IS_EDGE)
        s = tl.dot(k, tl.trans(q), input_precision="ieee")  # (BLOCK_N, BLOCK_M)
        if squash is not None:
            s = tanh(s * squash)
        p = tl.exp2(s * factor - lse[None, :])
        if IS_EDGE:
            offs_m = row + tl.arange(0, BLOCK_M)
            inside = (offs_m < past)[None, :]
            p = tl.where(_sees(offs_m[None, :], offs_n[:, None], inside, window, IS_CAUSAL), p, 0.0)
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
        ds = p * (tl.dot(v, tl.trans(do), input_precision="ieee") - delta[None, :])
        if squash is not None:
            ds *= 1 - s * s
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv

@triton.jit(do_not_specialize=["N"])
def _attention_bwd_dkv_kernel(q_ptr, k_ptr, v_ptr, do_ptr, stats_ptr, dk_ptr, dv_ptr, tiles_ptr,
                              q_desc, do_desc, N, stride_qn, stride_kn, stride_vn, factor, squash,
                              window, scale, GROUP: tl.constexpr, IS_CAUSAL: tl.constexpr,
                              D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """dk and dv of BLOCK_N keys of one document and key head; grid (tiles, G)."""
    row, tile = _load_tile(tiles_ptr)
    past, key_head, stride_dn = tile[0], tl.program_id(1), tl.num_programs(1) * D

    offs_n = row + tl.arange(0, BLOCK_N)
    k = _load_rows((k_ptr, None, stride_kn, key_head * D), row, past, D, BLOCK_N, True)
    v = _load_rows((v_ptr, None, stride_vn, key_head * D), row, past, D, BLOCK_N, True)
    dk = tl.zeros([BLOCK_N, dot_width(D)], dtype=tl.float32)
    dv = tl.zeros([BLOCK_N, dot_width(D)], dtype=tl.float32)
    for head in range(key_head * GROUP, key_head * GROUP + GROUP):
        q_source = (q_ptr, q_desc, stride_qn, head * D)
        do_source = (do_ptr, do_desc, stride_dn * GROUP, head * D)
        head_stats_ptr = stats_ptr + tl.cast(head, tl.int64) * N * 2
        for is_edge in tl.static_range(2):
            dk, dv = _dkv_steps(dk, dv, k, v, q_source, do_source, head_stats_ptr, offs_n, tile,
                                factor, squash, window, IS_CAUSAL, D, BLOCK_M, is_edge)
    _store_rows(dk_ptr + key_head * D, dk * scale, row, stride_dn, past, D, BLOCK_N)
    _store_rows(dv_ptr + key_head * D, dv, row, stride_dn, past, D, BLOCK_N)

def _launch(kernel: triton.JITFunction, name: str, tensors: list[Tensor], docs: Docs, rule: Rule,
            **numbers: float) -> None:
    """Runs a kernel over the tiles of `docs`; its tensors begin with q, k and v."""
    q_NHD, k_NGD, v_NGD, do_NHD = tensors[:4]
    (N, H, D), G = q_NHD.shape, k_NGD.shape[1]
    # the interpreter's rows are for any dtype
    is_fp32 = q_NHD.dtype == torch.float32 and q_NHD.device.type != "cpu"
    shape = "fp32" if is_fp32 else "short" if docs.is_short else ""
    config = launch.config_of(f"attention_{name}", D, q_NHD.device, shape=shape)
    heads, rows, columns, walked = H, config["BLOCK_M"], config["BLOCK_N"], (k_NGD, v_NGD)
    back = docs.num_tokens if rule.window is None else rule.window - 1
    ahead = 0 if rule.is_causal else back
    if name == "dkv":  # rows are keys, columns the queries that see them
        heads, rows, columns, walked = G, columns, rows, (q_NHD, do_NHD)
        back, ahead = ahead, back
    tiles = docs.tiles(rows, columns, back=back, ahead=ahead)
    descs = [_descriptor(x, columns) for x in walked]
    strides = (x.stride(0) for x in tensors[:3])
    squash = None if rule.softcap is None else rule.scale / rule.softcap
    factor = LOG2_E * (rule.scale if rule.softcap is None else rule.softcap)
    with torch.cuda.device_of(q_NHD):
        kernel[len(tiles), heads](*tensors, tiles, *descs, N, *strides, factor, squash, rule.window,
                                  **numbers, GROUP=H // G, IS_CAUSAL=rule.is_causal, D=D, **config)

def _descriptor(x: Tensor, rows: int) -> TensorDescriptor | None:
    """For TMA, of tiles of `rows` rows of one head; None where x or its GPU does not suit."""
    N, heads, D = x.shape
    is_aligned = x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0
    has_tma = launch.arch_of(x.device) in ("sm_90", "sm_100", "sm_103", "interpreter")
    if not has_tma or x.dtype == torch.float32 or dot_width(D) != D or not is_aligned:
        return None
    return TensorDescriptor(x, [N, heads * D], [x.stride(0), 1], [rows, D])

def _packed(x_NHD: Tensor) -> Tensor:
    """x itself where its heads lie side by side, as in a part of a fused projection; or a copy."""
    _, H, D = x_NHD.shape
    is_packed = x_NHD.stride()[1:] == (D, 1) and x_NHD.stride(0) >= H * D
    return x_NHD if is_packed else x_NHD.contiguous()

def _stream(x_NHD: Tensor, docs: Docs) -> Tensor:
    """A stream of x's shape for a kernel to fill; zero past the documents."""
    y_NHD = torch.empty(x_NHD.shape, dtype=x_NHD.dtype, device=x_NHD.device)
    y_NHD[docs.num_tokens :].zero_()
    return y_NHD

class Attention(torch.autograd.Function):
    """`attention` by the kernels, and their ValueErrors; p is formed anew in backward."""

    @staticmethod
    def forward(ctx: FunctionCtx, q_NHD: Tensor, k_NGD: Tensor, v_NGD: Tensor, docs: Docs,
                rule: Rule) -> Tensor:
        (N, H, D), device = q_NHD.shape, q_NHD.device
        launch.check(device, (N, k_NGD.shape[1], D), q_NHD.dtype, k=k_NGD, v=v_NGD)
        launch.check(device, (len(docs.lengths) + 1,), docs=docs.cu_seqlens_B1)
        for name in ("scale", "window", "softcap"):
            if (value := getattr(rule, name)) is not None and not value > 0:
                raise ValueError(f"{name} = {value}: must be > 0")
        q_NHD, k_NGD, v_NGD = _packed(q_NHD), _packed(k_NGD), _packed(v_NGD)
        o_NHD = _stream(q_NHD, docs)
        lse_HN = q_NHD.new_empty(H, N, dtype=torch.float32)
        _launch(_attention_fwd_kernel, "fwd", [q_NHD, k_NGD, v_NGD, o_NHD, lse_HN], docs, rule)
        ctx.save_for_backward(q_NHD, k_NGD, v_NGD, o_NHD, lse_HN)
        ctx.docs, ctx.rule = docs, rule
        return o_NHD

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, do_NHD: Tensor) -> tuple[Tensor | None, ...]:
        q_NHD, k_NGD, v_NGD, o_NHD, lse_HN = ctx.saved_tensors
        do_NHD = do_NHD.contiguous()
        stats_HN2 = lse_HN.new_empty(*lse_HN.shape, 2)  # lse, and the delta that "dq" finds
        dq_NHD, dk_NGD, dv_NGD = (_stream(x, ctx.docs) for x in (q_NHD, k_NGD, v_NGD))
        settings = {"docs": ctx.docs, "rule": ctx.rule, "scale": ctx.rule.scale}
        tensors = [q_NHD, k_NGD, v_NGD, o_NHD, do_NHD, lse_HN, stats_HN2, dq_NHD]
        _launch(_attention_bwd_dq_kernel, "dq", tensors, **settings)
        if any(ctx.needs_input_grad[1:3]):
            tensors = [q_NHD, k_NGD, v_NGD, do_NHD, stats_HN2, dk_NGD, dv_NGD]
            _launch(_attention_bwd_dkv_kernel, "dkv", tensors, **settings)
        return dq_NHD, dk_NGD, dv_NGD, None, None
