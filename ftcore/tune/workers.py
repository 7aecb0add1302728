"""Data parallel training on the cores of one machine: forked processes, a share of a step each.

    each process    its share of the rows -> gradients in its buffer
                    its part of the parameters: the sum of all buffers, its squared norm
    the parent      the norm, and whether and how far to step
    each process    its part of the parameters: the optimiser's update

Two cores on halves of a step are faster than two threads, which wait for each other after every
operation. What a step reads and writes lies in shared memory. More cores: other last bits."""

import math
import multiprocessing
import os
import signal
from contextlib import ExitStack, suppress
from multiprocessing.connection import Connection
from typing import Any
import torch
from ftcore.tune.optim import AdamW

class Workers(ExitStack):
    """`with Workers(count, optimizer, loop) as workers:`, each step `compute` and ask("step", ...);
    methods of the loop are told the number of the process, the count of all, and the arguments."""

    def __init__(self, count: int, optimizer: AdamW, loop: Any) -> None:
        super().__init__()
        self.count, self.optimizer, self.loop = count, optimizer, loop
        self.number = 0  # of this process
        self.parts = optimizer.parts(count)
        self.pipes: list[Connection] = []  # to the others
        optimizer.open_buffers(count)
        fork = multiprocessing.get_context("fork")
        for number in range(1, count):
            ours, theirs = fork.Pipe()
            process = fork.Process(target=self._work, args=(number, theirs), daemon=True)
            process.start()
            for end in (ours.close, process.join, process.kill):  # the last one first
                self.callback(end)
            self.pipes.append(ours)
            theirs.close()

    def compute(self, step: int, loss_scale: float = 1.0) -> tuple[float, list[float]]:
        """Gradient of a step times `loss_scale` into the buffers; returns the loss sum and L2 norm
        of each kind, without that factor. Raises as `ask`."""
        loss = sum(self.ask("share", step, loss_scale))
        squares = map(math.fsum, zip(*self.ask("square_sums"), strict=True))
        return loss, [math.sqrt(square) / loss_scale for square in squares]

    def ask(self, *act: Any) -> list[Any]:
        """What a method returns in every process, in order. Raises RuntimeError: one has ended."""
        for pipe in self.pipes:
            with suppress(BrokenPipeError):  # recv says so below
                pipe.send(act)
        threads = torch.get_num_threads()
        try:  # cost: threads that idle between operations would take the cores of the others
            torch.set_num_threads(1 if self.pipes else threads)
            answers = [self._act(*act)]
        finally:
            torch.set_num_threads(threads)
        for number, pipe in enumerate(self.pipes, 1):
            try:
                answers.append(pipe.recv())
            except (EOFError, ConnectionResetError):
                step = self.loop.progress.step
                what = f"training process {number} of {self.count} ended during step {step}"
                why = "where no other message says why, memory ran out: use fewer --env.threads"
                raise RuntimeError(f"{what}; {why}") from None
        return answers

    def _act(self, act: str, *args: Any) -> Any:
        if act in ("square_sums", "step"):
            return getattr(self.optimizer, act)(self.parts[self.number], *args)  # on its part
        return getattr(self.loop, act)(self.number, self.count, *args)

    def _work(self, number: int, pipe: Connection) -> None:
        """A worker's life: until the parent closes the pipe or is gone."""
        for handled in (signal.SIGINT, signal.SIGTERM):  # the parent decides when to stop
            signal.signal(handled, signal.SIG_IGN)
        for first, past in ((3, pipe.fileno()), (pipe.fileno() + 1, os.sysconf("SC_OPEN_MAX"))):
            os.closerange(first, past)  # the parent's ends of pipes, and the lock of its run
        torch.set_num_threads(1)
        self.number = number
        self.optimizer.collect_in(number)
        with suppress(EOFError, ConnectionError):
            while True:
                pipe.send(self._act(*pipe.recv()))
