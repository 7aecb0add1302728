"""NF4 on a GPU; definitions and letters are those of kernels/nf4.py.

quantise      reads 2 bytes a weight and writes a half; the code is the number of borders between
              neighbours of the table that lie below the weight
dequantise    reads half a byte a weight and writes 2; the tables, of 64 and 1024 bytes, stay in the
              cache of every multiprocessor
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import launch
from kernels.nf4 import BLOCK, GROUP, NF4, code_table, scale_table

@triton.jit
def _nf4_quantise_kernel(weight_ptr, table_ptr, codes_ptr, scale_ptr, Q, BLOCK_Q: tl.constexpr,
                         BLOCK: tl.constexpr):
    offs_q = tl.program_id(0).to(tl.int64) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    in_q = offs_q < Q
    offs = offs_q[:, None] * BLOCK + tl.arange(0, BLOCK)  # (BLOCK_Q, BLOCK)
    weight = tl.load(weight_ptr + offs, mask=in_q[:, None], other=0.0).to(tl.float32)
    scale = tl.max(tl.abs(weight), 1)
    tl.store(scale_ptr + offs_q, scale, mask=in_q)
    x = tl.div_rn(weight, tl.maximum(scale, 1e-30)[:, None])
    code = tl.zeros([BLOCK_Q, BLOCK], tl.int32)
    for place in tl.static_range(15):
        border = (tl.load(table_ptr + place) + tl.load(table_ptr + place + 1)) / 2
        code += (x > border).to(tl.int32)
    high, low = tl.split(tl.reshape(code, [BLOCK_Q, BLOCK // 2, 2]))
    offs = offs_q[:, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)
    tl.store(codes_ptr + offs, (high << 4 | low).to(tl.uint8), mask=in_q[:, None])

@triton.jit
def _nf4_dequantise_kernel(codes_ptr, table_ptr, scale_codes_ptr, scale_table_ptr, maxima_ptr,
                           mean_ptr, weight_ptr, Q, BLOCK_Q: tl.constexpr, BLOCK: tl.constexpr,
                           GROUP: tl.constexpr):
    offs_q = tl.program_id(0).to(tl.int64) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    in_q = offs_q < Q
    scale_code = tl.load(scale_codes_ptr + offs_q, mask=in_q, other=0).to(tl.int32)
    maximum = tl.load(maxima_ptr + offs_q // GROUP, mask=in_q, other=0.0)
    scale = tl.load(scale_table_ptr + scale_code) * maximum + tl.load(mean_ptr)
    offs = offs_q[:, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)
    codes = tl.load(codes_ptr + offs, mask=in_q[:, None], other=0).to(tl.int32)
    pair = tl.join(tl.load(table_ptr + (codes >> 4)), tl.load(table_ptr + (codes & 15)))
    weight = tl.reshape(pair, [BLOCK_Q, BLOCK]) * scale[:, None]
    offs = offs_q[:, None] * BLOCK + tl.arange(0, BLOCK)
    tl.store(weight_ptr + offs, weight.to(weight_ptr.dtype.element_ty), mask=in_q[:, None])

def quantise_blocks_triton(weight_OC: Tensor) -> tuple[Tensor, Tensor]:
    """Codes, two a byte, and the scale of each block in fp32."""
    Q, device = weight_OC.numel() // BLOCK, weight_OC.device
    config = launch.config_of("nf4_quantise", 0, device)
    codes_P = torch.empty(Q * BLOCK // 2, dtype=torch.uint8, device=device)
    scale_Q = torch.empty(Q, dtype=torch.float32, device=device)
    with torch.cuda.device_of(weight_OC):
        _nf4_quantise_kernel[(triton.cdiv(Q, config["BLOCK_Q"]),)](
            weight_OC.contiguous(), code_table(device), codes_P, scale_Q, Q, BLOCK=BLOCK, **config)
    return codes_P, scale_Q

def dequantise_triton(weight: NF4) -> Tensor:
    """`dequantise` by the kernel."""
    scales, device, Q = weight.scale_codes_Q, weight.codes_P.device, len(weight.scale_codes_Q)
    launch.check_device(device, scales=scales, maxima=weight.maxima_S, mean=weight.mean)
    config = launch.config_of("nf4_dequantise", 0, device)
    weight_OC = torch.empty(weight.shape, dtype=weight.dtype, device=device)
    with torch.cuda.device_of(weight_OC):
        _nf4_dequantise_kernel[(triton.cdiv(Q, config["BLOCK_Q"]),)](
            weight.codes_P, code_table(device), scales, scale_table(device), weight.maxima_S,
            weight.mean, weight_OC, Q, BLOCK=BLOCK, GROUP=GROUP, **config,
            enable_fp_fusion=False,  # numerics: rounded as by torch, so that weights are equal
        )  # fmt: skip
    return weight_OC
