"""Device and memory, resolved once from what the user says."""

import ctypes
import mmap
import os
from contextlib import suppress

import torch
from torch import Tensor

from ftcore.errors import ConfigError

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # glibc's malloc.h

def resolve_device(name: str, kernels: str = "auto") -> torch.device:
    """The device of a run. Raises ConfigError: there is none, or Triton's kernels on a CPU."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"env.device = {name!r}: {reason}; use cpu") from error
    if kernels == "triton" and device.type == "cpu":
        raise ConfigError(f"env.kernels = 'triton' on {name}: they need a GPU; use auto")
    return device

def free_bytes(device: torch.device) -> int:
    """Memory that a run may take: all of a GPU's, or what Linux says is available."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    with suppress(OSError), open("/proc/meminfo") as file:
        return 1024 * next(int(line.split()[1]) for line in file if line.startswith("MemAvailable"))
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")

def reuse_across_steps() -> None:
    """Keep freed memory for the next step; call it before the first one. glibc gives large blocks
    back to the system at once, and every step pays for their pages anew: measured 10 to 20% of a
    training step on a CPU. Other C libraries are left as they are."""
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_TOP_PAD, 64 * 2**20)

def shared_zeros(count: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """A flat tensor; on a CPU, in memory that processes forked later share with this one."""
    if torch.device(device).type != "cpu" or not count:
        return torch.zeros(count, dtype=dtype, device=device)
    # An anonymous mapping, since /dev/shm is small in containers.
    return torch.frombuffer(mmap.mmap(-1, count * dtype.itemsize), dtype=dtype)
