"""The one explicit choice of how an operation runs: in plain torch, or by its Triton kernels.

An op that has both takes it as the argument `impl`; there is no switch of a module and no variable
of the environment. Triton is imported only where a kernel is about to run."""

import logging
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Literal
import torch
from torch import Tensor

Impl = Literal["auto", "eager", "triton"]

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# The files of ops that share one under another name.
FILES = {"rms_norm": "norm", "layer_norm": "norm", "norm_rope": "rope", "geglu": "swiglu"}

def kernels_of(op: str, impl: Impl, x: Tensor, *, fits: bool = True) -> ModuleType | None:
    """The module of an op's Triton kernels where `uses_triton`, else None."""
    return (import_module(f"kernels.{FILES.get(op, op)}_triton")
            if uses_triton(op, impl, x, fits=fits) else None)

def uses_triton(op: str, impl: Impl, x: Tensor, *, fits: bool = True) -> bool:
    """Whether an op on `x` runs its Triton kernels.

    op        its name in kernels/cases.py
    impl      "auto": Triton on a GPU, where the op has passed its first case in the dtype of x, and
              eager for everything else; "eager" and "triton": as they say
    x         the first tensor of the op
    fits      x is what "auto" leaves to the kernels; unread but by "auto"
    raises    ValueError: another word; "triton" where no kernel can run"""
    if impl == "auto":
        return x.is_cuda and x.dtype in DTYPES and fits and _passes(op, x.device, x.dtype)
    if impl == "eager":
        return False
    if impl != "triton":
        raise ValueError(f"impl = {impl!r}: must be 'auto', 'eager' or 'triton'")
    if x.dtype not in DTYPES:
        raise ValueError(f"impl = 'triton' on {x.dtype}: kernels take {DTYPES}; pass 'eager'")
    if find_spec("triton") is None:
        raise ValueError("impl = 'triton': triton is not installed; install it or pass 'eager'")
    if not x.is_cuda and not is_interpreted():
        raise ValueError(f"impl = 'triton' on {x.device}: kernels need a GPU; pass 'eager'")
    return True

@cache
def _passes(op: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether an op's first case of cases.toml passes here; tried once, told where it does not."""
    from kernels.check import passes

    gpus = [device] if device.type == "cuda" else []
    try:
        with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(gpus):
            if passes(op, device, dtype):
                return True
        reason = "their errors are larger than eager's"
    except Exception as error:  # compiler and driver have many
        reason = f"{type(error).__name__}: {error}"
    logging.getLogger(__name__).warning(
        "%s in %s runs eagerly on %s, its kernels failed their test: %s", op, dtype, device, reason)
    return False

def is_interpreted() -> bool:
    """Whether kernels run in Triton's CPU interpreter, which is how tests run them."""
    from triton import knobs

    return knobs.runtime.interpret
