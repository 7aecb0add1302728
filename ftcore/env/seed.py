"""Determinism: randomness is a function of what it is for, so resuming needs no saved generator.

Every stream of numbers has a key: (seed, what for). Dropout draws from torch's global generator,
which is re-seeded from (seed, step, micro-step) before each micro-batch.
"""

import os

import numpy as np
import torch

def derived(seed: int, *key: int) -> int:
    """A 63-bit seed for one purpose: a hash of the run's seed and the key."""
    # numerics: zeros at the end do not change the hash, so the key's length goes in.
    entropy = [seed, len(key), *key]
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]) >> 1

def generator(seed: int, *key: int) -> torch.Generator:
    """A CPU generator for one purpose."""
    return torch.Generator().manual_seed(derived(seed, *key))

def use_deterministic(wanted: bool) -> None:
    """Only operations that give the same bits each time; torch warns where it has none. To be said
    before the first on a GPU, whose library of matrix products then keeps memory for it."""
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # cost: torch.use_deterministic_algorithms imports its compiler, 152 MiB, to tell it too
    torch._C._set_deterministic_algorithms(wanted, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # everything made is written

def seed_noise(seed: int, step: int, micro_step: int) -> None:
    """Seed torch's global generators for the dropout of one micro-batch."""
    torch.manual_seed(derived(seed, step, micro_step))
