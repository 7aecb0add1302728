"""Data parallel training on the cores of one machine: forked processes, a share of the step each.

    parent      the step's number -> every worker
    worker      its share of the rows -> gradients in its buffers; its loss sum -> parent
    parent      its own share meanwhile; then it adds the buffers, always in the same order

Two cores on halves of a step are faster than two threads inside every operation, which wait for
each other at the end of each. Parameters and gradient buffers lie in memory that all processes
share, so the parent's optimiser step needs no message. A step stays a pure function of the state
before it; another number of cores gives another order of summing, and so other last bits.
"""

import ctypes
import mmap
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from multiprocessing.connection import Connection
from typing import Self

import torch
from torch import Tensor

from ftcore.tune.optim import AdamW

PR_SET_PDEATHSIG = 1  # Linux's prctl.h

# (step, share, shares) -> the share's loss sum, its gradients in the optimiser's buffers.
Share = Callable[[int, int, int], float]


class Workers:
    """`with Workers(count, optimizer, share) as workers: loss = workers.compute(step)`.

    count   processes, this one among them; 1: none is started
    """

    def __init__(self, count: int, optimizer: AdamW, share: Share) -> None:
        self.count, self.optimizer, self.share = count, optimizer, share
        self.crew: list[tuple[multiprocessing.Process, Connection, Mapping[str, Tensor]]] = []

    def __enter__(self) -> Self:
        fork = multiprocessing.get_context("fork")
        if self.count > 1:
            for name, tensor in in_shared_memory(self.optimizer.params).items():
                self.optimizer.params[name].data = tensor
        for number in range(1, self.count):
            grads = in_shared_memory(self.optimizer.grads)
            ours, theirs = fork.Pipe()
            process = fork.Process(target=self._work, args=(number, theirs, grads), daemon=True)
            self.crew.append((process, ours, grads))
            process.start()
            theirs.close()
        return self

    def __exit__(self, *exception: object) -> None:
        for process, pipe, _ in self.crew:
            process.kill()
            process.join()
            pipe.close()
        self.crew.clear()

    def compute(self, step: int) -> float:
        """Gradients of a step into the optimiser's buffers; returns its loss sum.

        raises  RuntimeError: a worker has ended; the checkpoints are whole
        """
        for _, pipe, _ in self.crew:
            with suppress(BrokenPipeError):  # recv says so below
                pipe.send(step)
        with threads(1) if self.crew else nullcontext():
            loss = self.share(step, 0, self.count)
        for number, (_, pipe, grads) in enumerate(self.crew, 1):
            try:
                loss += pipe.recv()
            except (EOFError, ConnectionResetError):
                raise RuntimeError(
                    f"training process {number} of {self.count} ended during step {step}; where no"
                    " other message says why, memory ran out: use fewer --env.threads"
                ) from None
            self.optimizer.add(grads)
        return loss

    def _work(self, number: int, pipe: Connection, grads: dict[str, Tensor]) -> None:
        """A worker's life: until the parent closes the pipe or is gone."""
        for handled in (signal.SIGINT, signal.SIGTERM):  # the parent decides when to stop
            signal.signal(handled, signal.SIG_IGN)
        if prctl := getattr(ctypes.CDLL(None), "prctl", None):
            prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        for first, past in ((3, pipe.fileno()), (pipe.fileno() + 1, os.sysconf("SC_OPEN_MAX"))):
            os.closerange(first, past)  # the parent's ends of pipes, and the lock of its run
        torch.set_num_threads(1)
        self.optimizer.grads = grads
        while True:
            try:
                step = pipe.recv()
            except EOFError:
                return
            loss = self.share(step, number, self.count)
            self.optimizer.zero_unreached()
            pipe.send(loss)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """So many threads in every operation, then as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def in_shared_memory(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies in memory that processes forked later share with this one."""
    return {name: shared_copy(tensor) for name, tensor in tensors.items()}


def shared_copy(tensor: Tensor) -> Tensor:
    """An anonymous mapping, since /dev/shm is small in containers and one file each is too many."""
    block = mmap.mmap(-1, tensor.numel() * tensor.element_size())
    copy = torch.frombuffer(block, dtype=tensor.dtype).view(tensor.shape)
    return copy.copy_(tensor.detach())
