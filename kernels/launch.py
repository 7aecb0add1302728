"""What precedes a launch: checks of the arguments, and the configuration of the kernel.

Checks raise ValueError with the value, the limit and the remedy, before anything is launched: what
a kernel does with a wrong size is to read memory that is not its own.

Configurations are rows of configs.toml, by kernel, class and size: explicit, the same in every run,
and without the measuring at run time of @autotune. `python -m kernels.bench --tune` writes them."""

import tomllib
from functools import cache
from pathlib import Path
import torch
from torch import Tensor

Config = dict[str, int]
CONFIGS_FILE = Path(__file__).with_name("configs.toml")
MAX_HEAD_WIDTH, MAX_NORM_WIDTH, MAX_RANK = 256, 16384, 128  # above them "auto" is eager

@cache
def configs() -> dict[tuple[str, str], dict[float, Config]]:
    """The rows of configs.toml: (kernel, class) -> largest size -> arguments, smallest first."""
    tables = tomllib.loads(CONFIGS_FILE.read_text(encoding="utf-8"))
    return {(kernel, kind): {float(size): row for size, row in rows.items()}
            for kernel, kinds in tables.items() for kind, rows in kinds.items()}

def config_of(kernel: str, size: int, device: torch.device, *, shape: str = "") -> Config:
    """Block sizes, warps and stages of a kernel.

    size      what the kernel's rows go by
    shape     kind of shape, for a kernel that tells such apart
    raises    ValueError: larger than all rows"""
    for limit, arguments in rows_of(kernel, device, shape).items():
        if size <= limit:
            return arguments
    raise ValueError(f"{kernel}: size {size}, at most {limit:.0f}; pass impl='eager'")

def rows_of(kernel: str, device: torch.device, shape: str) -> dict[float, Config]:
    """The rows of the first class that there is, from the narrowest on."""
    kind = arch_of(device)
    kinds = (f"{kind}_{shape}", f"any_{shape}", kind, "any")
    return next(rows for key in kinds if (rows := configs().get((kernel, key))))

@cache
def arch_of(device: torch.device) -> str:
    """Architecture of a GPU, "sm_90" say."""
    if device.type != "cuda":
        return "interpreter"
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))

def num_programs(tasks: int, per_sm: int, device: torch.device) -> int:
    """Size of a persistent grid: `per_sm` programs for each multiprocessor (the interpreter counts
    as one), or one for each task."""
    is_gpu = device.type == "cuda"
    sms = torch.cuda.get_device_properties(device).multi_processor_count if is_gpu else 1
    return max(1, min(tasks, per_sm * sms))

def check(device: torch.device, shape: tuple[int, ...], dtype: torch.dtype | None = None,
          **tensors: Tensor | None) -> None:
    """raises  ValueError: one of the tensors has another shape, or another dtype than one that is
    named, or lies on another device."""
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, must be {tuple(shape)}")
        if dtype is not None and tensor.dtype != dtype:
            raise ValueError(f"{name} is {tensor.dtype}, must be {dtype}; cast it")
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, must be on {device}; move it there")
