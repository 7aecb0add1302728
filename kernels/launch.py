"""What precedes a launch: checks of the arguments, and the configuration of the kernel.

Checks raise ValueError with the value, the limit and the remedy, before anything is launched: what
a kernel does with a wrong size is to read memory that is not its own.

Configurations are rows of `CONFIGS`, by kernel, architecture and size: explicit, the same in every
run, and without the measuring at run time of @autotune.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

ANY = 1 << 62  # no size is larger
# What the kernels take at most; above it "auto" is eager.
MAX_HEAD_WIDTH, MAX_NORM_WIDTH, MAX_RANK = 256, 16384, 128

# (kernel, architecture) -> rows of (largest size, arguments); the first row that is large enough
# serves. "any" stands for the architectures without rows of their own. The size is the one that
# decides how much a program holds; each kernel's launcher says which that is. Chosen on an H200,
# from short lists at some of the sizes of kernels/RECORDS.md; the other rows are guesses.
CONFIGS: dict[tuple[str, str], tuple[tuple[int, Mapping[str, int]], ...]] = {
    # by C: a program holds some 4096 values, and a whole row however long it is
    ("norm_fwd", "any"): (
        (128, {"BLOCK_N": 16, "num_warps": 4}),
        (512, {"BLOCK_N": 8, "num_warps": 4}),
        (1024, {"BLOCK_N": 4, "num_warps": 4}),
        (2048, {"BLOCK_N": 2, "num_warps": 4}),
        (4096, {"BLOCK_N": 2, "num_warps": 16}),
        (8192, {"BLOCK_N": 1, "num_warps": 8}),
        (MAX_NORM_WIDTH, {"BLOCK_N": 1, "num_warps": 16}),
    ),
    ("norm_bwd", "any"): (
        (128, {"BLOCK_N": 32, "PER_SM": 2, "num_warps": 8}),
        (512, {"BLOCK_N": 8, "PER_SM": 2, "num_warps": 8}),
        (1024, {"BLOCK_N": 4, "PER_SM": 2, "num_warps": 8}),
        (2048, {"BLOCK_N": 2, "PER_SM": 2, "num_warps": 8}),
        (4096, {"BLOCK_N": 1, "PER_SM": 2, "num_warps": 8}),
        (8192, {"BLOCK_N": 1, "PER_SM": 1, "num_warps": 16}),
        (MAX_NORM_WIDTH, {"BLOCK_N": 1, "PER_SM": 1, "num_warps": 16}),
    ),
    # by E: both halves of BLOCK_R heads, some 4096 values together
    ("rope", "any"): (
        (16, {"BLOCK_R": 128, "num_warps": 4}),
        (32, {"BLOCK_R": 64, "num_warps": 4}),
        (64, {"BLOCK_R": 64, "num_warps": 4}),
        (256, {"BLOCK_R": 8, "num_warps": 4}),
    ),
    ("glu_fwd", "any"): ((ANY, {"BLOCK": 1024, "num_warps": 4}),),
    ("glu_bwd", "any"): ((ANY, {"BLOCK": 1024, "num_warps": 4}),),
    # by V: LANES threads' worth of 16 bytes at a time
    ("softmax_loss", "any"): (
        (4096, {"LANES": 128, "num_warps": 4}),
        (ANY, {"LANES": 2048, "num_warps": 32}),
    ),
    # by R
    ("lora_shrink", "any"): (
        (32, {"BLOCK_N": 32, "BLOCK_C": 128, "num_warps": 4, "num_stages": 4}),
        (64, {"BLOCK_N": 64, "BLOCK_C": 64, "num_warps": 4, "num_stages": 3}),
        (128, {"BLOCK_N": 32, "BLOCK_C": 64, "num_warps": 4, "num_stages": 3}),
    ),
    ("lora_dh_db", "any"): (
        (16, {"BLOCK_N": 64, "BLOCK_O": 128, "PER_SM": 2, "num_warps": 4, "num_stages": 3}),
        (32, {"BLOCK_N": 32, "BLOCK_O": 256, "PER_SM": 1, "num_warps": 8, "num_stages": 3}),
    ),
    ("lora_drop_bwd", "any"): (
        (32, {"BLOCK_N": 32, "BLOCK_C": 128, "PER_SM": 2, "num_warps": 8, "num_stages": 2}),
        (128, {"BLOCK_N": 32, "BLOCK_C": 128, "PER_SM": 2, "num_warps": 8, "num_stages": 2}),
    ),
    # by bytes of a head: K and V of BLOCK_S slots, 32 KiB together
    ("attention_decode", "any"): (
        (128, {"BLOCK_S": 128, "PER_SM": 4, "num_warps": 4, "num_stages": 3}),
        (256, {"BLOCK_S": 64, "PER_SM": 4, "num_warps": 4, "num_stages": 3}),
        (512, {"BLOCK_S": 32, "PER_SM": 4, "num_warps": 8, "num_stages": 3}),
        (4 * MAX_HEAD_WIDTH, {"BLOCK_S": 16, "PER_SM": 4, "num_warps": 8, "num_stages": 3}),
    ),
    # small enough that short sequences have several splits of several blocks
    ("attention_decode", "interpreter"): (
        (4 * MAX_HEAD_WIDTH, {"BLOCK_S": 16, "PER_SM": 24, "num_warps": 1, "num_stages": 1}),
    ),
    ("nf4_quantise", "any"): ((ANY, {"BLOCK_Q": 32, "num_warps": 4}),),
    ("nf4_dequantise", "any"): ((ANY, {"BLOCK_Q": 64, "num_warps": 4}),),
}


def config_of(kernel: str, size: int, device: torch.device) -> Mapping[str, int]:
    """Block sizes, warps and stages of a kernel.

    size      what the kernel's rows of `CONFIGS` go by
    raises    ValueError: larger than all rows
    """
    rows = CONFIGS.get((kernel, _arch(device))) or CONFIGS[kernel, "any"]
    for limit, arguments in rows:
        if size <= limit:
            return arguments
    raise ValueError(f"{kernel}: size {size}, at most {rows[-1][0]}; pass impl='eager'")


def _arch(device: torch.device) -> str:
    if device.type != "cuda":
        return "interpreter"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def num_programs(tasks: int, per_sm: int, device: torch.device) -> int:
    """Size of a persistent grid: `per_sm` programs for each multiprocessor, or one for each task.

    The interpreter, which has none, counts as one.
    """
    is_gpu = device.type == "cuda"
    sms = torch.cuda.get_device_properties(device).multi_processor_count if is_gpu else 1
    return max(1, min(tasks, per_sm * sms))


def check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """raises  ValueError: `tensor` has another shape."""
    if tensor.shape != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, must be {tuple(shape)}")


def check_at_most(name: str, value: int, limit: int) -> None:
    """raises  ValueError: `value` is above what the kernel supports."""
    if value > limit:
        raise ValueError(f"{name} = {value}: the kernel takes at most {limit}; pass impl='eager'")


def check_device(device: torch.device, **tensors: Tensor | None) -> None:
    """raises  ValueError: one of the tensors lies on another device."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, must be on {device}; move it there")


def check_dtype(dtype: torch.dtype, **tensors: Tensor | None) -> None:
    """raises  ValueError: one of the tensors has another dtype."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype != dtype:
            raise ValueError(f"{name} is {tensor.dtype}, must be {dtype}; cast it")
