"""Signals sent to a process of its own, as a scheduler or a terminal would."""

import os
import signal
import subprocess
import sys
from pathlib import Path
import pytest
from ftcore.env import run
from ftcore.env.run import StopFlag

ROOT = Path(run.__file__).parents[2]

CHILD = """
import sys, time
from ftcore.env.run import StopFlag
with StopFlag() as stop:
    print("ready", flush=True)
    while not stop.exit_code:
        time.sleep(0.001)
    print("saving", flush=True)
    if sys.argv[1] == "slow":
        time.sleep(60)
    print("saved", flush=True)
sys.exit(stop.exit_code)
"""

def start(pace: str) -> subprocess.Popen[str]:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    child = subprocess.Popen([sys.executable, "-c", CHILD, pace], cwd=ROOT, text=True, **pipes)
    assert child.stdout.readline() == "ready\n"
    return child

@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_lets_the_step_end_and_sets_the_exit_code(number: int, code: int) -> None:
    child = start("fast")
    child.send_signal(number)
    out, err = child.communicate(timeout=30)
    assert out == "saving\nsaved\n" and child.returncode == code
    assert signal.Signals(number).name in err and "Traceback" not in err

@pytest.mark.parametrize("second, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_second_signal_leaves_at_once(second: int, code: int) -> None:
    child = start("slow")
    child.send_signal(signal.SIGTERM)
    assert child.stdout.readline() == "saving\n"
    child.send_signal(second)
    out, _ = child.communicate(timeout=30)
    assert out == "" and child.returncode == code

def test_the_old_handlers_are_restored() -> None:
    def mine(number: int, frame: object) -> None: ...

    before = signal.signal(signal.SIGTERM, mine), signal.getsignal(signal.SIGINT)
    try:
        with StopFlag() as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.exit_code == 143
        assert signal.getsignal(signal.SIGTERM) is mine
        assert signal.getsignal(signal.SIGINT) is before[1]
    finally:
        signal.signal(signal.SIGTERM, before[0])

def test_without_a_signal_the_exit_code_is_zero() -> None:
    with StopFlag() as stop:
        pass
    assert stop.exit_code == 0
