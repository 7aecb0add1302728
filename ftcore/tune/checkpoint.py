"""Checkpoints: what a run needs to continue as if it had never stopped.

    RUN/checkpoints/step-N/  GROUP.safetensors for each group of tensors, state.json, manifest.json

`state.json` is Python's JSON: floats come back bit-equal, NaN too. A folder is written by files.py,
so a kill or a full disk costs the one being written; it is read only after its hashes agree."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple
from safetensors.torch import load_file, save_file
from torch import Tensor
from ftcore import files
from ftcore.errors import CheckpointError

Tensors = Mapping[str, Mapping[str, Tensor]]
STATE, SUFFIX = "state.json", ".safetensors"

class Loaded(NamedTuple):
    """A verified checkpoint: CPU tensors in memory of their own, by group and name."""
    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]

class Checkpoints:
    """The checkpoints of a run folder: the last `keep_last` of them (at least 1), and the best."""

    def __init__(self, run: Path, keep_last: int) -> None:
        self.folder = run / "checkpoints"
        self.keep_last, self.failed_in_a_row = keep_last, 0  # saves since the last good one

    def save(self, step: int, tensors: Tensors, state: Mapping[str, Any], best: int = 0) -> None:
        """Write `step-N`, replacing one of that name, then prune, but not the `best` step; then it
        is on the disk. Of `tensors`, {group: {name: tensor}}, contiguous, no two may share memory;
        to `state`, JSON values, "step" is added. CheckpointError: nothing was saved or lost."""
        num_bytes = sum(t.nbytes for group in tensors.values() for t in group.values())
        self.failed_in_a_row += 1  # until it is there
        with files.write_folder(self.of(step), needed_bytes=num_bytes) as folder:
            (folder / STATE).write_text(json.dumps({**state, "step": step}, indent=1), "utf-8")
            for group, named in tensors.items():
                save_file(dict(named), folder / (group + SUFFIX))
        files.verify_folder(self.of(step))
        steps = self.steps()  # later ones were refused, or the run would be past them
        kept = [best, *[other for other in steps if other <= step][: self.keep_last]]
        for other in (other for other in steps if other not in kept):  # the newest first
            files.remove(self.of(other))
        self.failed_in_a_row = 0

    def latest(self) -> Loaded | None:
        """The newest checkpoint that verifies; None if there never was one. Those that were refused
        are named in warnings, and in a CheckpointError where none can be trusted."""
        refused = [f"no checkpoint in {self.folder} can be trusted; restore one, or run anew:"]
        for step in self.steps():
            try:
                return load(self.of(step))
            except CheckpointError as error:
                logging.getLogger(__name__).warning("step %d is refused: %s", step, error)
                refused.append(f"  step {step}: {error}")
        if refused[1:]:
            raise CheckpointError("\n".join(refused))
        return None

    def steps(self) -> list[int]:
        """The steps that have a folder, newest first, verified or not."""
        numbers = {path.name.removeprefix("step-") for path in self.folder.glob("step-*")}
        return sorted({int(number) for number in numbers if number.isdecimal()}, reverse=True)

    def of(self, step: int) -> Path:
        return self.folder / f"step-{step}"

def load(folder: Path) -> Loaded:
    """Verify and read one checkpoint folder. Raises CheckpointError: names the file at fault."""
    if STATE not in (names := files.verify_folder(folder)):
        raise CheckpointError(f"{folder} is no checkpoint: its manifest has no {STATE}")
    state, tensors = json.loads((folder / STATE).read_bytes()), {}
    for file in (folder / name for name in names if name.endswith(SUFFIX)):
        # load_file maps the file: cut or overwritten later, it would end this process by SIGBUS.
        tensors[file.stem] = {key: mapped.clone() for key, mapped in load_file(file).items()}
    return Loaded(state["step"], tensors, state)
