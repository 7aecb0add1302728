"""Memory of this process: how much it may take and has taken, kept for the next step, shared."""

import ctypes
import mmap
import os
import resource
from contextlib import suppress
from pathlib import Path
import torch
from torch import Tensor

MALLOC = {-4: 0, -1: 2**31 - 1, -2: 2**26}  # glibc: M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD

def free_bytes(device: torch.device) -> int:
    """Memory that a run may take: all of a GPU's, or what Linux says is available."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    with suppress(OSError), open("/proc/meminfo") as file:
        return 1024 * next(int(line.split()[1]) for line in file if line.startswith("MemAvailable"))
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")

def peak_bytes(device: torch.device) -> int:
    """The most memory that this process has held: on a GPU in tensors, else in all."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

def held_bytes() -> int:
    """What this process holds now: pages, the second number of statm."""
    return int(Path("/proc/self/statm").read_bytes().split()[1]) * resource.getpagesize()

def reuse_across_steps() -> None:
    """Keep freed memory for the next step; call it before the first one. glibc, no other, gives
    large blocks back at once, and a step pays for their pages anew: measured 10 to 20% on a CPU.
    What was freed before, such as a model that another has replaced, is given back."""
    libc = ctypes.CDLL(None)
    if mallopt := getattr(libc, "mallopt", None):
        libc.malloc_trim(0)
        for option, value in MALLOC.items():
            mallopt(option, value)

def shared_zeros(count: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """A flat tensor; on a CPU, in memory that processes forked later share with this one."""
    if torch.device(device).type != "cpu" or not count:
        return torch.zeros(count, dtype=dtype, device=device)
    # An anonymous mapping, since /dev/shm is small in containers.
    return torch.frombuffer(mmap.mmap(-1, count * dtype.itemsize), dtype=dtype)
