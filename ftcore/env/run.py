"""The run folder: one writer, what it ran on, its metrics under one set of names; how a run stops.

`metrics.jsonl` holds one object a line, {"step": 10, "train/loss": 2.5}, without a time stamp:
equal runs have equal lines, perf/ aside; null is not finite. TensorBoard carries the same names."""

import fcntl
import importlib.metadata
import json
import math
import os
import platform
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self
from ftcore import files
from ftcore.errors import CheckpointError, ConfigError, DataError

METRICS = "metrics.jsonl"
PACKAGES = ("torch", "numpy", "tokenizers", "safetensors", "triton")

class RunFolder(ExitStack):
    """The one writer of a run folder; `close` it (twice does no harm), or use it in a `with`. After
    `resume` call `trim` with the step that was loaded. ConfigError: it holds another run, or there
    is nothing to resume; CheckpointError: another process writes there, or the disk refuses."""

    def __init__(self, path: str | Path, *, resume: bool = False) -> None:
        super().__init__()
        path = self.path = Path(path)
        # A run killed while it began has nothing to lose: lock, run.json, or a part of a file.
        present = {p.name for p in path.glob("*") if not p.name.startswith(files.TEMP)}
        if resume and "run.json" not in present:
            raise ConfigError(f"nothing to resume: {path} has no run.json")
        if not resume and present - {"lock", "run.json"}:
            again = f", or continue this one with --resume {path}" if "run.json" in present else ""
            raise ConfigError(f"{path} is not empty: name another run folder{again}")
        files.make_folder(path)
        self.enter_context(locked(path / "lock"))
        self._tensorboard, self._purge = None, None if resume else {}
        files.clean(path)
        starts = json.loads((path / "run.json").read_bytes())["starts"] if resume else []
        self.dump("run.json", {"starts": [*starts, describe_start()]})

    def trim(self, step: int) -> None:
        """Forget the metrics after `step`, which will be logged again; -1 forgets all of them."""
        path = self.path / METRICS
        kept = [line for line in read_metrics(path) if line["step"] <= step]
        files.write_file(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._purge = {"purge_step": step + 1}

    def log(self, step: int, values: Mapping[str, float]) -> None:
        if self._tensorboard is None:
            assert self._purge is not None, "a resumed run is trimmed before it logs"
            from torch.utils.tensorboard import SummaryWriter  # cost: 0.3 s of import

            writer = SummaryWriter(str(self.path / "tensorboard"), **self._purge)
            self._tensorboard = self.enter_context(writer)
        line = {n: float(x) if math.isfinite(x) else None for n, x in values.items()}
        with open(self.path / METRICS, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **line}) + "\n")
        for name, value in values.items():
            self._tensorboard.add_scalar(name, value, step)

    def dump(self, name: str, record: Mapping[str, Any]) -> Path:
        files.write_file(self.path / name, json.dumps(record, indent=1) + "\n")
        return self.path / name

    def sync(self) -> None:
        """Put the metrics on the disk: before a checkpoint, which must not outlive its lines."""
        if self._tensorboard is not None:
            files.fsync(self.path / METRICS)
            self._tensorboard.flush()

def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; a last line that a kill cut short is left out."""
    lines = []
    for text in path.read_bytes().split(b"\n")[:-1] if path.exists() else ():
        try:
            lines.append(json.loads(text))
        except ValueError as error:
            raise DataError(f"{path}, line {len(lines) + 1}: {error}; delete that line") from error
    return lines

def describe_start() -> dict[str, Any]:
    """Versions, hardware, commit (-dirty: with changes; None: no checkout), time, command line."""
    import torch

    versions = {name: importlib.metadata.version(name) for name in PACKAGES if find_spec(name)}
    cpuinfo = Path("/proc/cpuinfo")
    cpu = re.search(r"model name\s*: (.+)", cpuinfo.read_text() if cpuinfo.exists() else "")
    git = subprocess.run("git describe --always --dirty --abbrev=40 --exclude='*'", shell=True,
                         cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return {"time": datetime.now(UTC).isoformat(timespec="seconds"), "command": sys.argv,
            "commit": git.stdout.strip() or None, "hardware": {
                "host": platform.node(), "system": platform.platform(),
                "cpu": cpu[1] if cpu else platform.machine(), "cpu_count": os.cpu_count(),
                "gpus": [*map(torch.cuda.get_device_name, range(torch.cuda.device_count()))]},
            "versions": {"python": platform.python_version()} | versions}

@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of a file that says who has it; the kernel frees that of a process that dies,
    where a pid could not tell it from a live one on another host or in a container."""
    with open(path, "ab", buffering=0) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = path.read_text("utf-8") or error
            raise CheckpointError(f"{path} is held by another writer ({holder}): wait") from error
        file.truncate(0)
        file.write(json.dumps({"pid": os.getpid(), "host": platform.node()}).encode())
        yield

class StopFlag(ExitStack):
    """SIGTERM and SIGINT as an exit code: `with StopFlag() as stop:`, and after each step, where
    `stop.exit_code` is not 0, save and leave with it. A second signal ends the process at once:
    what was saved is whole (files.py). For the main thread; leaving restores the old handlers."""

    exit_code = 0  # until a signal comes; then the shell's, 128 + signal

    def __enter__(self) -> Self:
        for number in (signal.SIGTERM, signal.SIGINT):
            old = signal.signal(number, self._stop) or signal.SIG_DFL  # None: not set by Python
            self.callback(signal.signal, number, old)
        return self

    def _stop(self, number: int, frame: object) -> None:
        if self.exit_code:
            os._exit(128 + number)
        self.exit_code, name = 128 + number, signal.Signals(number).name
        # print may be interrupted halfway by this very handler; write cannot.
        os.write(2, f"\n{name}: stopping after this step; once more to leave now\n".encode())
