"""LoRA on a GPU; the equations are those of kernels/lora.py.

Letters: N rows, C input width, O output width, R rank, G groups of rows, P tiles of O.

The products with W stay with the vendor's library, and so do h (s B)^T and, without dropout, dh A:
to these they add. The kernels here are the skinny products, which are bound by memory:
shrink      h = drop(x) A^T: one read of x, where torch writes the dropped x and reads it again
dh and dB   in one read of dy, for ranks up to `FUSED_RANK`: above it the partial sums weigh more
            than a second read
dA and dx   with dropout, from one read of x

The mask is never stored: 16 bits of Philox decide on each input of the update, from a seed and the
place of the input, the same in each pass. p is rounded to a multiple of 2^-16, as on a CPU.
Sums over rows or tiles of O are partial sums in fp32 (operands in fp32 without TF32), added in the
same order in every run.

source      Philox: Salmon et al. 2011, SC11, whose 7 rounds pass all tests of randomness"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from kernels import launch
from kernels.attention_triton import dot_width

FUSED_RANK = 32

@triton.jit
def _is_kept(seed, offs_n, first_c, dropped, BLOCK_C: tl.constexpr):
    """Of a tile of inputs (BLOCK_N, BLOCK_C); `first_c` is a multiple of 8."""
    offs_8 = first_c // 8 + tl.arange(0, BLOCK_C // 8)
    row = offs_n[:, None] + tl.zeros_like(offs_8)
    column = tl.zeros_like(offs_n)[:, None] + offs_8
    zero = tl.zeros_like(row)
    w0, w1, w2, w3 = tl.philox(seed, row, column, zero, zero, n_rounds=7)
    words = tl.join(tl.join(w0, w1), tl.join(w2, w3))  # (BLOCK_N, BLOCK_C // 8, 2, 2)
    shorts = tl.join(words & 0xFFFF, words >> 16).to(tl.int32)
    return tl.reshape(shorts, [offs_n.shape[0], BLOCK_C]) >= dropped

@triton.jit
def _lora_shrink_kernel(x_ptr, a_ptr, seed_ptr, h_ptr, N, C, R, dropped, keep_scale,
                        BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr):
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_r = tl.arange(0, BLOCK_R)
    x_row_ptr = x_ptr + offs_n.to(tl.int64)[:, None] * C
    h = tl.zeros([BLOCK_N, BLOCK_R], tl.float32)
    for first_c in range(0, C, BLOCK_C):
        offs_c = first_c + tl.arange(0, BLOCK_C)
        in_c = offs_c < C
        x = tl.load(x_row_ptr + offs_c, mask=(offs_n < N)[:, None] & in_c, other=0.0)
        if seed_ptr is not None:
            x = tl.where(_is_kept(tl.load(seed_ptr), offs_n, first_c, dropped, BLOCK_C), x, 0.0)
        a = tl.load(a_ptr + offs_r[:, None] * C + offs_c, mask=(offs_r < R)[:, None] & in_c,
                    other=0.0)  # (BLOCK_R, BLOCK_C)
        h = tl.dot(x, tl.trans(a), h, input_precision="ieee")
    inside = (offs_n < N)[:, None] & (offs_r < R)
    h = (h * keep_scale).to(h_ptr.dtype.element_ty)
    tl.store(h_ptr + offs_n.to(tl.int64)[:, None] * R + offs_r, h, mask=inside)

@triton.jit
def _lora_dh_db_kernel(dy_ptr, sb_ptr, h_ptr, dh_ptr, db_ptr, N, width_o, R, tiles_per_group,
                       BLOCK_N: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_R: tl.constexpr):
    pid_o, pid_g = tl.program_id(0), tl.program_id(1)
    offs_o = pid_o * BLOCK_O + tl.arange(0, BLOCK_O)
    offs_r = tl.arange(0, BLOCK_R)
    in_o, in_r = offs_o < width_o, offs_r < R
    offs_or = offs_o[:, None] * R + offs_r
    in_or = in_o[:, None] & in_r
    sb = tl.load(sb_ptr + offs_or, mask=in_or, other=0.0)  # (BLOCK_O, BLOCK_R)
    db = tl.zeros([BLOCK_O, BLOCK_R], tl.float32)
    for tile in range(pid_g * tiles_per_group, (pid_g + 1) * tiles_per_group):
        offs_n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        in_n = (offs_n < N)[:, None]
        offs_nr = offs_n.to(tl.int64)[:, None] * R + offs_r
        dy = tl.load(dy_ptr + offs_n.to(tl.int64)[:, None] * width_o + offs_o, mask=in_n & in_o,
                     other=0.0)  # (BLOCK_N, BLOCK_O)
        h = tl.load(h_ptr + offs_nr, mask=in_n & in_r, other=0.0)  # (BLOCK_N, BLOCK_R)
        # cost: the other way round the compiler waits for each product (wgmma serialised)
        db = tl.dot(tl.trans(dy), h, db, input_precision="ieee")
        dh = tl.dot(dy, sb, input_precision="ieee")
        tl.store(dh_ptr + pid_o.to(tl.int64) * N * R + offs_nr, dh, mask=in_n & in_r)
    tl.store(db_ptr + pid_g.to(tl.int64) * width_o * R + offs_or, db, mask=in_or)

@triton.jit
def _lora_drop_bwd_kernel(x_ptr, dh_ptr, a_ptr, seed_ptr, dx_ptr, da_ptr, N, C, R, dropped,
                          keep_scale, tiles_per_group, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
                          BLOCK_R: tl.constexpr):
    first_c, pid_g = tl.program_id(0) * BLOCK_C, tl.program_id(1)
    offs_c = first_c + tl.arange(0, BLOCK_C)
    offs_r = tl.arange(0, BLOCK_R)
    in_c, in_r = offs_c < C, offs_r < R
    offs_rc = offs_r[:, None] * C + offs_c
    in_rc = in_r[:, None] & in_c
    seed = tl.load(seed_ptr)
    a = tl.load(a_ptr + offs_rc, mask=in_rc, other=0.0)  # (BLOCK_R, BLOCK_C)
    da = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for tile in range(pid_g * tiles_per_group, (pid_g + 1) * tiles_per_group):
        offs_n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        in_n = (offs_n < N)[:, None]
        offs_nc = offs_n.to(tl.int64)[:, None] * C + offs_c
        dh = tl.load(dh_ptr + offs_n.to(tl.int64)[:, None] * R + offs_r, mask=in_n & in_r,
                     other=0.0)  # (BLOCK_N, BLOCK_R)
        x = tl.load(x_ptr + offs_nc, mask=in_n & in_c, other=0.0)  # (BLOCK_N, BLOCK_C)
        kept = _is_kept(seed, offs_n, first_c, dropped, BLOCK_C)
        da = tl.dot(tl.trans(dh), tl.where(kept, x, 0.0), da, input_precision="ieee")
        if dx_ptr is not None:
            dx = tl.where(kept, keep_scale * tl.dot(dh, a, input_precision="ieee"), 0.0)
            tl.store(dx_ptr + offs_nc, dx.to(dx_ptr.dtype.element_ty), mask=in_n & in_c)
    tl.store(da_ptr + pid_g.to(tl.int64) * R * C + offs_rc, da * keep_scale, mask=in_rc)

def _drop_rule(dropout: float) -> tuple[int, float]:
    """Of the 2^16 values of 16 bits those that drop an input, and the factor on the others."""
    dropped = min(round(dropout * 2**16), 2**16 - 1)
    return dropped, 2**16 / (2**16 - dropped)

def _walk(kernel: str, x_NC: Tensor, R: int, block: str) -> tuple[tuple[int, int], launch.Config]:
    """Grid and arguments of a kernel that walks over x in tiles of rows, which are `block` wide: a
    program for each tile of the width and group of row tiles, so that all fill the GPU."""
    config, (N, C) = dict(launch.config_of(kernel, R, x_NC.device)), x_NC.shape
    row_tiles, column_tiles = triton.cdiv(N, config["BLOCK_N"]), triton.cdiv(C, config[block])
    programs = launch.num_programs(row_tiles * column_tiles, config.pop("PER_SM"), x_NC.device)
    config["tiles_per_group"] = triton.cdiv(row_tiles, max(1, programs // column_tiles))
    return (column_tiles, triton.cdiv(row_tiles, max(1, config["tiles_per_group"]))), config

def _launch_shrink(x_NC: Tensor, a_RC: Tensor, seed: Tensor | None, dropout: float) -> Tensor:
    (N, C), R = x_NC.shape, len(a_RC)
    config = launch.config_of("lora_shrink", R, x_NC.device)
    h_NR = torch.empty(N, R, dtype=x_NC.dtype, device=x_NC.device)
    with torch.cuda.device_of(x_NC):
        _lora_shrink_kernel[(triton.cdiv(N, config["BLOCK_N"]),)](
            x_NC, a_RC, seed, h_NR, N, C, R, *_drop_rule(dropout), BLOCK_R=dot_width(R), **config)
    return h_NR

def _launch_dh_db(dy_NO: Tensor, sb_OR: Tensor, h_NR: Tensor) -> tuple[Tensor, Tensor]:
    """dh in the compute dtype, and dB / scale in fp32."""
    (N, width_o), R = dy_NO.shape, h_NR.shape[1]
    (P, G), config = _walk("lora_dh_db", dy_NO, R, "BLOCK_O")
    dh_PNR = dy_NO.new_empty(P, N, R, dtype=torch.float32)
    db_GOR = dy_NO.new_empty(G, width_o, R, dtype=torch.float32)
    with torch.cuda.device_of(dy_NO):
        _lora_dh_db_kernel[P, G](dy_NO, sb_OR, h_NR, dh_PNR, db_GOR, N, width_o, R,
                                 BLOCK_R=dot_width(R), **config)
    return dh_PNR.sum(0).to(dy_NO.dtype), db_GOR.sum(0)

def _launch_drop_bwd(x_NC: Tensor, dh_NR: Tensor, a_RC: Tensor, seed: Tensor, dx_NC: Tensor | None,
                     dropout: float) -> Tensor:
    """dA in fp32; the update's share of dx goes to `dx_NC`."""
    (N, C), R = x_NC.shape, len(a_RC)
    grid, config = _walk("lora_drop_bwd", x_NC, R, "BLOCK_C")
    da_GRC = x_NC.new_empty(grid[1], R, C, dtype=torch.float32)
    with torch.cuda.device_of(x_NC):
        _lora_drop_bwd_kernel[grid](x_NC, dh_NR, a_RC, seed, dx_NC, da_GRC, N, C, R,
                                    *_drop_rule(dropout), BLOCK_R=dot_width(R), **config)
    return da_GRC.sum(0)

