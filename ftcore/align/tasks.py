"""All tasks of train.py: those of tune, and those that learn from preferences."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from ftcore.align.preference import bradley_terry, dpo
from ftcore.config import Run
from ftcore.tune import task as tune
from ftcore.tune.task import TaskKind

TASKS: Mapping[str, TaskKind] = {**tune.TASKS,
                                 "reward": TaskKind("classify", bradley_terry, "SEQ_CLS"),
                                 "dpo": TaskKind("lm", dpo, "CAUSAL_LM")}

def kind_of(task: str, config: Run) -> TaskKind:
    """A task, its loss with the options of the section that has its name, if there is one."""
    kind, section = TASKS[task], getattr(config, task, None)
    return replace(kind, loss=partial(kind.loss, **vars(section))) if section else kind
