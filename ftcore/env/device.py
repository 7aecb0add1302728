"""Device, threads and compute dtype, resolved once from what the user says."""

import torch

from ftcore.errors import ConfigError

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def resolve_device(name: str) -> torch.device:
    """The device of a run.

    raises  ConfigError: no such device on this machine
    """
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"env.device = {name!r}: {reason}; use cpu") from error
    return device


def set_threads(threads: int) -> None:
    """Threads of one CPU operation; the sum's order, and so the last bit, depends on it."""
    if threads < 1:
        raise ConfigError(f"env.threads = {threads}: must be >= 1")
    torch.set_num_threads(threads)