class LoRALinear(torch.autograd.Function):
    """`lora_linear` by the kernels. Keeps x, h and the seed of the mask; `rule`: scale and
    the probability of dropping an input of the update."""

    @staticmethod
    def forward(ctx: FunctionCtx, x_NC: Tensor, weight_OC: Tensor, a_RC: Tensor, b_OR: Tensor,
                bias_O: Tensor | None, rule: tuple[float, float]) -> Tensor:
        scale, dropout = ctx.rule = rule
        (_, C), width_o, R = x_NC.shape, len(weight_OC), len(a_RC)
        launch.check(x_NC.device, (width_o, C), x_NC.dtype, weight=weight_OC)
        launch.check(x_NC.device, (width_o,), x_NC.dtype, bias=bias_O)
        launch.check(x_NC.device, (R, C), a=a_RC)
        launch.check(x_NC.device, (width_o, R), b=b_OR)
        ctx.dtypes = a_RC.dtype, b_OR.dtype
        x_NC = x_NC.contiguous()
        a_RC = a_RC.to(x_NC.dtype).contiguous()
        sb_OR = (b_OR * scale).to(x_NC.dtype).contiguous()
        # on the device, so that nobody waits for it
        seed = torch.randint(2**63 - 1, (1,), device=x_NC.device) if dropout else None
        h_NR = _launch_shrink(x_NC, a_RC, seed, dropout)
        ctx.save_for_backward(x_NC, weight_OC, a_RC, sb_OR, h_NR, seed)
        # cost: the large product adds what it finds in y; the small one would read and write all
        y_NO = h_NR @ sb_OR.T if bias_O is None else torch.addmm(bias_O, h_NR, sb_OR.T)
        return y_NO.addmm_(x_NC, weight_OC.T)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dy_NO: Tensor) -> tuple[Tensor | None, ...]:
        x_NC, weight_OC, a_RC, sb_OR, h_NR, seed = ctx.saved_tensors
        (scale, dropout), (needs_dx, needs_dw, *_, needs_dbias, _) = ctx.rule, ctx.needs_input_grad
        dy_NO = dy_NO.contiguous()
        if len(a_RC) <= FUSED_RANK:
            dh_NR, db_OR = _launch_dh_db(dy_NO, sb_OR, h_NR)
        else:
            dh_NR, db_OR = dy_NO @ sb_OR, (h_NR.T @ dy_NO).T
        if seed is not None:
            dx_NC = torch.empty_like(x_NC) if needs_dx else None
            da_RC = _launch_drop_bwd(x_NC, dh_NR, a_RC, seed, dx_NC, dropout)
        else:
            dx_NC = dh_NR @ a_RC if needs_dx else None
            da_RC = dh_NR.T @ x_NC
        return (
            dx_NC.addmm_(dy_NO, weight_OC) if needs_dx else None,
            dy_NO.T @ x_NC if needs_dw else None,
            da_RC.to(ctx.dtypes[0]),
            (db_OR * scale).to(ctx.dtypes[1]),
            dy_NO.sum(0) if needs_dbias else None,
            None)
