"""Where and how exactly a run computes: device, precision, seeds. Every stream of random
numbers has a key, (seed, what for), so resuming needs no saved generator."""

import os
from dataclasses import dataclass
import numpy as np
import torch
from ftcore.errors import ConfigError

PRECISIONS = {  # dtype of the weights, and of matrix products where that is another
    "bf16": (torch.bfloat16, None), "bf16-autocast": (torch.float32, torch.bfloat16),
    "fp16": (torch.float16, None), "fp32": (torch.float32, None)}
GROWTH_STEPS = 2000

def resolve_device(name: str, kernels: str = "auto") -> torch.device:
    """The device of a run. Raises ConfigError: there is none, or Triton's kernels on a CPU."""
    name = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"env.device = {name!r}: {reason}; use auto") from error
    if kernels == "triton" and device.type == "cpu":
        raise ConfigError(f"env.kernels = 'triton' on {name}: they need a GPU; use auto")
    return device

@dataclass
class LossScale:
    """The factor of the loss of a step, by which the optimiser divides again: fp16 has no values
    below 6e-8, where many gradients lie (Micikevicius et al. 2018, arXiv:1710.03740)."""
    value: float = 2.0**16
    finite_steps: int = 0  # since it changed last

    def update(self, is_finite: bool) -> None:
        self.finite_steps += 1
        if not is_finite or self.finite_steps == GROWTH_STEPS:
            self.value = 2 * self.value if is_finite else max(1.0, self.value / 2)
            self.finite_steps = 0

def derived(seed: int, *key: int) -> int:
    """A 63-bit seed for one purpose: a hash of the run's seed and the key."""
    # numerics: zeros at the end do not change the hash, so the key's length goes in.
    return int(np.random.SeedSequence([seed, len(key), *key]).generate_state(1, np.uint64)[0]) >> 1

def generator(seed: int, *key: int) -> torch.Generator:
    return torch.Generator().manual_seed(derived(seed, *key))

def use_deterministic(wanted: bool) -> None:
    """Only operations that give the same bits each time; torch warns where it has none. To be said
    before the first on a GPU, whose library of matrix products then keeps memory for it."""
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # cost: torch.use_deterministic_algorithms imports its compiler, 152 MiB, to tell it too
    torch._C._set_deterministic_algorithms(wanted, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # everything made is written
