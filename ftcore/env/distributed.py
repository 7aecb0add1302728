"""The processes of one run that torchrun started, on one machine or several. Each has all rows and
the whole command, and computes its share of every step; the first alone writes, judges and speaks.
A plain start is a world of one, in which nothing is sent."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import Tensor, distributed

from ftcore.errors import ConfigError, PeerError

TIMEOUT = timedelta(days=1)  # the first may judge for hours; where one dies, torchrun ends all

@dataclass(frozen=True)
class World:
    """Process `rank` of `size`, all of which run the same code: what one exchanges, each must."""
    device: str = "cpu"  # env.device, or of several GPUs its own
    rank: int = 0
    size: int = 1
    local_size: int = 1  # processes on this machine

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def gather(self, number: float) -> list[float]:
        """What every process said, in the order of ranks, exactly; each waits for all."""
        said = torch.zeros(self.size, dtype=torch.float64)
        said[self.rank] = number
        self.add(said)
        return said.tolist()

    def add(self, tensor: Tensor) -> None:
        """Make of each process's tensor the sum of all; the same bits everywhere."""
        self._exchange(distributed.all_reduce, tensor)

    def tell(self, tensor: Tensor) -> None:
        """Make of each process's tensor that of the first."""
        self._exchange(distributed.broadcast, tensor, 0)

    def _exchange(self, call: Callable[..., object], *args: Tensor | int) -> None:
        try:
            if self.size > 1:
                call(*args)
        except RuntimeError as error:
            what = f"process {self.rank} of {self.size}: another one ended or cannot be reached"
            how = "see its own message; what was saved is whole, continue with --resume RUN"
            raise PeerError(f"{what} ({str(error).partition('. ')[0]}): {how}") from error

@contextmanager
def joined(device: str) -> Iterator[World]:
    """The world that torchrun made, where it started this process, for work on `device`; all but
    the first are silent on stdout. Numbers and CPU tensors go by gloo, those of GPUs by NCCL."""
    env = os.environ
    size = int(env["WORLD_SIZE"]) if distributed.is_torchelastic_launched() else 1
    if size == 1:
        yield World(device)
        return
    if device == "cuda":
        device = f"cuda:{env['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    elif device != "cpu":
        raise ConfigError(f"env.device = {device!r} for {size} processes: name cuda, or cpu")
    backend = "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl"
    distributed.init_process_group(backend, timeout=TIMEOUT)
    world = World(device, int(env["RANK"]), size, int(env["LOCAL_WORLD_SIZE"]))
    if not world.is_first:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    try:
        yield world
        world.gather(0)  # the others wait until the first is done
    finally:
        distributed.destroy_process_group()
