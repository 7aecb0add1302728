"""SIGTERM and SIGINT become a flag; the loop reads it between two steps, saves and leaves."""

import os
import signal
from types import FrameType
from typing import Self

class StopFlag:
    """`with StopFlag() as stop:` and then, after each step, `if stop: save, exit stop.exit_code`.
    A second signal ends the process at once: what was saved before is whole (files.py).
    Handlers belong to the main thread of a process; the old ones are restored on leaving."""

    def __init__(self) -> None:
        self.exit_code = 0  # until a signal comes; then the shell's, 128 + signal

    def __bool__(self) -> bool:
        return self.exit_code != 0

    def __enter__(self) -> Self:
        numbers = (signal.SIGTERM, signal.SIGINT)
        self._old = {number: signal.signal(number, self._stop) for number in numbers}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._old.items():
            # A handler that Python did not install reads as None and cannot be put back.
            signal.signal(number, handler or signal.SIG_DFL)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if self:
            os._exit(128 + number)
        self.exit_code, name = 128 + number, signal.Signals(number).name
        # print may be interrupted halfway by this very handler; write cannot.
        os.write(2, f"\n{name}: stopping after this step; once more to leave now\n".encode())
