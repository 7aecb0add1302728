"""Checkpoints: what a run needs to continue as if it had never stopped.

    RUN/checkpoints/step-N/  GROUP.safetensors for each group of tensors, state.json, manifest.json
    RUN/best/                the same files as the step that was marked best

Groups are the caller's. `state.json` is Python's JSON: floats come back bit-equal, NaN and
infinities too; keys are strings. A folder is written by files.py, so a kill or a full disk costs
the one being written, no other; it is read only after its hashes agree. `best` shares its files
with that step (hard links): it costs no space and survives pruning.
"""

import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import load_file, save_file
from torch import Tensor

from ftcore import files
from ftcore.errors import CheckpointError

Tensors = Mapping[str, Mapping[str, Tensor]]
STATE, SUFFIX = "state.json", ".safetensors"

logger = logging.getLogger(__name__)

class Loaded(NamedTuple):
    """A verified checkpoint: CPU tensors in memory of their own, by group and name."""
    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]

class Checkpoints:
    """The checkpoints of a run folder: the last `keep_last` of them (at least 1), and the best."""

    def __init__(self, run: Path, keep_last: int) -> None:
        self.folder, self.best_folder = run / "checkpoints", run / "best"
        self.keep_last, self.failed_in_a_row = keep_last, 0  # saves since the last good one

    def save(self, step: int, tensors: Tensors, state: Mapping[str, Any]) -> None:
        """Write `step-N`, replacing one of that name, then prune; on return it is on the disk. Of
        `tensors`, {group: {name: tensor}}, contiguous, no two may share memory; to `state`, JSON
        values, "step" is added. CheckpointError: nothing was saved, nothing lost."""
        num_bytes = sum(t.nbytes for group in tensors.values() for t in group.values())

        def write(folder: Path) -> None:
            text = json.dumps({**state, "step": step}, indent=1) + "\n"
            (folder / STATE).write_text(text, "utf-8")
            for group, named in tensors.items():
                save_file(dict(named), folder / (group + SUFFIX))

        self.failed_in_a_row += 1  # until it is there
        files.write_folder(self._step_folder(step), write, needed_bytes=num_bytes)
        self._prune(step)
        self.failed_in_a_row = 0

    def latest(self) -> Loaded | None:
        """The newest checkpoint that verifies; None if there never was one. Those that were refused
        are named in warnings, and in a CheckpointError where none can be trusted."""
        refused = []
        for step in self.steps():
            try:
                return load(files.current(self._step_folder(step)))
            except CheckpointError as error:
                logger.warning("step %d is refused: %s", step, error)
                refused.append(f"  step {step}: {error}")
        if not refused:
            return None
        head = f"no checkpoint in {self.folder} can be trusted:"
        advice = "Restore one from a copy, or start again under another run name"
        raise CheckpointError("\n".join([head, *refused, advice]))

    def steps(self) -> list[int]:
        """The steps that have a folder, newest first, verified or not."""
        entries = self.folder.iterdir() if self.folder.is_dir() else ()
        found = (re.fullmatch(r"step-(\d+)", e.name.removeprefix(files.ASIDE)) for e in entries)
        return sorted({int(step[1]) for step in found if step}, reverse=True)

    def mark_best(self, step: int) -> None:
        """Make `best` the verified checkpoint of `step`, or raise CheckpointError and keep it."""
        files.link_folder(self._step_folder(step), self.best_folder)

    def best(self) -> Path | None:
        """The folder to `load` the best checkpoint from; None if none was marked."""
        folder = files.current(self.best_folder)
        return folder if folder.exists() else None

    def _step_folder(self, step: int) -> Path:
        return self.folder / f"step-{step}"

    def _prune(self, saved: int) -> None:
        """Delete what is not among the last `keep_last`, once the one just saved verifies; and
        later steps: they were refused, or the run would be past them."""
        steps = self.steps()
        kept = [step for step in steps if step <= saved][: self.keep_last]
        if doomed := [step for step in steps if step not in kept]:  # the newest first
            files.verify_folder(self._step_folder(saved))
        for step in doomed:
            files.remove(self._step_folder(step))

def load(folder: Path) -> Loaded:
    """Verify and read one checkpoint folder. Raises CheckpointError: names the file at fault."""
    if STATE not in (names := files.verify_folder(folder)):
        raise CheckpointError(f"{folder} is no checkpoint: its manifest has no {STATE}")
    state, tensors = json.loads((folder / STATE).read_bytes()), {}
    for file in (folder / name for name in names if name.endswith(SUFFIX)):
        # load_file maps the file: cut or overwritten later, it would end this process by SIGBUS.
        tensors[file.stem] = {key: mapped.clone() for key, mapped in load_file(file).items()}
    return Loaded(state["step"], tensors, state)
